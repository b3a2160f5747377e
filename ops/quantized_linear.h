// Linear layers with dynamically quantized activations and 4 or 8 bit weights, for x86 CPUs without
// VNNI. Weights are read as XNNPACK's serializer leaves them in a .pte, in place: nothing is packed
// or copied ahead of time.
//
// This is the arithmetic alone: raw pointers and sizes in, numbers out. It knows nothing of
// ExecuTorch, threads or memory allocation; linear_backend.cpp brings those.
//
// The definition is XNNPACK's. Each row x of the input is quantized to 8 bits of its own scale and
// zero point, q = round(x * scale) + zero_point, and
//     out[n] = bias[n] + 1 / scale * sum over groups g of
//              scales[n, g] * sum over k in g of (q[k] - zero_point) * weight[n, k]
// with exact integer sums. A row that contains NaN or infinity gives NaN.
//
// A call is cut into tasks, each of which computes some columns of the output. The cut depends on
// the shapes and the CPU's vector width only, never on the number of threads, and no two tasks
// write the same memory: any number of threads gives the same bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mvlm {

// The weights. No alignment is needed.
struct QuantizedLinear {
  // 4 bits: uint8 [out, in / 2], a weight is its nibble - 8 and the even one of two columns is in
  // the low nibble. 8 bits: int8 [out, in].
  const void* weight;
  const void* scales;  // 4 bits: bfloat16 [out, in / group]. 8 bits: float32 [out]
  const float* bias;   // [out], or null
  int64_t in;          // >= 1; a multiple of `group` for 4 bits, at most 65536 for 8 bits
  int64_t out;         // >= 1
  int64_t group;       // 4 bits: 32, 64, 128 or 256 weights have a scale. 8 bits: 0
};

// Whether this kernel is the faster one on this CPU: x86 with AVX2, but without the dot product
// instructions (AVX-512 VNNI or AVX-VNNI) that XNNPACK's kernels are fast with.
bool LinearIsFasterHere();

// Name of the instruction set that the kernel uses on this CPU, such as "AVX2" or "NEON".
const char* LinearTarget();

// Scratch memory must be aligned to this many bytes.
constexpr size_t kLinearScratchAlignment = 64;

// Bytes of scratch memory for a call with up to `threads` threads, a multiple of
// kLinearScratchAlignment. It holds the quantized input (one or two bytes per number) and per
// thread up to 150 KiB, or 300 KiB with AVX-512, or kLinearRowsAtOnce quantized rows if these are
// larger; much less if there are few rows.
size_t LinearScratchBytes(const QuantizedLinear& linear, int64_t rows, int64_t threads);

// The parts of a call; see RunQuantizedLinear().
struct LinearCall {
  const QuantizedLinear* linear;
  const float* input;  // [rows, in]
  int64_t rows;        // >= 1
  float* output;       // [rows, out], not overlapping with the input
  void* scratch;       // LinearScratchBytes(), aligned to kLinearScratchAlignment
};

// Rows that are quantized together.
constexpr int64_t kLinearRowsAtOnce = 16;

// Quantizes rows begin .. end - 1 into the scratch memory, as the worker with this number. `begin`
// must be a multiple of kLinearRowsAtOnce, and so must `end`, unless it is the number of rows.
void QuantizeRows(const LinearCall& call, int64_t begin, int64_t end, int64_t worker);

// Number of parts that SubtractMinima() consists of: 0 unless many rows are multiplied by 8 bit
// weights.
int64_t MinimaParts(const LinearCall& call);

// Runs one part, 0 <= part < MinimaParts(call). All rows must have been quantized.
void SubtractMinima(const LinearCall& call, int64_t part);

// Number of tasks that multiplying consists of.
int64_t LinearTasks(const LinearCall& call);

// Runs one task, 0 <= task < LinearTasks(call), as the worker with this number: workers that run at
// the same time must have different numbers. All rows must have been quantized, and all minima
// subtracted.
void MultiplyTask(const LinearCall& call, int64_t task, int64_t worker);

// Work below this many multiply-adds is done by one worker: waking a second one costs more.
constexpr int64_t kMinLinearMultiplyAddsPerWorker = 1 << 18;

// The whole call.
//
// `parallel_for(count, body)` must call body(begin, end) for disjoint ranges that cover
// 0 .. count - 1, on any threads and in any order, and return when all are done.
template <typename ParallelFor>
void RunQuantizedLinear(const QuantizedLinear& linear, const float* input, int64_t rows,
                        float* output, int64_t threads, void* scratch,
                        const ParallelFor& parallel_for) {
  if (rows < 1) return;
  const LinearCall call = {&linear, input, rows, output, scratch};
  // Items are handed out one at a time, because a laptop's cores differ in speed and
  // other programs use them, too.
  const auto for_each = [&](int64_t items, int64_t workers, const auto& item) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t i = next++; i < items; i = next++) item(i, worker);
      }
    };
    if (workers <= 1) {
      work(0, 1);
    } else {
      parallel_for(workers, work);
    }
  };

  // Quantizing a number takes about as long as 32 multiply-adds.
  const int64_t quantize_workers = std::min(
      {threads, rows / kLinearRowsAtOnce, rows * linear.in * 32 / kMinLinearMultiplyAddsPerWorker});
  for_each((rows + kLinearRowsAtOnce - 1) / kLinearRowsAtOnce, quantize_workers,
           [&](int64_t i, int64_t worker) {
             QuantizeRows(call, i * kLinearRowsAtOnce, std::min(rows, (i + 1) * kLinearRowsAtOnce),
                          worker);
           });
  const int64_t parts = MinimaParts(call);
  // Here it takes about as long as two.
  for_each(parts,
           std::min({threads, parts, rows * linear.in * 2 / kMinLinearMultiplyAddsPerWorker}),
           [&](int64_t part, int64_t) { SubtractMinima(call, part); });
  const int64_t tasks = LinearTasks(call);
  const int64_t workers =
      std::min({threads, tasks, rows * linear.in * linear.out / kMinLinearMultiplyAddsPerWorker});
  for_each(tasks, workers, [&](int64_t task, int64_t worker) { MultiplyTask(call, task, worker); });
}

}  // namespace mvlm

// Attention in float32 over a packed projection: causal and grouped over a KV cache, with rotary
// embedding, or of all tokens to all tokens without a cache.
//
// This is the arithmetic alone: raw pointers and sizes in, numbers out. It knows nothing of
// ExecuTorch, threads or memory allocation; sdpa_with_kv_cache.cpp and attention.cpp bring those.
//
// A call is cut into tasks, each of which attends for some queries of one key/value head. The cut
// depends on the shapes and the CPU's vector width only, never on the number of threads, and no
// two tasks write the same memory: any number of threads gives the same bits.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mvlm {

// Where keys and values are.
enum class KeyValues {
  kProjection,    // in `qkv`: every token attends to every token, nothing is rotated or stored
  kFloat32Cache,  // in caches of this type: token i attends to positions 0 .. start_pos + i
  kFloat16Cache,
  kInt8Cache,  // with a scale per head and position
};

// One call. All tensors are contiguous and must not overlap.
struct AttentionCall {
  KeyValues key_values;
  const float* qkv;  // [tokens, heads + 2 * kv_heads, head_dim]: queries, keys, values
  float* out;        // [tokens, heads, head_dim]

  int64_t tokens;    // >= 1
  int64_t heads;     // a multiple of kv_heads; query head h reads kv head h / (heads / kv_heads)
  int64_t kv_heads;  // >= 1
  int64_t head_dim;  // >= 1, and even with a cache
  float scale;       // > 0; multiplies query . key

  // Only with a cache.
  void* key_cache;      // [kv_heads, capacity, head_dim]
  void* value_cache;    // the same
  float* key_scales;    // [kv_heads, capacity], only for kInt8Cache
  float* value_scales;  // the same
  const float* cos;     // [capacity or more, head_dim / 2]
  const float* sin;     // the same
  int64_t capacity;     // positions in each cache
  int64_t start_pos;    // 0 <= start_pos <= capacity - tokens
};

// Scratch memory handed to the functions below must be aligned to this many bytes.
constexpr size_t kScratchAlignment = 64;

// Bytes of scratch memory for one worker, a multiple of kScratchAlignment. It does not grow with
// the length of the cache, and with the number of tokens only up to a block: 270 KiB at head_dim
// 128 with 8-lane vectors, 1 KiB for a single token.
size_t AttentionScratchBytes(const AttentionCall& call);

// Writes this call's keys, rotated, and values of one kv head into the caches, at positions
// start_pos .. start_pos + tokens - 1. Different kv heads may run concurrently.
void WriteCache(const AttentionCall& call, int64_t kv_head, void* scratch);

// Number of tasks that the call consists of, at least kv_heads; task t belongs to kv head t /
// (tasks / kv_heads).
int64_t AttentionTasks(const AttentionCall& call);

// Runs one task, 0 <= task < AttentionTasks(call), and writes its part of `out`. With a cache it
// reads positions 0 .. start_pos + tokens - 1, so that WriteCache() must be complete for its kv
// head. Nothing past those positions is read: a cache may hold anything there, NaN included.
void Attend(const AttentionCall& call, int64_t task, void* scratch);

// Name of the instruction set that the kernel uses on this CPU, such as "AVX2" or "NEON".
const char* AttentionTarget();

// Work below this many multiply-adds is done by one worker: waking a second one costs more.
constexpr int64_t kMinMultiplyAddsPerWorker = 1 << 17;

// How many of `threads` workers the call is worth, at least 1.
int64_t AttentionWorkers(const AttentionCall& call, int64_t threads);

// The whole call: caches written, then every task run.
//
// `parallel_for(count, body)` must call body(begin, end) for disjoint ranges that cover
// 0 .. count - 1, on any threads and in any order, and return when all are done. `scratch` holds
// `workers` times AttentionScratchBytes(call).
template <typename ParallelFor>
void RunAttention(const AttentionCall& call, int64_t workers, void* scratch,
                  const ParallelFor& parallel_for) {
  const size_t scratch_bytes = AttentionScratchBytes(call);
  // Items are handed out one at a time, because tasks differ in length (later queries see more
  // keys) and so do a phone's cores in speed.
  const auto for_each = [&](int64_t items, const auto& item) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        void* const own = static_cast<char*>(scratch) + worker * scratch_bytes;
        for (int64_t i = next++; i < items; i = next++) item(i, own);
      }
    };
    if (workers == 1) {
      work(0, 1);
    } else {
      parallel_for(workers, work);
    }
  };

  const int64_t tasks = AttentionTasks(call);
  const bool cached = call.key_values != KeyValues::kProjection;
  // A task that has its kv head to itself writes the cache too: threads are woken once.
  const bool at_once = cached && tasks == call.kv_heads;
  if (cached && !at_once) {
    for_each(call.kv_heads, [&](int64_t head, void* own) { WriteCache(call, head, own); });
  }
  for_each(tasks, [&](int64_t task, void* own) {
    if (at_once) WriteCache(call, task, own);
    Attend(call, task, own);
  });
}

}  // namespace mvlm

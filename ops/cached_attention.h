// Causal grouped-query attention over a KV cache, in float32.
//
// This is the arithmetic alone: raw pointers and sizes in, numbers out. It knows nothing of
// ExecuTorch, threads or memory allocation; sdpa_with_kv_cache.cpp brings those.
//
// A call is cut into tasks, each of which attends for one block of queries of one key/value head.
// The cut depends on the shapes and the CPU's vector width only, never on the number of threads,
// and no two tasks write the same memory: any number of threads gives the same bits.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mvlm {

// One call. All tensors are contiguous float32 and must not overlap.
struct CachedAttention {
  const float* query;  // [tokens, heads, head_dim]
  const float* key;    // [tokens, kv_heads, head_dim]
  const float* value;  // [tokens, kv_heads, head_dim]
  float* key_cache;    // [kv_heads, capacity, head_dim]
  float* value_cache;  // [kv_heads, capacity, head_dim]
  float* out;          // [tokens, heads, head_dim]

  int64_t tokens;     // >= 1
  int64_t heads;      // a multiple of kv_heads; query head h reads kv head h / (heads / kv_heads)
  int64_t kv_heads;   // >= 1
  int64_t head_dim;   // >= 1
  int64_t capacity;   // positions in each cache
  int64_t start_pos;  // 0 <= start_pos <= capacity - tokens
  float scale;        // > 0; multiplies query . key
};

// Scratch memory handed to Attend() must be aligned to this many bytes.
constexpr size_t kScratchAlignment = 64;

// Copies this call's keys and values of one kv head into the caches, at positions
// start_pos .. start_pos + tokens - 1. Different kv heads may run concurrently.
void WriteCache(const CachedAttention& call, int64_t kv_head);

// Number of tasks that the call consists of, at least kv_heads.
int64_t AttentionTasks(const CachedAttention& call);

// Bytes of scratch memory for one running task, a multiple of kScratchAlignment. It grows with
// head_dim only, not with the number of tokens or the length of the cache: 30 KiB at head_dim 128
// with 8-lane vectors.
size_t AttentionScratchBytes(const CachedAttention& call);

// Runs one task, 0 <= task < AttentionTasks(call): reads cache positions 0 .. start_pos + tokens -
// 1 (WriteCache() must be complete for its kv head) and writes its part of `out`. Nothing past
// those positions is read, so a cache may hold anything there, NaN included.
void Attend(const CachedAttention& call, int64_t task, void* scratch);

// Name of the instruction set that the kernel uses on this CPU, such as "AVX2" or "NEON".
const char* AttentionTarget();

// Work below this many multiply-adds is done by one worker: waking a second one costs more.
constexpr int64_t kMinMultiplyAddsPerWorker = 1 << 17;

// How many of `threads` workers the call is worth, at least 1.
int64_t AttentionWorkers(const CachedAttention& call, int64_t threads);

// The whole call: caches written, then every task run.
//
// `parallel_for(count, body)` must call body(begin, end) for disjoint ranges that cover
// 0 .. count - 1, on any threads and in any order, and return when all are done. `scratch` holds
// `workers` times AttentionScratchBytes(call).
template <typename ParallelFor>
void RunCachedAttention(const CachedAttention& call, int64_t workers, void* scratch,
                        const ParallelFor& parallel_for) {
  const auto write_heads = [&call](int64_t begin, int64_t end) {
    for (int64_t kv_head = begin; kv_head < end; ++kv_head) WriteCache(call, kv_head);
  };
  if (workers == 1 || call.tokens == 1) {
    // One token is a few KiB: copying it costs less than waking a thread.
    write_heads(0, call.kv_heads);
  } else {
    parallel_for(call.kv_heads, write_heads);
  }

  // Tasks are handed out one at a time, because they differ in length (later queries see more
  // keys) and so do a phone's cores in speed.
  const int64_t tasks = AttentionTasks(call);
  const size_t scratch_bytes = AttentionScratchBytes(call);
  std::atomic<int64_t> next_task{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      void* const own = static_cast<char*>(scratch) + worker * scratch_bytes;
      for (int64_t task = next_task++; task < tasks; task = next_task++) Attend(call, task, own);
    }
  };
  if (workers == 1) {
    work(0, 1);
  } else {
    parallel_for(workers, work);
  }
}

}  // namespace mvlm

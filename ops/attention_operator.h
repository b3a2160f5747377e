// What the attention operators share: the check of `scale`, and running the kernel on ExecuTorch's
// thread pool.
#pragma once

#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cmath>
#include <optional>

#include "attention_kernel.h"
#include "kernel_checks.h"

namespace mvlm {

// Sets call.scale, which is 1 / sqrt(head_dim) unless it is given.
inline executorch::runtime::Error SetScale(const char* op, std::optional<double> scale,
                                           AttentionCall& call) {
  call.scale = static_cast<float>(
      scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(call.head_dim)));
  MVLM_REQUIRE(op, std::isfinite(call.scale) && call.scale > 0.0f,
               "scale is %g; it must be positive and finite", static_cast<double>(call.scale));
  return executorch::runtime::Error::Ok;
}

// Gives `out` its shape and runs the call, which is complete but for `out`.
inline executorch::runtime::Error RunOperator(const char* op,
                                              executorch::runtime::KernelRuntimeContext& context,
                                              AttentionCall& call, executorch::aten::Tensor& out) {
  using executorch::aten::SizesType;
  using executorch::runtime::Error;
  const SizesType sizes[] = {1, static_cast<SizesType>(call.tokens),
                             static_cast<SizesType>(call.heads * call.head_dim)};
  const Error prepared = PrepareOut(op, "out", {sizes, 3}, out);
  if (prepared != Error::Ok) return prepared;
  call.out = out.mutable_data_ptr<float>();

  const int64_t workers = AttentionWorkers(call, executorch::extension::get_thread_count());
  const size_t scratch_bytes = static_cast<size_t>(workers) * AttentionScratchBytes(call);
  executorch::runtime::Result<void*> scratch =
      context.allocate_temp(scratch_bytes, kScratchAlignment);
  if (!scratch.ok()) {
    ET_LOG(Error,
           "mvlm::%s: no %zu bytes of temporary memory; give the method's MemoryManager a temp "
           "allocator",
           op, scratch_bytes);
    return scratch.error();
  }
  bool ran = true;
  RunAttention(call, workers, *scratch, [&ran](int64_t count, const auto& body) {
    ran = executorch::extension::parallel_for(0, count, 1, body) && ran;
  });
  return ran ? Error::Ok : Error::Internal;
}

}  // namespace mvlm

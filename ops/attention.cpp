// Registers mvlm::attention.out with the ExecuTorch runtime: checks the arguments, then runs the
// kernel of attention_kernel.h. attention.py holds the operator's schema and its meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <cinttypes>
#include <limits>
#include <optional>

#include "attention_kernel.h"
#include "attention_operator.h"
#include "kernel_checks.h"

namespace mvlm {
namespace {

using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Result;

constexpr const char* kOperator = "attention";

Result<AttentionCall> Check(const Tensor& qkv, int64_t heads, std::optional<double> scale) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOperator, "qkv", qkv));
  MVLM_REQUIRE(kOperator, qkv.dim() == 3 && qkv.size(0) == 1,
               "qkv has shape %s; it must be [1, tokens, 3 * heads * head_dim]",
               Shape(qkv).c_str());
  // The upper limit keeps the product from overflowing; no tensor is that wide.
  MVLM_REQUIRE(kOperator, 1 <= heads && heads <= std::numeric_limits<int32_t>::max(),
               "heads is %" PRId64 "; it must be at least 1 and a 32-bit number", heads);
  MVLM_REQUIRE(kOperator, qkv.numel() > 0 && qkv.size(2) % (3 * heads) == 0,
               "qkv has shape %s; with heads %" PRId64
               " it must be [1, tokens, a multiple of %" PRId64 "], with at least one token",
               Shape(qkv).c_str(), heads, 3 * heads);
  AttentionCall call = {};
  call.key_values = KeyValues::kProjection;
  call.qkv = qkv.const_data_ptr<float>();
  call.tokens = qkv.size(1);
  call.heads = heads;
  call.kv_heads = heads;
  call.head_dim = qkv.size(2) / (3 * heads);
  ET_CHECK_OK_OR_RETURN_ERROR(SetScale(kOperator, scale, call));
  return call;
}

Tensor& AttentionOut(KernelRuntimeContext& context, const Tensor& qkv, int64_t heads,
                     std::optional<double> scale, Tensor& out) {
  Result<AttentionCall> call = Check(qkv, heads, scale);
  const Error error = call.ok() ? RunOperator(kOperator, context, *call, out) : call.error();
  if (error != Error::Ok) context.fail(error);
  return out;
}

EXECUTORCH_LIBRARY(mvlm, "attention.out", AttentionOut);

}  // namespace
}  // namespace mvlm

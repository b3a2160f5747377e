// Registers mvlm::swiglu.out and mvlm::quick_gelu.out with the ExecuTorch runtime: checks the
// arguments, then runs the kernels of activation_kernel.h on ExecuTorch's thread pool.
// activation.py holds the schemas and their meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>

#include "activation_kernel.h"
#include "kernel_checks.h"
#include "parallel.h"

namespace mvlm {
namespace {

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::kTensorDimensionLimit;

Error RunSwiglu(const Tensor& gate_up, const Tensor& out) {
  constexpr const char* kOp = "swiglu";
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOp, "gate_up", gate_up));
  const size_t dims = static_cast<size_t>(gate_up.dim());
  const int64_t both = dims == 0 ? 0 : gate_up.size(gate_up.dim() - 1);
  MVLM_REQUIRE(kOp, dims <= kTensorDimensionLimit && both >= 2 && both % 2 == 0,
               "gate_up has shape %s; it must be [..., 2 * F] with an even last dimension of at "
               "least 2",
               Shape(gate_up).c_str());
  SizesType sizes[kTensorDimensionLimit];
  std::copy_n(gate_up.sizes().data(), dims, sizes);
  sizes[dims - 1] /= 2;
  ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(kOp, "out", {sizes, dims}, out));

  const int64_t width = both / 2;
  const float* const from = gate_up.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  // About 1 ns for 2 results.
  const bool ran =
      RunRanges(gate_up.numel() / both, gate_up.numel() / 4,
                [=](int64_t begin, int64_t end) { Swiglu(from, begin, end, width, to); });
  return ran ? Error::Ok : Error::Internal;
}

Error RunQuickGelu(const Tensor& input, const Tensor& out) {
  constexpr const char* kOp = "quick_gelu";
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOp, "input", input));
  ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(kOp, "out", input.sizes(), out));

  // In pieces that fill whole cache lines, so that threads do not write to one and the same.
  constexpr int64_t kPiece = 1024;
  const int64_t count = input.numel();
  const float* const from = input.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  // About 1 ns for 2 results.
  const bool ran =
      RunRanges((count + kPiece - 1) / kPiece, count / 2, [=](int64_t begin, int64_t end) {
        QuickGelu(from, begin * kPiece, std::min(count, end * kPiece), to);
      });
  return ran ? Error::Ok : Error::Internal;
}

Tensor& SwigluOut(KernelRuntimeContext& context, const Tensor& gate_up, Tensor& out) {
  const Error error = RunSwiglu(gate_up, out);
  if (error != Error::Ok) context.fail(error);
  return out;
}

Tensor& QuickGeluOut(KernelRuntimeContext& context, const Tensor& input, Tensor& out) {
  const Error error = RunQuickGelu(input, out);
  if (error != Error::Ok) context.fail(error);
  return out;
}

EXECUTORCH_LIBRARY(mvlm, "swiglu.out", SwigluOut);
EXECUTORCH_LIBRARY(mvlm, "quick_gelu.out", QuickGeluOut);

}  // namespace
}  // namespace mvlm

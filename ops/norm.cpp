// Registers mvlm::rms_norm.out, mvlm::layer_norm.out, mvlm::add_rms_norm.out and
// mvlm::add_layer_norm.out with the ExecuTorch runtime: checks the arguments, then runs the kernels
// of norm_kernel.h on ExecuTorch's thread pool. norm.py holds the schemas and their meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <cmath>

#include "kernel_checks.h"
#include "norm_kernel.h"
#include "parallel.h"

namespace mvlm {
namespace {

using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

// The tensors of a call. What an operator does not have is null.
struct Tensors {
  const Tensor& input;
  const Tensor* residual;
  const Tensor& weight;
  const Tensor* bias;
  const Tensor* sum;
  const Tensor& out;
};

Error CheckParameter(const char* op, const char* name, const Tensor& parameter,
                     const Tensor& input) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(op, name, parameter));
  const int64_t width = input.size(input.dim() - 1);
  MVLM_REQUIRE(op, parameter.dim() == 1 && parameter.size(0) == width,
               "%s has shape %s; with input %s it must be [%" PRId64 "]", name,
               Shape(parameter).c_str(), Shape(input).c_str(), width);
  return Error::Ok;
}

// Checks everything, gives the results their shapes and runs the call. `kernel` is RmsNorm() or
// LayerNorm().
Error Run(const char* op, const Tensors& tensors, double eps,
          void (*kernel)(const Norm&, int64_t, int64_t)) {
  const Tensor& input = tensors.input;
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(op, "input", input));
  MVLM_REQUIRE(op, input.dim() >= 1 && input.size(input.dim() - 1) >= 1,
               "input has shape %s; it must be [..., D] with a last dimension of at least 1",
               Shape(input).c_str());
  ET_CHECK_OK_OR_RETURN_ERROR(CheckParameter(op, "weight", tensors.weight, input));
  if (tensors.bias != nullptr) {
    ET_CHECK_OK_OR_RETURN_ERROR(CheckParameter(op, "bias", *tensors.bias, input));
  }
  MVLM_REQUIRE(op, std::isfinite(eps) && eps >= 0.0,
               "eps is %g; it must be finite and not negative", eps);

  Norm call = {};
  if (tensors.residual != nullptr) {
    const Tensor& residual = *tensors.residual;
    ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(op, "residual", residual));
    MVLM_REQUIRE(op, executorch::runtime::tensors_have_same_shape(residual, input),
                 "residual has shape %s; it must be that of input, %s", Shape(residual).c_str(),
                 Shape(input).c_str());
    ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(op, "out0", input.sizes(), *tensors.sum));
    ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(op, "out1", input.sizes(), tensors.out));
    call.residual = residual.const_data_ptr<float>();
    call.sum = tensors.sum->mutable_data_ptr<float>();
  } else {
    ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(op, "out", input.sizes(), tensors.out));
  }
  call.input = input.const_data_ptr<float>();
  call.weight = tensors.weight.const_data_ptr<float>();
  if (tensors.bias != nullptr) call.bias = tensors.bias->const_data_ptr<float>();
  call.out = tensors.out.mutable_data_ptr<float>();
  call.width = input.size(input.dim() - 1);
  call.rows = input.numel() / call.width;
  call.eps = static_cast<float>(eps);

  // A row's passes take about 1 ns for 3 numbers.
  const bool ran = RunRanges(call.rows, input.numel() / 3,
                             [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return ran ? Error::Ok : Error::Internal;
}

Tensor& RmsNormOut(KernelRuntimeContext& context, const Tensor& input, const Tensor& weight,
                   double eps, Tensor& out) {
  const Error error =
      Run("rms_norm", {input, nullptr, weight, nullptr, nullptr, out}, eps, RmsNorm);
  if (error != Error::Ok) context.fail(error);
  return out;
}

Tensor& LayerNormOut(KernelRuntimeContext& context, const Tensor& input, const Tensor& weight,
                     const Tensor& bias, double eps, Tensor& out) {
  const Error error =
      Run("layer_norm", {input, nullptr, weight, &bias, nullptr, out}, eps, LayerNorm);
  if (error != Error::Ok) context.fail(error);
  return out;
}

// ExecuTorch's boxing allows one reference to a Tensor that is not const. That is about the handle:
// what out0 points to is written all the same.
Tensor& AddRmsNormOut(KernelRuntimeContext& context, const Tensor& input, const Tensor& residual,
                      const Tensor& weight, double eps, const Tensor& out0, Tensor& out1) {
  const Error error =
      Run("add_rms_norm", {input, &residual, weight, nullptr, &out0, out1}, eps, RmsNorm);
  if (error != Error::Ok) context.fail(error);
  return out1;
}

Tensor& AddLayerNormOut(KernelRuntimeContext& context, const Tensor& input, const Tensor& residual,
                        const Tensor& weight, const Tensor& bias, double eps, const Tensor& out0,
                        Tensor& out1) {
  const Error error =
      Run("add_layer_norm", {input, &residual, weight, &bias, &out0, out1}, eps, LayerNorm);
  if (error != Error::Ok) context.fail(error);
  return out1;
}

EXECUTORCH_LIBRARY(mvlm, "rms_norm.out", RmsNormOut);
EXECUTORCH_LIBRARY(mvlm, "layer_norm.out", LayerNormOut);
EXECUTORCH_LIBRARY(mvlm, "add_rms_norm.out", AddRmsNormOut);
EXECUTORCH_LIBRARY(mvlm, "add_layer_norm.out", AddLayerNormOut);

}  // namespace
}  // namespace mvlm

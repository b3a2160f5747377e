// Registers mvlm::depthwise_conv2d.out with the ExecuTorch runtime: checks the arguments, then runs
// the kernel of depthwise_conv2d_kernel.h on ExecuTorch's thread pool. depthwise_conv2d.py holds
// the operator's schema and its meaning.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <optional>

#include "depthwise_conv2d_kernel.h"
#include "kernel_checks.h"
#include "parallel.h"

namespace mvlm {
namespace {

using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

constexpr const char* kOp = "depthwise_conv2d";

// Checks everything, gives the result its shape and runs the call.
Error Run(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
          int64_t grid_width, int64_t stride, int64_t padding, const Tensor& out) {
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOp, "input", input));
  ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOp, "weight", weight));
  MVLM_REQUIRE(kOp, input.dim() == 3 && input.numel() >= 1,
               "input has shape %s; it must be [batch, tokens, channels], each at least 1",
               Shape(input).c_str());
  DepthwiseConv2d call = {};
  call.batch = input.size(0);
  const int64_t tokens = input.size(1);
  call.channels = input.size(2);
  MVLM_REQUIRE(kOp, weight.dim() == 3 && weight.numel() >= 1 && weight.size(2) == call.channels,
               "weight has shape %s; with input %s it must be [1 or more, 1 or more, %" PRId64 "]",
               Shape(weight).c_str(), Shape(input).c_str(), call.channels);
  if (bias.has_value()) {
    ET_CHECK_OK_OR_RETURN_ERROR(CheckFloatTensor(kOp, "bias", *bias));
    MVLM_REQUIRE(kOp, bias->dim() == 1 && bias->size(0) == call.channels,
                 "bias has shape %s; with input %s it must be [%" PRId64 "]", Shape(*bias).c_str(),
                 Shape(input).c_str(), call.channels);
    call.bias = bias->const_data_ptr<float>();
  }
  MVLM_REQUIRE(kOp, grid_width >= 1 && tokens % grid_width == 0,
               "grid_width is %" PRId64 "; with %" PRId64
               " tokens it must be a positive divisor of that",
               grid_width, tokens);
  MVLM_REQUIRE(kOp, stride >= 1, "stride is %" PRId64 "; it must be at least 1", stride);
  call.rows = tokens / grid_width;
  call.columns = grid_width;
  call.kernel_rows = weight.size(0);
  call.kernel_columns = weight.size(1);
  call.stride = stride;
  call.padding = padding;
  const int64_t most_padding = std::min(call.kernel_rows, call.kernel_columns) - 1;
  MVLM_REQUIRE(kOp, 0 <= padding && padding <= most_padding,
               "padding is %" PRId64 "; with a kernel of %" PRId64 " x %" PRId64
               " it must be from 0 to %" PRId64,
               padding, call.kernel_rows, call.kernel_columns, most_padding);
  const int64_t free_rows = call.rows + 2 * padding - call.kernel_rows;
  const int64_t free_columns = call.columns + 2 * padding - call.kernel_columns;
  MVLM_REQUIRE(kOp, free_rows >= 0 && free_columns >= 0,
               "a kernel of %" PRId64 " x %" PRId64 " does not fit a grid of %" PRId64 " x %" PRId64
               " with padding %" PRId64,
               call.kernel_rows, call.kernel_columns, call.rows, call.columns, padding);
  call.out_rows = free_rows / stride + 1;
  call.out_columns = free_columns / stride + 1;

  const SizesType sizes[] = {static_cast<SizesType>(call.batch),
                             static_cast<SizesType>(call.out_rows * call.out_columns),
                             static_cast<SizesType>(call.channels)};
  ET_CHECK_OK_OR_RETURN_ERROR(PrepareOut(kOp, "out", {sizes, 3}, out));
  call.input = input.const_data_ptr<float>();
  call.weight = weight.const_data_ptr<float>();
  call.out = out.mutable_data_ptr<float>();

  // About 1 ns for 8 products.
  const int64_t products = out.numel() * call.kernel_rows * call.kernel_columns;
  const bool ran =
      RunRanges(DepthwiseConv2dTasks(call), products / 8,
                [&call](int64_t begin, int64_t end) { RunDepthwiseConv2d(call, begin, end); });
  return ran ? Error::Ok : Error::Internal;
}

Tensor& DepthwiseConv2dOut(KernelRuntimeContext& context, const Tensor& input, const Tensor& weight,
                           std::optional<Tensor> bias, int64_t grid_width, int64_t stride,
                           int64_t padding, Tensor& out) {
  const Error error = Run(input, weight, bias, grid_width, stride, padding, out);
  if (error != Error::Ok) context.fail(error);
  return out;
}

EXECUTORCH_LIBRARY(mvlm, "depthwise_conv2d.out", DepthwiseConv2dOut);

}  // namespace
}  // namespace mvlm

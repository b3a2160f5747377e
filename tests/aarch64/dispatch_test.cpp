// Highway runs the operators with NEON (or SVE, where it is new enough and the CPU has it), and not
// with its portable targets, which give the same results many times more slowly.

#include <gtest/gtest.h>

#include <string>

#include "activation_kernel.h"
#include "attention_kernel.h"
#include "depthwise_conv2d_kernel.h"
#include "norm_kernel.h"
#include "quantized_linear.h"

namespace mvlm {
namespace {

TEST(Dispatch, TakesVectorsOfTheCpu) {
  for (const std::string target : {ActivationTarget(), AttentionTarget(), DepthwiseConv2dTarget(),
                                   LinearTarget(), NormTarget()}) {
    EXPECT_TRUE(target.rfind("NEON", 0) == 0 || target.rfind("SVE", 0) == 0) << target;
  }
}

}  // namespace
}  // namespace mvlm

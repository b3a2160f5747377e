// Highway runs the operators with NEON, and not with its portable targets, which give the same
// results many times more slowly, nor with SVE, see ops/CMakeLists.txt.

#include <gtest/gtest.h>

#include <string>

#include "activation_kernel.h"
#include "attention_kernel.h"
#include "depthwise_conv2d_kernel.h"
#include "norm_kernel.h"
#include "quantized_linear.h"

namespace mvlm {
namespace {

TEST(Dispatch, TakesNeon) {
  for (const std::string target : {ActivationTarget(), AttentionTarget(), DepthwiseConv2dTarget(),
                                   LinearTarget(), NormTarget()}) {
    // Later versions of Highway have NEON_BF16 and the like.
    EXPECT_EQ(target.rfind("NEON", 0), 0u) << target;
  }
}

}  // namespace
}  // namespace mvlm

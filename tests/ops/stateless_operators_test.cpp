// The operators without state as ExecuTorch sees them: found in the registry, called with EValues,
// errors reported through the context.

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "activation_kernel.h"
#include "depthwise_conv2d_kernel.h"
#include "norm_kernel.h"

namespace mvlm {
namespace {

using executorch::aten::DimOrderType;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::aten::TensorShapeDynamism;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using Sizes = std::vector<SizesType>;

// What an argument of a call is made of. A test spoils it before the call.
struct Argument {
  enum class Kind { kNone, kInt, kDouble, kTensor };

  static Argument None() { return {}; }
  static Argument Int(int64_t value) {
    Argument argument;
    argument.kind = Kind::kInt;
    argument.integer = value;
    return argument;
  }
  static Argument Double(double value) {
    Argument argument;
    argument.kind = Kind::kDouble;
    argument.real = value;
    return argument;
  }
  // Its numbers are 0.25, -0.5, 0.75, -1, 1.25, ... and again from 0.25 after 31.
  static Argument Floats(Sizes sizes) {
    Argument argument;
    argument.kind = Kind::kTensor;
    argument.sizes = std::move(sizes);
    size_t count = 1;
    for (const SizesType size : argument.sizes) count *= static_cast<size_t>(size);
    // Room for a type of 8 bytes.
    for (size_t i = 0; i < 2 * count; ++i) {
      const float magnitude = 0.25f * static_cast<float>(i % 31 + 1);
      argument.data.push_back(i % 2 == 0 ? magnitude : -magnitude);
    }
    for (size_t i = 0; i < argument.sizes.size(); ++i) {
      argument.dim_order.push_back(static_cast<DimOrderType>(i));
    }
    return argument;
  }

  void SetSizes(Sizes to) {  // no more numbers than at first
    sizes = std::move(to);
    dim_order.clear();
    for (size_t i = 0; i < sizes.size(); ++i) dim_order.push_back(static_cast<DimOrderType>(i));
  }

  Kind kind = Kind::kNone;
  int64_t integer = 0;
  double real = 0;
  Sizes sizes;
  ScalarType type = ScalarType::Float;
  TensorShapeDynamism dynamism = TensorShapeDynamism::STATIC;
  std::vector<float> data;
  std::vector<DimOrderType> dim_order;
};

using Arguments = std::vector<Argument>;

// Calls mvlm::<name>.out and returns what it reported. The tensors' sizes are those they have
// afterwards.
Error Call(const std::string& name, Arguments& arguments) {
  const auto function = executorch::runtime::get_op_function_from_registry(
      ("mvlm::" + name + ".out").c_str(), Span<const executorch::runtime::TensorMeta>());
  if (!function.ok()) return function.error();
  std::vector<std::vector<StridesType>> strides;
  std::vector<std::unique_ptr<TensorImpl>> impls;
  std::vector<EValue> values;
  for (Argument& argument : arguments) {
    switch (argument.kind) {
      case Argument::Kind::kNone:
        values.emplace_back();
        break;
      case Argument::Kind::kInt:
        values.emplace_back(argument.integer);
        break;
      case Argument::Kind::kDouble:
        values.emplace_back(argument.real);
        break;
      case Argument::Kind::kTensor: {
        const size_t dims = argument.sizes.size();
        std::vector<StridesType>& own = strides.emplace_back(dims, 1);
        for (size_t i = dims; i-- > 1;) {
          own[argument.dim_order[i - 1]] =
              own[argument.dim_order[i]] * argument.sizes[argument.dim_order[i]];
        }
        impls.push_back(std::make_unique<TensorImpl>(
            argument.type, dims, argument.sizes.data(), argument.data.data(),
            argument.dim_order.data(), own.data(), argument.dynamism));
        values.emplace_back(Tensor(impls.back().get()));
        break;
      }
    }
  }
  std::vector<EValue*> stack;
  for (EValue& value : values) stack.push_back(&value);
  KernelRuntimeContext context(nullptr, nullptr);
  (*function)(context, Span<EValue*>(stack.data(), stack.size()));
  return context.failure_state();
}

// A valid call of each operator, on 2 x 3 rows of 8 numbers or on a grid of 3 x 2 tokens.
Arguments Valid(const std::string& name) {
  const auto floats = &Argument::Floats;
  const Sizes rows = {2, 3, 8};
  const Argument eps = Argument::Double(1e-5);
  if (name == "rms_norm") return {floats(rows), floats({8}), eps, floats(rows)};
  if (name == "layer_norm") return {floats(rows), floats({8}), floats({8}), eps, floats(rows)};
  if (name == "add_rms_norm") {
    return {floats(rows), floats(rows), floats({8}), eps, floats(rows), floats(rows)};
  }
  if (name == "add_layer_norm") {
    return {floats(rows), floats(rows), floats({8}), floats({8}), eps, floats(rows), floats(rows)};
  }
  if (name == "swiglu") return {floats(rows), floats({2, 3, 4})};
  if (name == "quick_gelu") return {floats(rows), floats(rows)};
  EXPECT_EQ(name, "depthwise_conv2d");
  return {floats({1, 6, 5}), floats({3, 2, 5}), floats({5}),      Argument::Int(2),
          Argument::Int(1),  Argument::Int(1),  floats({1, 9, 5})};
}

class StatelessOperatorsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { executorch::runtime::runtime_init(); }
};

// The kernels have tests of their own: here it is that each gets the right arguments.
TEST_F(StatelessOperatorsTest, Compute) {
  for (const bool adds : {false, true}) {
    for (const bool is_layer_norm : {false, true}) {
      const std::string name = std::string(adds ? "add_" : "") + (is_layer_norm ? "layer" : "rms");
      SCOPED_TRACE(name);
      Arguments arguments = Valid(name + "_norm");
      const std::vector<float> input = arguments[0].data;
      const std::vector<float> weight = Argument::Floats({8}).data;
      ASSERT_EQ(Call(name + "_norm", arguments), Error::Ok);
      std::vector<float> expected(48), sum(48);
      const Norm norm = {input.data(),
                         adds ? input.data() : nullptr,
                         weight.data(),
                         is_layer_norm ? weight.data() : nullptr,
                         adds ? sum.data() : nullptr,
                         expected.data(),
                         6,
                         8,
                         1e-5f};
      (is_layer_norm ? LayerNorm : RmsNorm)(norm, 0, 6);
      for (size_t i = 0; i < 48; ++i) {
        ASSERT_EQ(arguments.back().data[i], expected[i]);
        if (adds) {
          ASSERT_EQ((arguments.end() - 2)->data[i], sum[i]);
        }
      }
      // What lies behind stays.
      ASSERT_EQ(arguments.back().data[48], Argument::Floats({2, 3, 8}).data[48]);
    }
  }
  Arguments swiglu = Valid("swiglu"), gelu = Valid("quick_gelu");
  ASSERT_EQ(Call("swiglu", swiglu), Error::Ok);
  ASSERT_EQ(Call("quick_gelu", gelu), Error::Ok);
  for (size_t i = 0; i < 48; ++i) {
    const double x = gelu[0].data[i];
    ASSERT_NEAR(gelu[1].data[i], x / (1 + std::exp(-1.702 * x)), 1e-5);
    if (i % 8 >= 4) continue;
    const double gate = swiglu[0].data[i], up = swiglu[0].data[i + 4];
    ASSERT_NEAR(swiglu[1].data[i / 8 * 4 + i % 8], gate / (1 + std::exp(-gate)) * up, 1e-5);
  }
}

TEST_F(StatelessOperatorsTest, DepthwiseConv2dTakesABiasOrNone) {
  for (const bool has_bias : {true, false}) {
    Arguments arguments = Valid("depthwise_conv2d");
    if (!has_bias) arguments[2] = Argument::None();
    const Argument input = arguments[0], weight = arguments[1], bias = arguments[2];
    ASSERT_EQ(Call("depthwise_conv2d", arguments), Error::Ok);
    std::vector<float> expected(45);
    const DepthwiseConv2d call = {
        input.data.data(),    weight.data.data(), has_bias ? bias.data.data() : nullptr,
        expected.data(),
        /*batch=*/1,
        /*rows=*/3,
        /*columns=*/2,
        /*channels=*/5,
        /*kernel_rows=*/3,
        /*kernel_columns=*/2,
        /*stride=*/1,
        /*padding=*/1,
        /*out_rows=*/3,
        /*out_columns=*/3};
    RunDepthwiseConv2d(call, 0, DepthwiseConv2dTasks(call));
    for (size_t i = 0; i < 45; ++i) ASSERT_EQ(arguments.back().data[i], expected[i]) << i;
  }
}

// Enough work for every thread there is.
TEST_F(StatelessOperatorsTest, ThreadsGiveTheBitsOfOne) {
  ASSERT_GT(executorch::extension::get_thread_count(), 1) << "this test needs two cores";
  const auto same = [](const Argument& argument, const std::vector<float>& expected) {
    return std::memcmp(argument.data.data(), expected.data(), 4 * expected.size()) == 0;
  };
  constexpr int64_t kRows = 401, kWidth = 2050;
  const Sizes rows = {kRows, kWidth};
  std::vector<float> expected(kRows * kWidth), sum(kRows * kWidth);

  Arguments norm = {Argument::Floats(rows),     Argument::Floats(rows), Argument::Floats({kWidth}),
                    Argument::Floats({kWidth}), Argument::Double(1e-5), Argument::Floats(rows),
                    Argument::Floats(rows)};
  ASSERT_EQ(Call("add_layer_norm", norm), Error::Ok);
  const float* const x = norm[0].data.data();
  LayerNorm({x, x, norm[2].data.data(), norm[3].data.data(), sum.data(), expected.data(), kRows,
             kWidth, 1e-5f},
            0, kRows);
  EXPECT_TRUE(same(norm[5], sum));
  EXPECT_TRUE(same(norm[6], expected));

  Arguments gelu = {Argument::Floats(rows), Argument::Floats(rows)};
  ASSERT_EQ(Call("quick_gelu", gelu), Error::Ok);
  QuickGelu(x, 0, kRows * kWidth, expected.data());
  EXPECT_TRUE(same(gelu[1], expected));

  Arguments swiglu = {Argument::Floats(rows), Argument::Floats({kRows, kWidth / 2})};
  ASSERT_EQ(Call("swiglu", swiglu), Error::Ok);
  expected.resize(kRows * kWidth / 2);
  Swiglu(x, 0, kRows, kWidth / 2, expected.data());
  EXPECT_TRUE(same(swiglu[1], expected));

  Arguments conv = {Argument::Floats({1, 576, 1000}),
                    Argument::Floats({3, 3, 1000}),
                    Argument::None(),
                    Argument::Int(24),
                    Argument::Int(1),
                    Argument::Int(1),
                    Argument::Floats({1, 576, 1000})};
  ASSERT_EQ(Call("depthwise_conv2d", conv), Error::Ok);
  expected.resize(576 * 1000);
  const DepthwiseConv2d call = {conv[0].data.data(),
                                conv[1].data.data(),
                                nullptr,
                                expected.data(),
                                1,
                                24,
                                24,
                                1000,
                                3,
                                3,
                                1,
                                1,
                                24,
                                24};
  RunDepthwiseConv2d(call, 0, DepthwiseConv2dTasks(call));
  EXPECT_TRUE(same(conv[6], expected));
}

TEST_F(StatelessOperatorsTest, ResizeTheirResults) {
  for (const std::string name :
       {"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "swiglu", "quick_gelu"}) {
    SCOPED_TRACE(name);
    const bool adds = name.rfind("add_", 0) == 0;
    Arguments arguments = Valid(name);
    arguments[0].SetSizes({1, 3, 8});
    if (adds) arguments[1].SetSizes({1, 3, 8});
    for (auto out = arguments.end() - (adds ? 2 : 1); out != arguments.end(); ++out) {
      out->dynamism = TensorShapeDynamism::DYNAMIC_BOUND;
    }
    ASSERT_EQ(Call(name, arguments), Error::Ok);
    for (auto out = arguments.end() - (adds ? 2 : 1); out != arguments.end(); ++out) {
      EXPECT_EQ(out->sizes, (Sizes{1, 3, name == "swiglu" ? 4 : 8}));
    }
  }
  Arguments conv = Valid("depthwise_conv2d");
  conv[4].integer = 2;
  conv.back().dynamism = TensorShapeDynamism::DYNAMIC_BOUND;
  ASSERT_EQ(Call("depthwise_conv2d", conv), Error::Ok);
  EXPECT_EQ(conv.back().sizes, (Sizes{1, 4, 5}));
}

TEST_F(StatelessOperatorsTest, TakeNoRowsAndAnyRank) {
  for (const Sizes& sizes : {Sizes{0, 8}, Sizes{8}, Sizes{1, 1, 2, 1, 8}}) {
    Arguments norm = {Argument::Floats(sizes), Argument::Floats({8}), Argument::Double(1e-5),
                      Argument::Floats(sizes)};
    EXPECT_EQ(Call("rms_norm", norm), Error::Ok);
    Sizes half = sizes;
    half.back() = 4;
    Arguments swiglu = {Argument::Floats(sizes), Argument::Floats(half)};
    EXPECT_EQ(Call("swiglu", swiglu), Error::Ok);
    Arguments gelu = {Argument::Floats(sizes), Argument::Floats(sizes)};
    EXPECT_EQ(Call("quick_gelu", gelu), Error::Ok);
  }
  Arguments scalar = {Argument::Floats({}), Argument::Floats({})};
  EXPECT_EQ(Call("quick_gelu", scalar), Error::Ok);
  EXPECT_NEAR(scalar[1].data[0], 0.25 / (1 + std::exp(-1.702 * 0.25)), 1e-6);
}

// torch exports such strides after permuting; they lie in memory as any others do.
TEST_F(StatelessOperatorsTest, TakeAnyOrderOfDimensionsOfSizeOne) {
  Arguments arguments = {Argument::Floats({1, 5, 1}), Argument::Floats({1, 5, 1})};
  arguments[0].dim_order = {1, 0, 2};
  ASSERT_EQ(Call("quick_gelu", arguments), Error::Ok);
  arguments[0].dim_order = {2, 0, 1};
  ASSERT_EQ(Call("quick_gelu", arguments), Error::Ok);
}

struct Mistake {
  std::string name;
  std::string op;
  std::function<void(Arguments&)> make;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class StatelessMistakeTest : public StatelessOperatorsTest,
                             public ::testing::WithParamInterface<Mistake> {};

TEST_P(StatelessMistakeTest, IsRejectedAndNothingIsWritten) {
  Arguments arguments = Valid(GetParam().op);
  GetParam().make(arguments);
  const Arguments before = arguments;
  EXPECT_EQ(Call(GetParam().op, arguments), Error::InvalidArgument);
  for (size_t i = 0; i < arguments.size(); ++i) EXPECT_EQ(arguments[i].data, before[i].data);
}

std::function<void(Arguments&)> Resized(size_t argument, Sizes sizes) {
  return [=](Arguments& a) { a[argument].SetSizes(sizes); };
}
std::function<void(Arguments&)> Retyped(size_t argument, ScalarType type) {
  return [=](Arguments& a) { a[argument].type = type; };
}
std::function<void(Arguments&)> Permuted(size_t argument) {
  return [=](Arguments& a) { std::swap(a[argument].dim_order[0], a[argument].dim_order[1]); };
}
std::function<void(Arguments&)> Number(size_t argument, double value) {
  return [=](Arguments& a) {
    a[argument].real = value;
    a[argument].integer = static_cast<int64_t>(value);
  };
}

const double kHuge = std::numeric_limits<double>::infinity();

const Mistake kMistakes[] = {
    {"NormOfDouble", "rms_norm", Retyped(0, ScalarType::Double)},
    {"NormOfScalar", "rms_norm", Resized(0, {})},
    {"NormOfNothing", "rms_norm", Resized(0, {2, 0})},
    {"NormNotContiguous", "rms_norm", Permuted(0)},
    {"NormWithWeightOfDouble", "rms_norm", Retyped(1, ScalarType::Double)},
    {"NormWithShortWeight", "rms_norm", Resized(1, {7})},
    {"NormWithWeightOfTwoDimensions", "rms_norm", Resized(1, {1, 8})},
    {"NormWithNegativeEps", "rms_norm", Number(2, -1e-6)},
    {"NormWithInfiniteEps", "rms_norm", Number(2, kHuge)},
    {"NormIntoDouble", "rms_norm", Retyped(3, ScalarType::Double)},
    {"NormIntoAnotherShape", "rms_norm", Resized(3, {2, 3, 7})},
    {"NormIntoAnotherRank", "rms_norm", Resized(3, {6, 8})},
    {"NormIntoNotContiguous", "rms_norm", Permuted(3)},
    {"LayerNormWithShortBias", "layer_norm", Resized(2, {7})},
    {"LayerNormWithBiasOfDouble", "layer_norm", Retyped(2, ScalarType::Double)},
    {"LayerNormWithNegativeEps", "layer_norm", Number(3, -1)},
    {"AddOfAnotherShape", "add_rms_norm", Resized(1, {2, 2, 8})},
    {"AddOfAnotherRank", "add_rms_norm", Resized(1, {6, 8})},
    {"AddOfDouble", "add_rms_norm", Retyped(1, ScalarType::Double)},
    {"AddNotContiguous", "add_rms_norm", Permuted(1)},
    {"AddIntoDouble", "add_rms_norm", Retyped(4, ScalarType::Double)},
    {"AddIntoAnotherShape", "add_rms_norm", Resized(4, {2, 2, 8})},
    {"AddNormIntoAnotherShape", "add_rms_norm", Resized(5, {2, 2, 8})},
    {"AddLayerNormWithShortBias", "add_layer_norm", Resized(3, {7})},
    {"AddLayerNormIntoDouble", "add_layer_norm", Retyped(6, ScalarType::Double)},
    {"SwigluOfDouble", "swiglu", Retyped(0, ScalarType::Double)},
    {"SwigluOfScalar", "swiglu", Resized(0, {})},
    {"SwigluOfNothing", "swiglu", Resized(0, {2, 3, 0})},
    {"SwigluOfOddWidth", "swiglu", Resized(0, {2, 3, 7})},
    {"SwigluNotContiguous", "swiglu", Permuted(0)},
    {"SwigluIntoItsInputsShape", "swiglu", Resized(1, {2, 3, 2})},
    {"GeluOfDouble", "quick_gelu", Retyped(0, ScalarType::Double)},
    {"GeluNotContiguous", "quick_gelu", Permuted(0)},
    {"GeluIntoAnotherShape", "quick_gelu", Resized(1, {2, 3, 7})},
    {"ConvOfDouble", "depthwise_conv2d", Retyped(0, ScalarType::Double)},
    {"ConvOfAnotherRank", "depthwise_conv2d", Resized(0, {6, 5})},
    {"ConvOfNothing", "depthwise_conv2d", Resized(0, {1, 0, 5})},
    {"ConvWithOtherChannels", "depthwise_conv2d", Resized(1, {3, 2, 4})},
    {"ConvWithWeightOfTwoDimensions", "depthwise_conv2d", Resized(1, {6, 5})},
    {"ConvWithEmptyKernel", "depthwise_conv2d", Resized(1, {0, 2, 5})},
    {"ConvWithShortBias", "depthwise_conv2d", Resized(2, {4})},
    {"ConvWithBiasOfDouble", "depthwise_conv2d", Retyped(2, ScalarType::Double)},
    {"ConvOnGridThatDoesNotDivide", "depthwise_conv2d", Number(3, 4)},
    {"ConvOnGridWiderThanTokens", "depthwise_conv2d", Number(3, 12)},
    {"ConvOnGridOfNoWidth", "depthwise_conv2d", Number(3, 0)},
    {"ConvOnGridOfNegativeWidth", "depthwise_conv2d", Number(3, -2)},
    {"ConvWithoutStride", "depthwise_conv2d", Number(4, 0)},
    {"ConvWithNegativePadding", "depthwise_conv2d", Number(5, -1)},
    {"ConvWithPaddingOfAKernel", "depthwise_conv2d", Number(5, 2)},
    {"ConvWithHugePadding", "depthwise_conv2d", Number(5, 9e18)},
    {"ConvWithTooLargeAKernel", "depthwise_conv2d",
     [](Arguments& a) {
       a[3].integer = 6;  // one row
       a[5].integer = 0;
     }},
    {"ConvIntoAnotherShape", "depthwise_conv2d", Resized(6, {1, 8, 5})},
};

INSTANTIATE_TEST_SUITE_P(All, StatelessMistakeTest, ::testing::ValuesIn(kMistakes),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mvlm

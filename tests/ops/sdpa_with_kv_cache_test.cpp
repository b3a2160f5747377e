// The operator as ExecuTorch sees it: found in the registry, called with EValues, errors reported
// through the context.

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

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
using executorch::runtime::MemoryAllocator;
using executorch::runtime::Span;

// A tensor and everything that it points to. Each element has room for 8 bytes, so that a test may
// change the type.
class OwnedTensor {
 public:
  OwnedTensor(std::vector<SizesType> sizes, ScalarType type, float fill = 0.0f)
      : sizes_(std::move(sizes)), type_(type) {
    size_t count = 1;
    for (const SizesType size : sizes_) count *= static_cast<size_t>(size);
    floats_.assign(2 * count, fill);
    for (size_t i = 0; i < sizes_.size(); ++i) dim_order_.push_back(static_cast<DimOrderType>(i));
    Build();
  }
  OwnedTensor(const OwnedTensor&) = delete;

  void SetType(ScalarType type) {
    type_ = type;
    Build();
  }
  void SetSizes(std::vector<SizesType> sizes) {  // no larger than at first
    sizes_ = std::move(sizes);
    dim_order_.clear();
    for (size_t i = 0; i < sizes_.size(); ++i) dim_order_.push_back(static_cast<DimOrderType>(i));
    Build();
  }
  void SetDimOrder(std::vector<DimOrderType> dim_order) {
    dim_order_ = std::move(dim_order);
    Build();
  }
  // Lets the tensor be resized up to its present shape.
  void MakeResizable() {
    dynamism_ = TensorShapeDynamism::DYNAMIC_BOUND;
    Build();
  }
  void ShareDataWith(const OwnedTensor& other) { impl_->set_data(other.impl_->mutable_data()); }

  float* floats() { return floats_.data(); }
  std::vector<float> contents() const { return floats_; }
  Tensor tensor() { return Tensor(&*impl_); }

 private:
  void Build() {
    strides_.assign(sizes_.size(), 1);
    for (size_t i = sizes_.size(); i-- > 1;) {
      strides_[dim_order_[i - 1]] = strides_[dim_order_[i]] * sizes_[dim_order_[i]];
    }
    impl_.emplace(type_, sizes_.size(), sizes_.data(), floats_.data(), dim_order_.data(),
                  strides_.data(), dynamism_);
  }

  std::vector<SizesType> sizes_;
  ScalarType type_;
  TensorShapeDynamism dynamism_ = TensorShapeDynamism::STATIC;
  std::vector<float> floats_;
  std::vector<DimOrderType> dim_order_;
  std::vector<StridesType> strides_;
  std::optional<TensorImpl> impl_;
};

constexpr int kTokens = 3, kHeads = 4, kKvHeads = 2, kDim = 8, kCapacity = 10;

// Arguments of a valid call, for a test to spoil.
struct Arguments {
  OwnedTensor query{{1, kTokens, kHeads, kDim}, ScalarType::Float, 0.5f};
  OwnedTensor key{{1, kTokens, kKvHeads, kDim}, ScalarType::Float, 0.25f};
  OwnedTensor value{{1, kTokens, kKvHeads, kDim}, ScalarType::Float, 2.0f};
  OwnedTensor key_cache{{1, kKvHeads, kCapacity, kDim}, ScalarType::Float, 7.0f};
  OwnedTensor value_cache{{1, kKvHeads, kCapacity, kDim}, ScalarType::Float, 7.0f};
  OwnedTensor start_pos{{1}, ScalarType::Long};
  std::optional<double> scale;
  OwnedTensor out{{1, kTokens, kHeads, kDim}, ScalarType::Float, -1.0f};

  void SetStartPos(int64_t position) { *start_pos.tensor().mutable_data_ptr<int64_t>() = position; }
};

class OperatorTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { executorch::runtime::runtime_init(); }

  // Calls the operator and returns what it reported.
  static Error Call(Arguments& arguments, bool with_allocator = true) {
    const auto function = executorch::runtime::get_op_function_from_registry(
        "mvlm::sdpa_with_kv_cache.out", Span<const executorch::runtime::TensorMeta>());
    if (!function.ok()) return function.error();
    EValue values[] = {
        EValue(arguments.query.tensor()),
        EValue(arguments.key.tensor()),
        EValue(arguments.value.tensor()),
        EValue(arguments.key_cache.tensor()),
        EValue(arguments.value_cache.tensor()),
        EValue(arguments.start_pos.tensor()),
        arguments.scale ? EValue(*arguments.scale) : EValue(),
        EValue(arguments.out.tensor()),
    };
    std::vector<EValue*> stack;
    for (EValue& value : values) stack.push_back(&value);
    std::vector<uint8_t> memory(1 << 20);
    MemoryAllocator allocator(static_cast<uint32_t>(memory.size()), memory.data());
    KernelRuntimeContext context(nullptr, with_allocator ? &allocator : nullptr);
    (*function)(context, Span<EValue*>(stack.data(), stack.size()));
    return context.failure_state();
  }
};

TEST_F(OperatorTest, AttendsAndWritesTheCaches) {
  Arguments arguments;
  ASSERT_EQ(Call(arguments), Error::Ok);
  for (int i = 0; i < kTokens * kHeads * kDim; ++i) ASSERT_EQ(arguments.out.floats()[i], 2.0f);
  for (int head = 0; head < kKvHeads; ++head) {
    for (int i = 0; i < kCapacity * kDim; ++i) {
      const bool written = i < kTokens * kDim;
      ASSERT_EQ(arguments.key_cache.floats()[head * kCapacity * kDim + i], written ? 0.25f : 7.0f);
      ASSERT_EQ(arguments.value_cache.floats()[head * kCapacity * kDim + i], written ? 2.0f : 7.0f);
    }
  }
}

TEST_F(OperatorTest, DefaultScaleIsOneOverRootOfHeadDim) {
  // Two visible keys whose products with the query differ by 0.5 * 8 = 4.
  const auto second_output = [](std::optional<double> scale) {
    Arguments arguments;
    std::fill_n(arguments.key.floats(), kKvHeads * kDim, 1.25f);
    std::fill_n(arguments.value.floats(), kKvHeads * kDim, 1.0f);
    arguments.scale = scale;
    EXPECT_EQ(Call(arguments), Error::Ok);
    return arguments.out.floats()[kHeads * kDim];
  };
  const auto expected = [](double scale) { return 1.0 + 1.0 / (1.0 + std::exp(4.0 * scale)); };
  EXPECT_NEAR(second_output(std::nullopt), expected(1.0 / std::sqrt(8.0)), 1e-6);
  EXPECT_NEAR(second_output(1.0), expected(1.0), 1e-6);
}

TEST_F(OperatorTest, ResizesOut) {
  Arguments arguments;
  arguments.out.MakeResizable();
  arguments.query.SetSizes({1, 2, kHeads, kDim});
  arguments.key.SetSizes({1, 2, kKvHeads, kDim});
  arguments.value.SetSizes({1, 2, kKvHeads, kDim});
  ASSERT_EQ(Call(arguments), Error::Ok);
  EXPECT_EQ(arguments.out.tensor().size(1), 2);
  EXPECT_EQ(arguments.out.floats()[2 * kHeads * kDim - 1], 2.0f);
  EXPECT_EQ(arguments.out.floats()[2 * kHeads * kDim], -1.0f);
}

TEST_F(OperatorTest, LastPositionsAreAllowed) {
  Arguments arguments;
  arguments.SetStartPos(kCapacity - kTokens);
  EXPECT_EQ(Call(arguments), Error::Ok);
}

TEST_F(OperatorTest, NeedsATempAllocator) {
  Arguments arguments;
  const std::vector<float> before = arguments.key_cache.contents();
  EXPECT_EQ(Call(arguments, /*with_allocator=*/false), Error::NotFound);
  EXPECT_EQ(arguments.key_cache.contents(), before);
}

struct Mistake {
  std::string name;
  std::function<void(Arguments&)> make;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class MistakeTest : public OperatorTest, public ::testing::WithParamInterface<Mistake> {};

TEST_P(MistakeTest, IsRejectedAndNothingIsTouched) {
  Arguments arguments;
  GetParam().make(arguments);
  const std::vector<float> key_cache = arguments.key_cache.contents();
  const std::vector<float> value_cache = arguments.value_cache.contents();
  const std::vector<float> out = arguments.out.contents();
  EXPECT_EQ(Call(arguments), Error::InvalidArgument);
  EXPECT_EQ(arguments.key_cache.contents(), key_cache);
  EXPECT_EQ(arguments.value_cache.contents(), value_cache);
  EXPECT_EQ(arguments.out.contents(), out);
}

const Mistake kMistakes[] = {
    {"NegativePosition", [](Arguments& a) { a.SetStartPos(-1); }},
    {"LowestPosition", [](Arguments& a) { a.SetStartPos(std::numeric_limits<int64_t>::min()); }},
    {"PositionTooLarge", [](Arguments& a) { a.SetStartPos(kCapacity - kTokens + 1); }},
    {"HighestPosition", [](Arguments& a) { a.SetStartPos(std::numeric_limits<int64_t>::max()); }},
    {"PositionOfAnotherType", [](Arguments& a) { a.start_pos.SetType(ScalarType::Int); }},
    {"PositionOfAnotherRank",
     [](Arguments& a) {
       a.start_pos.SetSizes({1, 1});
     }},
    {"ScalarPosition", [](Arguments& a) { a.start_pos.SetSizes({}); }},
    {"NoTokens",
     [](Arguments& a) {
       a.query.SetSizes({1, 0, kHeads, kDim});
       a.key.SetSizes({1, 0, kKvHeads, kDim});
       a.value.SetSizes({1, 0, kKvHeads, kDim});
     }},
    {"MoreTokensThanCapacity",
     [](Arguments& a) {
       a.key_cache.SetSizes({1, kKvHeads, 2, kDim});
       a.value_cache.SetSizes({1, kKvHeads, 2, kDim});
     }},
    {"QueryOfAnotherType", [](Arguments& a) { a.query.SetType(ScalarType::Double); }},
    {"KeyOfAnotherType", [](Arguments& a) { a.key.SetType(ScalarType::Half); }},
    {"CacheOfAnotherType", [](Arguments& a) { a.value_cache.SetType(ScalarType::Half); }},
    {"OutOfAnotherType", [](Arguments& a) { a.out.SetType(ScalarType::Double); }},
    {"QueryOfAnotherRank",
     [](Arguments& a) {
       a.query.SetSizes({kTokens, kHeads, kDim});
     }},
    {"BatchOfTwo",
     [](Arguments& a) {
       a.query.SetSizes({2, 1, kHeads, kDim});
     }},
    {"KeyOfAnotherLength",
     [](Arguments& a) {
       a.key.SetSizes({1, 2, kKvHeads, kDim});
     }},
    {"KeyOfAnotherHeadDim",
     [](Arguments& a) {
       a.key.SetSizes({1, kTokens, kKvHeads, 4});
     }},
    {"ValueOfAnotherShape",
     [](Arguments& a) {
       a.value.SetSizes({1, kTokens, 1, kDim});
     }},
    {"HeadsThatDoNotDivide",
     [](Arguments& a) {
       a.query.SetSizes({1, kTokens, 3, kDim});
     }},
    {"CacheOfOtherHeads",
     [](Arguments& a) {
       a.key_cache.SetSizes({1, 1, kCapacity, kDim});
       a.value_cache.SetSizes({1, 1, kCapacity, kDim});
     }},
    {"CachesThatDiffer",
     [](Arguments& a) {
       a.value_cache.SetSizes({1, kKvHeads, 5, kDim});
     }},
    {"OneCacheForBoth", [](Arguments& a) { a.value_cache.ShareDataWith(a.key_cache); }},
    {"QueryNotContiguous",
     [](Arguments& a) {
       a.query.SetDimOrder({0, 2, 1, 3});
     }},
    {"CacheNotContiguous",
     [](Arguments& a) {
       a.key_cache.SetDimOrder({0, 2, 1, 3});
     }},
    {"OutOfAnotherShape",
     [](Arguments& a) {
       a.out.SetSizes({1, 2, kHeads, kDim});
     }},
    {"ZeroScale", [](Arguments& a) { a.scale = 0.0; }},
    {"NegativeScale", [](Arguments& a) { a.scale = -1.0; }},
    {"InfiniteScale", [](Arguments& a) { a.scale = std::numeric_limits<double>::infinity(); }},
};

INSTANTIATE_TEST_SUITE_P(All, MistakeTest, ::testing::ValuesIn(kMistakes),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mvlm

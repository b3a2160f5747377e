// The attention operators as ExecuTorch sees them: found in the registry, called with EValues,
// errors reported through the context.

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/memory_allocator.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
constexpr int kPacked = kHeads + 2 * kKvHeads;

// Arguments of a valid call, for a test to spoil. Queries are 0.5, keys 0.25 and values 2, and
// nothing is rotated: all cosines are 1 and all sines 0.
struct Arguments {
  Arguments() {
    for (int token = 0; token < kTokens; ++token) SetToken(token, 0.5f, 0.25f, 2.0f);
  }

  void SetToken(int token, float query, float key, float value) {
    float* const x = qkv.floats() + token * kPacked * kDim;
    std::fill_n(x, kHeads * kDim, query);
    std::fill_n(x + kHeads * kDim, kKvHeads * kDim, key);
    std::fill_n(x + (kHeads + kKvHeads) * kDim, kKvHeads * kDim, value);
  }
  void SetStartPos(int64_t position) { *start_pos.tensor().mutable_data_ptr<int64_t>() = position; }
  void SetCacheType(ScalarType type) {
    key_cache.SetType(type);
    value_cache.SetType(type);
  }
  void SetCacheSizes(std::vector<SizesType> sizes) {
    key_cache.SetSizes(sizes);
    value_cache.SetSizes(sizes);
  }
  std::vector<std::vector<float>> Contents() const {
    return {key_cache.contents(), value_cache.contents(), key_scales.contents(),
            value_scales.contents(), out.contents()};
  }

  OwnedTensor qkv{{1, kTokens, kPacked* kDim}, ScalarType::Float};
  OwnedTensor key_cache{{1, kKvHeads, kCapacity, kDim}, ScalarType::Float, 7.0f};
  OwnedTensor value_cache{{1, kKvHeads, kCapacity, kDim}, ScalarType::Float, 7.0f};
  OwnedTensor key_scales{{1, kKvHeads, kCapacity}, ScalarType::Float, 7.0f};
  OwnedTensor value_scales{{1, kKvHeads, kCapacity}, ScalarType::Float, 7.0f};
  OwnedTensor cos{{1 + kCapacity, kDim / 2}, ScalarType::Float, 1.0f};
  OwnedTensor sin{{1 + kCapacity, kDim / 2}, ScalarType::Float, 0.0f};
  OwnedTensor start_pos{{1}, ScalarType::Long};
  int64_t heads = kHeads;
  std::optional<double> scale;
  OwnedTensor out{{1, kTokens, kHeads* kDim}, ScalarType::Float, -1.0f};
};

enum class Operator { kFloatCache, kInt8Cache, kAttention };

class OperatorTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { executorch::runtime::runtime_init(); }

  // Calls the operator and returns what it reported.
  static Error Call(Arguments& arguments, Operator which = Operator::kFloatCache,
                    bool with_allocator = true) {
    std::vector<EValue> values;
    values.emplace_back(arguments.qkv.tensor());
    if (which != Operator::kAttention) {
      values.emplace_back(arguments.key_cache.tensor());
      if (which == Operator::kInt8Cache) values.emplace_back(arguments.key_scales.tensor());
      values.emplace_back(arguments.value_cache.tensor());
      if (which == Operator::kInt8Cache) values.emplace_back(arguments.value_scales.tensor());
      values.emplace_back(arguments.cos.tensor());
      values.emplace_back(arguments.sin.tensor());
      values.emplace_back(arguments.start_pos.tensor());
    }
    values.emplace_back(arguments.heads);
    values.push_back(arguments.scale ? EValue(*arguments.scale) : EValue());
    values.emplace_back(arguments.out.tensor());
    const char* const name = which == Operator::kFloatCache  ? "mvlm::sdpa_with_kv_cache.out"
                             : which == Operator::kInt8Cache ? "mvlm::sdpa_with_int8_kv_cache.out"
                                                             : "mvlm::attention.out";
    const auto function = executorch::runtime::get_op_function_from_registry(
        name, Span<const executorch::runtime::TensorMeta>());
    if (!function.ok()) return function.error();
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

TEST_F(OperatorTest, AttendsAndWritesFloat16Caches) {
  Arguments arguments;
  arguments.SetCacheType(ScalarType::Half);
  ASSERT_EQ(Call(arguments), Error::Ok);
  for (int i = 0; i < kTokens * kHeads * kDim; ++i) ASSERT_EQ(arguments.out.floats()[i], 2.0f);
  uint16_t written[2];  // the last of position kTokens - 1, and the first after it, 7.0f untouched
  const void* const cache = arguments.key_cache.floats();
  std::memcpy(written, static_cast<const uint16_t*>(cache) + kTokens * kDim - 1, sizeof(written));
  EXPECT_EQ(written[0], 0x3400);  // 0.25
  EXPECT_EQ(written[1], 0);       // the low half of 7.0f
}

TEST_F(OperatorTest, AttendsAndWritesInt8Caches) {
  Arguments arguments;
  arguments.SetCacheType(ScalarType::Char);
  ASSERT_EQ(Call(arguments, Operator::kInt8Cache), Error::Ok);
  for (int i = 0; i < kTokens * kHeads * kDim; ++i) ASSERT_NEAR(arguments.out.floats()[i], 2, 1e-6);
  const void* const cache = arguments.value_cache.floats();
  EXPECT_EQ(static_cast<const int8_t*>(cache)[kTokens * kDim - 1], 127);
  EXPECT_EQ(static_cast<const int8_t*>(cache)[kTokens * kDim], 0);  // the lowest byte of 7.0f
  for (int i = 0; i < kKvHeads * kCapacity; ++i) {
    const bool written = i % kCapacity < kTokens;
    ASSERT_EQ(arguments.key_scales.floats()[i], written ? 0.25f / 127.0f : 7.0f);
    ASSERT_EQ(arguments.value_scales.floats()[i], written ? 2.0f / 127.0f : 7.0f);
  }
}

TEST_F(OperatorTest, RotatesByTheRowsOfItsPositions) {
  Arguments arguments;
  arguments.SetStartPos(4);
  std::fill_n(arguments.cos.floats() + 5 * kDim / 2, kDim / 2, 0.0f);
  std::fill_n(arguments.sin.floats() + 5 * kDim / 2, kDim / 2, 1.0f);
  ASSERT_EQ(Call(arguments), Error::Ok);
  for (int position = 4; position < 7; ++position) {
    for (int i = 0; i < kDim; ++i) {  // a quarter turn: (x, y) becomes (-y, x)
      ASSERT_EQ(arguments.key_cache.floats()[position * kDim + i],
                position == 5 && i < kDim / 2 ? -0.25f : 0.25f);
    }
  }
}

TEST_F(OperatorTest, DefaultScaleIsOneOverRootOfHeadDim) {
  // Two visible keys whose products with the query differ by 0.5 * 8 = 4.
  const auto second_output = [](std::optional<double> scale) {
    Arguments arguments;
    arguments.SetToken(0, 0.5f, 1.25f, 1.0f);
    arguments.scale = scale;
    EXPECT_EQ(Call(arguments), Error::Ok);
    return arguments.out.floats()[kHeads * kDim];
  };
  const auto expected = [](double scale) { return 1.0 + 1.0 / (1.0 + std::exp(4.0 * scale)); };
  EXPECT_NEAR(second_output(std::nullopt), expected(1.0 / std::sqrt(8.0)), 1e-6);
  EXPECT_NEAR(second_output(1.0), expected(1.0), 1e-6);
}

TEST_F(OperatorTest, AttentionSeesEveryToken) {
  for (const std::optional<double> scale : {std::optional<double>(), std::optional<double>(1.0)}) {
    Arguments arguments;
    arguments.heads = 2;
    arguments.scale = scale;
    arguments.qkv.SetSizes({1, kTokens, 6 * kDim});
    arguments.out.SetSizes({1, kTokens, 2 * kDim});
    for (int token = 0; token < kTokens; ++token) {
      float* const x = arguments.qkv.floats() + token * 6 * kDim;
      std::fill_n(x, 2 * kDim, 0.5f);
      std::fill_n(x + 2 * kDim, 2 * kDim, token == 2 ? 1.25f : 0.25f);
      std::fill_n(x + 4 * kDim, 2 * kDim, token == 2 ? 1.0f : 2.0f);
    }
    ASSERT_EQ(Call(arguments, Operator::kAttention), Error::Ok);
    const double high = std::exp(4.0 * scale.value_or(1.0 / std::sqrt(8.0)));
    for (int i = 0; i < kTokens * 2 * kDim; ++i) {
      ASSERT_NEAR(arguments.out.floats()[i], 1.0 + 2.0 / (2.0 + high), 1e-6);
    }
    EXPECT_EQ(arguments.out.floats()[kTokens * 2 * kDim], -1.0f);
  }
}

TEST_F(OperatorTest, ResizesOut) {
  Arguments arguments;
  arguments.out.MakeResizable();
  arguments.qkv.SetSizes({1, 2, kPacked * kDim});
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
  const auto before = arguments.key_cache.contents();
  EXPECT_EQ(Call(arguments, Operator::kFloatCache, /*with_allocator=*/false), Error::NotFound);
  EXPECT_EQ(arguments.key_cache.contents(), before);
}

struct Mistake {
  std::string name;
  std::function<void(Arguments&)> make;
  Operator which = Operator::kFloatCache;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class MistakeTest : public OperatorTest, public ::testing::WithParamInterface<Mistake> {};

TEST_P(MistakeTest, IsRejectedAndNothingIsTouched) {
  Arguments arguments;
  if (GetParam().which == Operator::kInt8Cache) arguments.SetCacheType(ScalarType::Char);
  if (GetParam().which == Operator::kAttention) {
    arguments.heads = 2;
    arguments.qkv.SetSizes({1, kTokens, 6 * kDim});
    arguments.out.SetSizes({1, kTokens, 2 * kDim});
  }
  GetParam().make(arguments);
  const auto before = arguments.Contents();
  EXPECT_EQ(Call(arguments, GetParam().which), Error::InvalidArgument);
  EXPECT_EQ(arguments.Contents(), before);
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
       a.qkv.SetSizes({1, 0, kPacked * kDim});
     }},
    {"MoreTokensThanCapacity",
     [](Arguments& a) {
       a.SetCacheSizes({1, kKvHeads, 2, kDim});
     }},
    {"QkvOfAnotherType", [](Arguments& a) { a.qkv.SetType(ScalarType::Double); }},
    {"QkvOfAnotherRank",
     [](Arguments& a) {
       a.qkv.SetSizes({kTokens, kPacked * kDim});
     }},
    {"QkvOfAnotherWidth",
     [](Arguments& a) {
       a.qkv.SetSizes({1, kTokens, kPacked * kDim - 1});
     }},
    {"QkvOfOtherHeads",
     [](Arguments& a) {
       a.qkv.SetSizes({1, kTokens, (kPacked - 1) * kDim});
     }},
    {"QkvNotContiguous",
     [](Arguments& a) {
       a.qkv.SetDimOrder({0, 2, 1});
     }},
    {"BatchOfTwo",
     [](Arguments& a) {
       a.qkv.SetSizes({2, 1, kPacked * kDim});
     }},
    {"CachesOfAnotherType", [](Arguments& a) { a.SetCacheType(ScalarType::Char); }},
    {"CachesOfTwoTypes", [](Arguments& a) { a.value_cache.SetType(ScalarType::Half); }},
    {"CacheOfAnotherRank",
     [](Arguments& a) {
       a.SetCacheSizes({kKvHeads, kCapacity, kDim});
     }},
    {"CacheOfOddHeadDim",
     [](Arguments& a) {
       a.SetCacheSizes({1, kKvHeads, kCapacity, 7});
       a.qkv.SetSizes({1, kTokens, kPacked * 7});
     }},
    {"CacheOfOtherHeads",
     [](Arguments& a) {
       a.SetCacheSizes({1, 1, kCapacity, kDim});
     }},
    {"CachesThatDiffer",
     [](Arguments& a) {
       a.value_cache.SetSizes({1, kKvHeads, 5, kDim});
     }},
    {"OneCacheForBoth", [](Arguments& a) { a.value_cache.ShareDataWith(a.key_cache); }},
    {"CacheNotContiguous",
     [](Arguments& a) {
       a.key_cache.SetDimOrder({0, 2, 1, 3});
     }},
    {"HeadsThatDoNotDivide", [](Arguments& a) { a.heads = 3; }},
    {"NoHeads", [](Arguments& a) { a.heads = 0; }},
    {"NegativeHeads", [](Arguments& a) { a.heads = -4; }},
    {"VeryManyHeads", [](Arguments& a) { a.heads = std::numeric_limits<int64_t>::max() - 1; }},
    {"FewCosines",
     [](Arguments& a) {
       a.cos.SetSizes({kCapacity - 1, kDim / 2});
     }},
    {"WideCosines",
     [](Arguments& a) {
       a.cos.SetSizes({kCapacity / 2, kDim});
     }},
    {"SinesOfAnotherType", [](Arguments& a) { a.sin.SetType(ScalarType::Half); }},
    {"SinesOfAnotherRank", [](Arguments& a) { a.sin.SetSizes({kCapacity * kDim / 2}); }},
    {"OutOfAnotherType", [](Arguments& a) { a.out.SetType(ScalarType::Double); }},
    {"OutOfAnotherShape",
     [](Arguments& a) {
       a.out.SetSizes({1, 2, kHeads * kDim});
     }},
    {"ZeroScale", [](Arguments& a) { a.scale = 0.0; }},
    {"NegativeScale", [](Arguments& a) { a.scale = -1.0; }},
    {"InfiniteScale", [](Arguments& a) { a.scale = std::numeric_limits<double>::infinity(); }},

    {"Int8KeysOfAnotherType", [](Arguments& a) { a.key_cache.SetType(ScalarType::Float); },
     Operator::kInt8Cache},
    {"Int8ValuesOfAnotherType", [](Arguments& a) { a.value_cache.SetType(ScalarType::Byte); },
     Operator::kInt8Cache},
    {"Int8PositionTooLarge", [](Arguments& a) { a.SetStartPos(kCapacity - kTokens + 1); },
     Operator::kInt8Cache},
    {"Int8ScalesOfAnotherType", [](Arguments& a) { a.key_scales.SetType(ScalarType::Half); },
     Operator::kInt8Cache},
    {"Int8ScalesOfAnotherShape",
     [](Arguments& a) {
       a.value_scales.SetSizes({1, kKvHeads, kCapacity - 1});
     },
     Operator::kInt8Cache},
    {"Int8ScalesOfOtherHeads",
     [](Arguments& a) {
       a.key_scales.SetSizes({1, 1, kCapacity});
     },
     Operator::kInt8Cache},
    {"Int8OneScalesForBoth", [](Arguments& a) { a.value_scales.ShareDataWith(a.key_scales); },
     Operator::kInt8Cache},

    {"AttentionOfAnotherType", [](Arguments& a) { a.qkv.SetType(ScalarType::Double); },
     Operator::kAttention},
    {"AttentionOfAnotherRank",
     [](Arguments& a) {
       a.qkv.SetSizes({kTokens, 6 * kDim});
     },
     Operator::kAttention},
    {"AttentionBatchOfTwo",
     [](Arguments& a) {
       a.qkv.SetSizes({2, 1, 6 * kDim});
     },
     Operator::kAttention},
    {"AttentionOfNoTokens",
     [](Arguments& a) {
       a.qkv.SetSizes({1, 0, 6 * kDim});
     },
     Operator::kAttention},
    {"AttentionNotContiguous",
     [](Arguments& a) {
       a.qkv.SetDimOrder({0, 2, 1});
     },
     Operator::kAttention},
    {"AttentionHeadsThatDoNotDivide", [](Arguments& a) { a.heads = 5; }, Operator::kAttention},
    {"AttentionNoHeads", [](Arguments& a) { a.heads = 0; }, Operator::kAttention},
    {"AttentionVeryManyHeads", [](Arguments& a) { a.heads = std::numeric_limits<int64_t>::max(); },
     Operator::kAttention},
    {"AttentionOutOfAnotherShape",
     [](Arguments& a) {
       a.out.SetSizes({1, kTokens, kDim});
     },
     Operator::kAttention},
    {"AttentionScale", [](Arguments& a) { a.scale = -1.0; }, Operator::kAttention},
};

INSTANTIATE_TEST_SUITE_P(All, MistakeTest, ::testing::ValuesIn(kMistakes),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace mvlm

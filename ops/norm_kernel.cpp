// The SIMD kernels. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.
//
// A row is read two or three times, but comes from memory once: it stays in the first-level cache.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "norm_kernel.cpp"
#include "norm_kernel.h"

#include <cmath>
#include <cstddef>

#include "hwy/foreach_target.h"  // IWYU pragma: keep; must come before highway.h
#include "hwy/highway.h"
#include "simd_math-inl.h"  // must come after foreach_target.h

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

// Capped so that the buffers of incomplete vectors have a size at compile time.
using Tag = hn::CappedTag<float, 16>;
using Vector = hn::Vec<Tag>;

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

// The rows that a call works on. Its sum, if it adds, is written by the first pass over the row;
// the later passes read what values() returns.
class Row {
 public:
  Row(const Norm& call, size_t row)
      : input_(call.input + row * static_cast<size_t>(call.width)),
        residual_(call.residual == nullptr ? nullptr
                                           : call.residual + row * static_cast<size_t>(call.width)),
        sum_(call.residual == nullptr ? nullptr
                                      : call.sum + row * static_cast<size_t>(call.width)) {}

  // A whole vector of the first pass.
  template <bool kAdd>
  HWY_INLINE Vector First(size_t i) const {
    const Tag d;
    const Vector x = hn::LoadU(d, input_ + i);
    if constexpr (!kAdd) return x;
    const Vector sum = hn::Add(x, hn::LoadU(d, residual_ + i));
    hn::StoreU(sum, d, sum_ + i);
    return sum;
  }

  // The incomplete vector of the first pass, with zeros behind its `count` numbers.
  template <bool kAdd>
  HWY_INLINE Vector FirstSome(size_t i, size_t count) const {
    const Tag d;
    const Vector zero = hn::Zero(d);
    const Vector x = LoadSome(d, input_ + i, count, zero);
    if constexpr (!kAdd) return x;
    const Vector sum = hn::Add(x, LoadSome(d, residual_ + i, count, zero));
    StoreSome(sum, d, sum_ + i, count);
    return sum;
  }

  template <bool kAdd>
  HWY_INLINE const float* values() const {
    return kAdd ? sum_ : input_;
  }

 private:
  const float* input_;
  const float* residual_;
  float* sum_;
};

// Sum of four accumulators' lanes.
HWY_INLINE float Total(Vector a, Vector b, Vector c, Vector e) {
  const Tag d;
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

template <bool kAdd>
void RmsNormRows(const Norm& call, size_t begin, size_t end) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = static_cast<size_t>(call.width);
  for (size_t index = begin; index < end; ++index) {
    const Row row(call, index);
    // Four accumulators, because additions take longer to finish than to start.
    Vector s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    size_t i = 0;
    for (; i + 4 * lanes <= width; i += 4 * lanes) {
      const Vector x0 = row.First<kAdd>(i);
      const Vector x1 = row.First<kAdd>(i + lanes);
      const Vector x2 = row.First<kAdd>(i + 2 * lanes);
      const Vector x3 = row.First<kAdd>(i + 3 * lanes);
      s0 = hn::MulAdd(x0, x0, s0);
      s1 = hn::MulAdd(x1, x1, s1);
      s2 = hn::MulAdd(x2, x2, s2);
      s3 = hn::MulAdd(x3, x3, s3);
    }
    for (; i + lanes <= width; i += lanes) {
      const Vector x = row.First<kAdd>(i);
      s0 = hn::MulAdd(x, x, s0);
    }
    if (i < width) {
      const Vector x = row.FirstSome<kAdd>(i, width - i);
      s0 = hn::MulAdd(x, x, s0);
    }
    const float mean_square = Total(s0, s1, s2, s3) / static_cast<float>(width);
    const Vector factor = hn::Set(d, 1.0f / std::sqrt(mean_square + call.eps));

    const float* const x = row.values<kAdd>();
    float* const out = call.out + index * width;
    for (i = 0; i + lanes <= width; i += lanes) {
      const Vector scaled = hn::Mul(hn::LoadU(d, x + i), factor);
      hn::StoreU(hn::Mul(scaled, hn::LoadU(d, call.weight + i)), d, out + i);
    }
    if (i < width) {
      const size_t count = width - i;
      const Vector zero = hn::Zero(d);
      const Vector scaled = hn::Mul(LoadSome(d, x + i, count, zero), factor);
      StoreSome(hn::Mul(scaled, LoadSome(d, call.weight + i, count, zero)), d, out + i, count);
    }
  }
}

// The mean as a float is not precise enough to be subtracted: its rounding error is relative to the
// mean, and the result's to the deviation, which may be much smaller. So a rough mean is subtracted
// first, which is exact where it matters (numbers near each other subtract without rounding), and
// the mean of these differences, which is small, second. Variances do not change with a shift.
template <bool kAdd>
void LayerNormRows(const Norm& call, size_t begin, size_t end) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = static_cast<size_t>(call.width);
  for (size_t index = begin; index < end; ++index) {
    const Row row(call, index);
    // Four accumulators, because additions take longer to finish than to start.
    Vector s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
    size_t i = 0;
    for (; i + 4 * lanes <= width; i += 4 * lanes) {
      s0 = hn::Add(s0, row.First<kAdd>(i));
      s1 = hn::Add(s1, row.First<kAdd>(i + lanes));
      s2 = hn::Add(s2, row.First<kAdd>(i + 2 * lanes));
      s3 = hn::Add(s3, row.First<kAdd>(i + 3 * lanes));
    }
    for (; i + lanes <= width; i += lanes) s0 = hn::Add(s0, row.First<kAdd>(i));
    if (i < width) s0 = hn::Add(s0, row.FirstSome<kAdd>(i, width - i));
    const Vector rough_mean = hn::Set(d, Total(s0, s1, s2, s3) / static_cast<float>(width));

    const float* const x = row.values<kAdd>();
    Vector q0 = hn::Zero(d), q1 = q0;  // sums of squares
    s0 = s1 = q0;
    for (i = 0; i + 2 * lanes <= width; i += 2 * lanes) {
      const Vector x0 = hn::Sub(hn::LoadU(d, x + i), rough_mean);
      const Vector x1 = hn::Sub(hn::LoadU(d, x + i + lanes), rough_mean);
      s0 = hn::Add(s0, x0);
      s1 = hn::Add(s1, x1);
      q0 = hn::MulAdd(x0, x0, q0);
      q1 = hn::MulAdd(x1, x1, q1);
    }
    for (; i < width; i += lanes) {
      const Vector x0 = hn::Sub(
          i + lanes <= width ? hn::LoadU(d, x + i) : LoadSome(d, x + i, width - i, rough_mean),
          rough_mean);
      s0 = hn::Add(s0, x0);
      q0 = hn::MulAdd(x0, x0, q0);
    }
    const double size = static_cast<double>(width);
    const double rest = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1))) / size;
    const double mean_square = hn::GetLane(hn::SumOfLanes(d, hn::Add(q0, q1))) / size;
    // Rounding may leave less than nothing. NaN stays NaN.
    const double variance = mean_square < rest * rest ? 0.0 : mean_square - rest * rest;
    const Vector rest_of_mean = hn::Set(d, static_cast<float>(rest));
    const Vector factor =
        hn::Set(d, static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(call.eps))));

    float* const out = call.out + index * width;
    for (i = 0; i + lanes <= width; i += lanes) {
      const Vector shifted = hn::Sub(hn::Sub(hn::LoadU(d, x + i), rough_mean), rest_of_mean);
      hn::StoreU(hn::MulAdd(hn::Mul(shifted, factor), hn::LoadU(d, call.weight + i),
                            hn::LoadU(d, call.bias + i)),
                 d, out + i);
    }
    if (i < width) {
      const size_t count = width - i;
      const Vector zero = hn::Zero(d);
      const Vector shifted =
          hn::Sub(hn::Sub(LoadSome(d, x + i, count, zero), rough_mean), rest_of_mean);
      StoreSome(hn::MulAdd(hn::Mul(shifted, factor), LoadSome(d, call.weight + i, count, zero),
                           LoadSome(d, call.bias + i, count, zero)),
                d, out + i, count);
    }
  }
}

void RmsNormAny(const Norm& call, size_t begin, size_t end) {
  if (call.residual == nullptr) return RmsNormRows<false>(call, begin, end);
  RmsNormRows<true>(call, begin, end);
}

void LayerNormAny(const Norm& call, size_t begin, size_t end) {
  if (call.residual == nullptr) return LayerNormRows<false>(call, begin, end);
  LayerNormRows<true>(call, begin, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mvlm {
namespace {
HWY_EXPORT(LayerNormAny);
HWY_EXPORT(RmsNormAny);
HWY_EXPORT(TargetName);
}  // namespace

void RmsNorm(const Norm& call, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(RmsNormAny)(call, static_cast<size_t>(begin), static_cast<size_t>(end));
}

void LayerNorm(const Norm& call, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(LayerNormAny)(call, static_cast<size_t>(begin), static_cast<size_t>(end));
}

const char* NormTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace mvlm
#endif  // HWY_ONCE

// Functions of vectors that several kernels need. Include it after hwy/foreach_target.h; Highway
// compiles it once per instruction set, which is why the guard is not an ordinary one.

#if defined(MVLM_OPS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MVLM_OPS_SIMD_MATH_INL_H_
#undef MVLM_OPS_SIMD_MATH_INL_H_
#else
#define MVLM_OPS_SIMD_MATH_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// e^x for |x| <= 87, within 8.5e-8 relatively (measured).
//
// x = n ln 2 + r with integer n and |r| <= ln(2) / 2; e^r is a polynomial and n goes to the
// exponent bits. ln 2 is subtracted in two parts, of which the first has so few bits that its
// products are exact, because the error of r is the relative error of the result (Cody & Waite,
// "Software Manual for the Elementary Functions", 1980). The coefficients are those of expf() in
// Moshier's Cephes library.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const hn::RebindToSigned<D> di;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const V magic = hn::Set(d, 12582912.0f);
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.44269504088896341f), magic);
  const V n = hn::Sub(shifted, magic);
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  V p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}

// x * sigmoid(slope * x) for slope > 0: NaN for NaN, and else finite for finite x, 0 or nearly so
// for -infinity, infinity for infinity.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V TimesSigmoid(D d, V x, float slope) {
  // Past these bounds of slope * x the sigmoid is below 5e-38 or rounds to 1. The comparison lets
  // NaN through to the numerator, which Max does not on every CPU; the denominator may lose it.
  constexpr float kBound = 86.0f;
  const V low = hn::Set(d, -kBound / slope);
  x = hn::IfThenElse(hn::Lt(x, low), low, x);
  const V t = hn::Max(hn::Mul(x, hn::Set(d, -slope)), hn::Set(d, -kBound));
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), Exp(d, t)));
}

// The first `count` lanes from memory, 0 < count < lanes, and `fill` in the others.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V LoadSome(D d, const float* from, size_t count, V fill) {
  HWY_ALIGN float lanes[hn::MaxLanes(d)];
  hn::Store(fill, d, lanes);
  std::memcpy(lanes, from, count * sizeof(float));
  return hn::Load(d, lanes);
}

// Writes the first `count` lanes, 0 < count < lanes.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreSome(V v, D d, float* to, size_t count) {
  HWY_ALIGN float lanes[hn::MaxLanes(d)];
  hn::Store(v, d, lanes);
  std::memcpy(to, lanes, count * sizeof(float));
}

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#endif  // MVLM_OPS_SIMD_MATH_INL_H_

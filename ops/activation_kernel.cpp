// The SIMD kernels. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "activation_kernel.cpp"
#include "activation_kernel.h"

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

HWY_INLINE Vector SwigluOf(Vector gate, Vector up) {
  return hn::Mul(TimesSigmoid(Tag(), gate, 1.0f), up);
}

void SwigluRows(const float* gate_up, size_t begin, size_t end, size_t width, float* out) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  for (size_t row = begin; row < end; ++row) {
    const float* HWY_RESTRICT gate = gate_up + row * 2 * width;
    const float* HWY_RESTRICT up = gate + width;
    float* HWY_RESTRICT to = out + row * width;
    size_t i = 0;
    // Two at once: one is a long chain of operations that wait for each other.
    for (; i + 2 * lanes <= width; i += 2 * lanes) {
      const Vector y0 = SwigluOf(hn::LoadU(d, gate + i), hn::LoadU(d, up + i));
      const Vector y1 = SwigluOf(hn::LoadU(d, gate + i + lanes), hn::LoadU(d, up + i + lanes));
      hn::StoreU(y0, d, to + i);
      hn::StoreU(y1, d, to + i + lanes);
    }
    if (i + lanes <= width) {
      hn::StoreU(SwigluOf(hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, to + i);
      i += lanes;
    }
    if (i < width) {
      const Vector zero = hn::Zero(d);
      const size_t count = width - i;
      StoreSome(SwigluOf(LoadSome(d, gate + i, count, zero), LoadSome(d, up + i, count, zero)), d,
                to + i, count);
    }
  }
}

void QuickGeluRange(const float* HWY_RESTRICT in, size_t begin, size_t end,
                    float* HWY_RESTRICT out) {
  constexpr float kSlope = 1.702f;
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = begin;
  // Two at once, as above.
  for (; i + 2 * lanes <= end; i += 2 * lanes) {
    const Vector y0 = TimesSigmoid(d, hn::LoadU(d, in + i), kSlope);
    const Vector y1 = TimesSigmoid(d, hn::LoadU(d, in + i + lanes), kSlope);
    hn::StoreU(y0, d, out + i);
    hn::StoreU(y1, d, out + i + lanes);
  }
  if (i + lanes <= end) {
    hn::StoreU(TimesSigmoid(d, hn::LoadU(d, in + i), kSlope), d, out + i);
    i += lanes;
  }
  if (i < end) {
    const Vector x = LoadSome(d, in + i, end - i, hn::Zero(d));
    StoreSome(TimesSigmoid(d, x, kSlope), d, out + i, end - i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mvlm {
namespace {
HWY_EXPORT(QuickGeluRange);
HWY_EXPORT(SwigluRows);
HWY_EXPORT(TargetName);
}  // namespace

void Swiglu(const float* gate_up, int64_t begin, int64_t end, int64_t width, float* out) {
  HWY_DYNAMIC_DISPATCH(SwigluRows)
  (gate_up, static_cast<size_t>(begin), static_cast<size_t>(end), static_cast<size_t>(width), out);
}

void QuickGelu(const float* in, int64_t begin, int64_t end, float* out) {
  HWY_DYNAMIC_DISPATCH(QuickGeluRange)
  (in, static_cast<size_t>(begin), static_cast<size_t>(end), out);
}

const char* ActivationTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace mvlm
#endif  // HWY_ONCE

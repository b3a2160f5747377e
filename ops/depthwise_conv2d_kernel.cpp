// The SIMD kernel. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.
//
// A task is one row of results for a block of channels. Lanes hold channels. Up to kTile
// neighbouring results are computed at once, so that a weight that was loaded serves all of them.
// Consecutive tasks go down the grid, so that rows which several rows of results read are still in
// the cache; the block is as narrow as it is for that.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "depthwise_conv2d_kernel.cpp"
#include "depthwise_conv2d_kernel.h"

#include <algorithm>
#include <cstddef>

#include "hwy/foreach_target.h"  // IWYU pragma: keep; must come before highway.h
#include "hwy/highway.h"

#ifndef MVLM_OPS_DEPTHWISE_CONV2D_SHARED
#define MVLM_OPS_DEPTHWISE_CONV2D_SHARED
namespace mvlm {
namespace {

constexpr int64_t kTile = 4;
constexpr int64_t kChannelBlock = 256;  // a multiple of every vector's lanes

int64_t DivideUp(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace
}  // namespace mvlm
#endif  // MVLM_OPS_DEPTHWISE_CONV2D_SHARED

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::CappedTag<float, 16>;
using Vector = hn::Vec<Tag>;

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

// A rectangle of a kernel: the part that lies inside the grid at some place.
struct Taps {
  const float* weight;  // of its upper left corner
  size_t rows, columns;
  size_t row_stride;  // floats between its rows of weights
};

// kResults neighbouring results for `channels` channels, at most kChannelBlock. All of the taps lie
// inside the grid for each of them. `input` is what the upper left tap of the first result reads.
//
// One row of taps after another, with the sums in a buffer meanwhile. Pixels usually lie a power of
// two apart, so that equal channels of all of them compete for the same few places of the
// first-level cache: those of one row of taps still find room, those of the whole kernel do not.
template <size_t kResults>
HWY_INLINE void Convolve(const DepthwiseConv2d& call, const Taps& taps, const float* input,
                         const float* bias, size_t channels, float* out) {
  static_assert(kResults == 1 || kResults == 2 || kResults == 4);
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t pixel = static_cast<size_t>(call.channels);
  const size_t row = pixel * static_cast<size_t>(call.columns);
  const size_t step = pixel * static_cast<size_t>(call.stride);  // between results' inputs
  HWY_ALIGN float sums[kResults * kChannelBlock];
  for (size_t i = 0; i < taps.rows; ++i) {
    const bool is_first = i == 0;
    const bool is_last = i + 1 == taps.rows;
    float* const to = is_last ? out : sums;
    const size_t to_stride = is_last ? pixel : kChannelBlock;
    size_t c = 0;
    for (; c + lanes <= channels; c += lanes) {
      // Named, not an array, since SVE's vectors have no size at compile time.
      Vector sum0 = hn::Zero(d), sum1 = sum0, sum2 = sum0, sum3 = sum0;
      if (is_first) {
        if (bias != nullptr) sum0 = sum1 = sum2 = sum3 = hn::LoadU(d, bias + c);
      } else {
        sum0 = hn::Load(d, sums + c);
        if constexpr (kResults > 1) sum1 = hn::Load(d, sums + kChannelBlock + c);
        if constexpr (kResults > 2) {
          sum2 = hn::Load(d, sums + 2 * kChannelBlock + c);
          sum3 = hn::Load(d, sums + 3 * kChannelBlock + c);
        }
      }
      const float* x = input + i * row + c;
      const float* w = taps.weight + i * taps.row_stride + c;
      for (size_t j = 0; j < taps.columns; ++j, x += pixel, w += pixel) {
        const Vector weight = hn::LoadU(d, w);
        sum0 = hn::MulAdd(weight, hn::LoadU(d, x), sum0);
        if constexpr (kResults > 1) sum1 = hn::MulAdd(weight, hn::LoadU(d, x + step), sum1);
        if constexpr (kResults > 2) {
          sum2 = hn::MulAdd(weight, hn::LoadU(d, x + 2 * step), sum2);
          sum3 = hn::MulAdd(weight, hn::LoadU(d, x + 3 * step), sum3);
        }
      }
      hn::StoreU(sum0, d, to + c);
      if constexpr (kResults > 1) hn::StoreU(sum1, d, to + to_stride + c);
      if constexpr (kResults > 2) {
        hn::StoreU(sum2, d, to + 2 * to_stride + c);
        hn::StoreU(sum3, d, to + 3 * to_stride + c);
      }
    }
    for (; c < channels; ++c) {
      for (size_t result = 0; result < kResults; ++result) {
        float sum = 0.0f;
        if (!is_first) {
          sum = sums[result * kChannelBlock + c];
        } else if (bias != nullptr) {
          sum = bias[c];
        }
        for (size_t j = 0; j < taps.columns; ++j) {
          sum += taps.weight[i * taps.row_stride + j * pixel + c] *
                 input[i * row + j * pixel + result * step + c];
        }
        to[result * to_stride + c] = sum;
      }
    }
  }
}

// One row of results for one block of channels.
void ConvolveRow(const DepthwiseConv2d& call, int64_t batch, int64_t out_row, int64_t channel) {
  const int64_t channels = std::min(kChannelBlock, call.channels - channel);
  const float* const bias = call.bias == nullptr ? nullptr : call.bias + channel;
  float* const out =
      call.out + (batch * call.out_rows + out_row) * call.out_columns * call.channels + channel;

  // Where the kernel's upper left corner lies; it may be outside.
  const int64_t top = out_row * call.stride - call.padding;
  const int64_t first_tap_row = std::max<int64_t>(0, -top);
  const int64_t end_tap_row = std::min(call.kernel_rows, call.rows - top);
  const float* const input =
      call.input + (batch * call.rows + top + first_tap_row) * call.columns * call.channels +
      channel;
  Taps taps = {};
  taps.rows = static_cast<size_t>(end_tap_row - first_tap_row);
  taps.row_stride = static_cast<size_t>(call.kernel_columns * call.channels);
  const float* const weight =
      call.weight + first_tap_row * call.kernel_columns * call.channels + channel;

  // Results from first_whole to end_whole - 1 see whole rows of the kernel.
  const int64_t first_whole = DivideUp(call.padding, call.stride);
  const int64_t space = call.columns + call.padding - call.kernel_columns;
  const int64_t end_whole = space < 0 ? 0 : std::min(call.out_columns, space / call.stride + 1);
  for (int64_t column = 0; column < call.out_columns;) {
    const int64_t left = column * call.stride - call.padding;
    const int64_t first_tap = std::max<int64_t>(0, -left);
    taps.columns =
        static_cast<size_t>(std::min(call.kernel_columns, call.columns - left) - first_tap);
    taps.weight = weight + first_tap * call.channels;
    const float* const from = input + (left + first_tap) * call.channels;
    float* const to = out + column * call.channels;
    const int64_t whole = column < first_whole ? 0 : end_whole - column;
    const size_t count = static_cast<size_t>(channels);
    if (whole >= kTile) {
      Convolve<kTile>(call, taps, from, bias, count, to);
      column += kTile;
    } else if (whole >= 2) {
      Convolve<2>(call, taps, from, bias, count, to);
      column += 2;
    } else {
      Convolve<1>(call, taps, from, bias, count, to);
      column += 1;
    }
  }
}

void RunTasks(const DepthwiseConv2d& call, int64_t begin, int64_t end) {
  const int64_t blocks = DivideUp(call.channels, kChannelBlock);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / call.out_rows % blocks;
    ConvolveRow(call, task / call.out_rows / blocks, task % call.out_rows, block * kChannelBlock);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mvlm {
namespace {
HWY_EXPORT(RunTasks);
HWY_EXPORT(TargetName);
}  // namespace

int64_t DepthwiseConv2dTasks(const DepthwiseConv2d& call) {
  return call.batch * DivideUp(call.channels, kChannelBlock) * call.out_rows;
}

void RunDepthwiseConv2d(const DepthwiseConv2d& call, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(RunTasks)(call, begin, end);
}

const char* DepthwiseConv2dTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace mvlm
#endif  // HWY_ONCE

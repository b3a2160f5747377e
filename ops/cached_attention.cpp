// The SIMD kernel. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.
//
// Letters used below: a "row" is one query of one head. The rows of one kv head are ordered
// (token, head within the group), so their positions never decrease, and with grouped queries one
// pass over a key serves every head of the group.
//
// Blocks of rows (prefill). Vector lanes hold rows: a block is `width` = vectors x lanes rows, its
// queries and outputs are kept transposed, [head_dim][width], and so are the scores,
// [keys][width]. Softmax is then lane-wise arithmetic without horizontal sums, head_dim needs no
// multiple of the vector length, and both products, Q K^T and P V, are the same register tile
// (OuterTile): 4 scalars, each from a row of the cache, times up to 3 vectors.
//
// Single rows (decode). One row would leave most lanes idle, so lanes hold head_dim instead and
// every key and value is streamed through once.
//
// Both walk the keys in blocks of kKeyBlock with a running maximum m, a running sum l and a running
// output, rescaled whenever the maximum grows (Milakov & Gimelshein, "Online normalizer calculation
// for softmax", 2018; Dao et al., "FlashAttention", 2022): no [tokens x positions] score matrix
// ever exists.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cached_attention.cpp"
#include "cached_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "hwy/foreach_target.h"  // IWYU pragma: keep; must come before highway.h
#include "hwy/highway.h"

#ifndef MVLM_OPS_CACHED_ATTENTION_SHARED
#define MVLM_OPS_CACHED_ATTENTION_SHARED
namespace mvlm {
namespace {

constexpr size_t kMaxLanes = 16;
constexpr size_t kMaxVectors = 3;  // 3 x 4 accumulators + 3 + 1 operands fill 16 registers
constexpr size_t kTile = 4;        // rows of the register tile
constexpr size_t kMaxRows = kMaxVectors * kMaxLanes;
constexpr size_t kKeyBlock = 64;  // keys per step of the running softmax
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

constexpr size_t RoundUp(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr size_t DivideUp(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

// The call as the kernel sees it: sizes as size_t, and what follows from them.
struct Geometry {
  explicit Geometry(const CachedAttention& call)
      : group(static_cast<size_t>(call.heads / call.kv_heads)),
        rows(group * static_cast<size_t>(call.tokens)),
        head_dim(static_cast<size_t>(call.head_dim)),
        token_stride(static_cast<size_t>(call.heads * call.head_dim)),
        start_pos(static_cast<size_t>(call.start_pos)) {}

  // Offset of a row of kv_head in `query` and `out`.
  size_t RowOffset(size_t kv_head, size_t row) const {
    return row / group * token_stride + (kv_head * group + row % group) * head_dim;
  }

  // Number of keys that a row sees: its own position and all before it.
  size_t VisibleKeys(size_t row) const { return start_pos + row / group + 1; }

  size_t group;         // query heads per kv head
  size_t rows;          // per kv head
  size_t head_dim;      // floats
  size_t token_stride;  // floats between tokens in `query` and `out`
  size_t start_pos;
};

}  // namespace
}  // namespace mvlm
#endif  // MVLM_OPS_CACHED_ATTENTION_SHARED

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::CappedTag<float, kMaxLanes>;
using Vector = hn::Vec<Tag>;

// Rows per block.
size_t BlockRows() { return kMaxVectors * hn::Lanes(Tag()); }

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

// Up to this many rows it is cheaper to have lanes hold head_dim.
size_t FewRows() { return hn::Lanes(Tag()) / 2; }

// 2^x for x <= 0, within 8e-8 relatively (measured with fused multiply-adds); exactly 1 at 0, and 0
// below -125 (-infinity included).
//
// x = n + f with integer n and |f| <= 1/2; 2^f is a polynomial and n goes to the exponent bits. The
// coefficients are the minimax fit of degree 6 to the relative error of 2^f: 1.9e-9, far below
// float's rounding.
HWY_INLINE Vector Exp2(Vector x) {
  const Tag d;
  const hn::RebindToSigned<Tag> di;
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
  const Vector magic = hn::Set(d, 12582912.0f);
  const Vector shifted = hn::Add(x, magic);
  const Vector f = hn::Sub(x, hn::Sub(shifted, magic));
  Vector p = hn::Set(d, 1.5345811e-4f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.3399931e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.618489e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5503286e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022646e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.931472e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const Vector result = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.0f)), result);
}

// The register tile: for i < 4 and w < width = kVectors * lanes
//     c[i][w] = (kRescale ? c[i][w] * factor[w] : 0) + sum over t < steps of b_i[t * b_step] *
//     a[t][w]
// with a and c dense. Accumulators are named, not an array, since SVE's vectors have no size at
// compile time.
template <size_t kVectors, bool kRescale>
HWY_INLINE void OuterTile(const float* HWY_RESTRICT a, size_t steps, const float* b0,
                          const float* b1, const float* b2, const float* b3, size_t b_step,
                          const float* factor, float* HWY_RESTRICT c) {
  static_assert(1 <= kVectors && kVectors <= kMaxVectors);
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = kVectors * lanes;
  Vector c00 = hn::Zero(d), c01 = c00, c02 = c00;
  Vector c10 = c00, c11 = c00, c12 = c00;
  Vector c20 = c00, c21 = c00, c22 = c00;
  Vector c30 = c00, c31 = c00, c32 = c00;
  if constexpr (kRescale) {
    const Vector f0 = hn::Load(d, factor);
    c00 = hn::Mul(f0, hn::Load(d, c));
    c10 = hn::Mul(f0, hn::Load(d, c + width));
    c20 = hn::Mul(f0, hn::Load(d, c + 2 * width));
    c30 = hn::Mul(f0, hn::Load(d, c + 3 * width));
    if constexpr (kVectors > 1) {
      const Vector f1 = hn::Load(d, factor + lanes);
      c01 = hn::Mul(f1, hn::Load(d, c + lanes));
      c11 = hn::Mul(f1, hn::Load(d, c + width + lanes));
      c21 = hn::Mul(f1, hn::Load(d, c + 2 * width + lanes));
      c31 = hn::Mul(f1, hn::Load(d, c + 3 * width + lanes));
    }
    if constexpr (kVectors > 2) {
      const Vector f2 = hn::Load(d, factor + 2 * lanes);
      c02 = hn::Mul(f2, hn::Load(d, c + 2 * lanes));
      c12 = hn::Mul(f2, hn::Load(d, c + width + 2 * lanes));
      c22 = hn::Mul(f2, hn::Load(d, c + 2 * width + 2 * lanes));
      c32 = hn::Mul(f2, hn::Load(d, c + 3 * width + 2 * lanes));
    }
  }
  for (size_t t = 0, at = 0; t < steps; ++t, at += b_step, a += width) {
    const Vector a0 = hn::Load(d, a);
    Vector a1 = a0, a2 = a0;
    if constexpr (kVectors > 1) a1 = hn::Load(d, a + lanes);
    if constexpr (kVectors > 2) a2 = hn::Load(d, a + 2 * lanes);
    Vector b = hn::Set(d, b0[at]);
    c00 = hn::MulAdd(a0, b, c00);
    if constexpr (kVectors > 1) c01 = hn::MulAdd(a1, b, c01);
    if constexpr (kVectors > 2) c02 = hn::MulAdd(a2, b, c02);
    b = hn::Set(d, b1[at]);
    c10 = hn::MulAdd(a0, b, c10);
    if constexpr (kVectors > 1) c11 = hn::MulAdd(a1, b, c11);
    if constexpr (kVectors > 2) c12 = hn::MulAdd(a2, b, c12);
    b = hn::Set(d, b2[at]);
    c20 = hn::MulAdd(a0, b, c20);
    if constexpr (kVectors > 1) c21 = hn::MulAdd(a1, b, c21);
    if constexpr (kVectors > 2) c22 = hn::MulAdd(a2, b, c22);
    b = hn::Set(d, b3[at]);
    c30 = hn::MulAdd(a0, b, c30);
    if constexpr (kVectors > 1) c31 = hn::MulAdd(a1, b, c31);
    if constexpr (kVectors > 2) c32 = hn::MulAdd(a2, b, c32);
  }
  hn::Store(c00, d, c);
  hn::Store(c10, d, c + width);
  hn::Store(c20, d, c + 2 * width);
  hn::Store(c30, d, c + 3 * width);
  if constexpr (kVectors > 1) {
    hn::Store(c01, d, c + lanes);
    hn::Store(c11, d, c + width + lanes);
    hn::Store(c21, d, c + 2 * width + lanes);
    hn::Store(c31, d, c + 3 * width + lanes);
  }
  if constexpr (kVectors > 2) {
    hn::Store(c02, d, c + 2 * lanes);
    hn::Store(c12, d, c + width + 2 * lanes);
    hn::Store(c22, d, c + 2 * width + 2 * lanes);
    hn::Store(c32, d, c + 3 * width + 2 * lanes);
  }
}

// Transposes the block's queries: out[i][w] = query of row w, component i. Lanes past the last row
// repeat it, so that they compute something finite that nobody reads.
HWY_INLINE void LoadQueries(const float* HWY_RESTRICT query, const size_t* row_offset, size_t rows,
                            size_t width, size_t head_dim, float* HWY_RESTRICT out) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  HWY_ALIGN float four[kTile * kMaxLanes];
  for (size_t w = 0; w < width; w += kTile) {
    const float* q0 = query + row_offset[std::min(w, rows - 1)];
    const float* q1 = query + row_offset[std::min(w + 1, rows - 1)];
    const float* q2 = query + row_offset[std::min(w + 2, rows - 1)];
    const float* q3 = query + row_offset[std::min(w + 3, rows - 1)];
    // Narrow vectors (fewer than 4 lanes) may leave less than a tile of columns.
    const size_t columns = std::min(kTile, width - w);
    size_t i = 0;
    for (; columns == kTile && i + lanes <= head_dim; i += lanes) {
      hn::StoreInterleaved4(hn::LoadU(d, q0 + i), hn::LoadU(d, q1 + i), hn::LoadU(d, q2 + i),
                            hn::LoadU(d, q3 + i), d, four);
      for (size_t lane = 0; lane < lanes; ++lane) {
        std::memcpy(out + (i + lane) * width + w, four + kTile * lane, kTile * sizeof(float));
      }
    }
    for (; i < head_dim; ++i) {
      const float column[kTile] = {q0[i], q1[i], q2[i], q3[i]};
      std::copy_n(column, columns, out + i * width + w);
    }
  }
}

// The way back: out row w, component i = transposed[i][w] * factor[w].
HWY_INLINE void StoreOutputs(const float* HWY_RESTRICT transposed, const float* factor,
                             const size_t* row_offset, size_t rows, size_t width, size_t head_dim,
                             float* HWY_RESTRICT out) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  HWY_ALIGN float four[kTile * kMaxLanes];
  for (size_t w = 0; w < rows; w += lanes) {
    const Vector f = hn::Load(d, factor + w);
    const size_t count = std::min(lanes, rows - w);
    for (size_t i = 0; i < head_dim; i += kTile) {  // `transposed` has whole tiles of rows
      const float* from = transposed + i * width + w;
      hn::StoreInterleaved4(hn::Mul(f, hn::Load(d, from)), hn::Mul(f, hn::Load(d, from + width)),
                            hn::Mul(f, hn::Load(d, from + 2 * width)),
                            hn::Mul(f, hn::Load(d, from + 3 * width)), d, four);
      if (HWY_LIKELY(i + kTile <= head_dim)) {
        for (size_t lane = 0; lane < count; ++lane) {
          std::memcpy(out + row_offset[w + lane] + i, four + kTile * lane, kTile * sizeof(float));
        }
      } else {
        for (size_t lane = 0; lane < count; ++lane) {
          std::copy_n(four + kTile * lane, head_dim - i, out + row_offset[w + lane] + i);
        }
      }
    }
  }
}

// Hides keys from the rows that come before them: scores[key][w] = -infinity where key >=
// visible[w]. Both count from the first key of the block; counts below 2^24 are exact in float.
template <size_t kVectors>
HWY_INLINE void MaskFuture(const float* visible, size_t keys, float* HWY_RESTRICT scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  for (size_t v = 0; v < kVectors; ++v) {
    const Vector limit = hn::Load(d, visible + v * lanes);
    float* column = scores + v * lanes;
    for (size_t key = 0; key < keys; ++key, column += kVectors * lanes) {
      const auto hidden = hn::Ge(hn::Set(d, static_cast<float>(key)), limit);
      const Vector score = hn::Load(d, column);
      hn::Store(hn::IfThenElse(hidden, hn::Set(d, -kInfinity), score), d, column);
    }
  }
}

// One step of the running softmax, in base 2 (`scale` includes log2 e): scores become
// probabilities relative to the new maximum, and `factor` what the output so far is to be
// multiplied by. The maximum is subtracted before scaling, so that its own probability is exactly
// 1: scaling first and subtracting with a fused multiply would leave a rounding error there.
template <size_t kVectors>
HWY_INLINE void SoftmaxStep(size_t keys, float scale, float* HWY_RESTRICT scores,
                            float* HWY_RESTRICT maximum, float* HWY_RESTRICT sum,
                            float* HWY_RESTRICT factor) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = kVectors * lanes;
  const Vector scales = hn::Set(d, scale);
  for (size_t v = 0; v < kVectors; ++v) {
    float* const column = scores + v * lanes;
    const Vector before = hn::Load(d, maximum + v * lanes);
    Vector now = before;
    for (size_t key = 0; key < keys; ++key) {
      now = hn::Max(now, hn::Load(d, column + key * width));
    }
    Vector total = hn::Zero(d);
    for (size_t key = 0; key < keys; ++key) {
      const Vector p = Exp2(hn::Mul(scales, hn::Sub(hn::Load(d, column + key * width), now)));
      hn::Store(p, d, column + key * width);
      total = hn::Add(total, p);
    }
    const Vector f = Exp2(hn::Mul(scales, hn::Sub(before, now)));
    hn::Store(f, d, factor + v * lanes);
    hn::Store(hn::MulAdd(f, hn::Load(d, sum + v * lanes), total), d, sum + v * lanes);
    hn::Store(now, d, maximum + v * lanes);
  }
}

// Attends for `rows` <= kVectors * lanes rows of one kv head, starting at `first_row`.
template <size_t kVectors>
void AttendBlock(const CachedAttention& call, const Geometry& g, size_t kv_head, size_t first_row,
                 size_t rows, float* HWY_RESTRICT scratch) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = kVectors * lanes;
  const size_t cache_offset = kv_head * static_cast<size_t>(call.capacity) * g.head_dim;
  const float* const keys = call.key_cache + cache_offset;
  const float* const values = call.value_cache + cache_offset;
  const float scale = call.scale * kLog2E;

  float* const queries = scratch;                                       // [head_dim][width]
  float* const outputs = queries + RoundUp(g.head_dim, kTile) * width;  // [head_dim][width]
  float* const scores = outputs + RoundUp(g.head_dim, kTile) * width;   // [kKeyBlock][width]

  HWY_ALIGN float maximum[kMaxRows];
  HWY_ALIGN float sum[kMaxRows];
  HWY_ALIGN float factor[kMaxRows];
  HWY_ALIGN float visible[kMaxRows];
  size_t row_offset[kMaxRows];
  for (size_t row = 0; row < rows; ++row) row_offset[row] = g.RowOffset(kv_head, first_row + row);
  std::fill_n(maximum, width, -kInfinity);
  std::fill_n(sum, width, 0.0f);
  std::fill_n(outputs, RoundUp(g.head_dim, kTile) * width, 0.0f);
  LoadQueries(call.query, row_offset, rows, width, g.head_dim, queries);

  const size_t seen_by_first = g.VisibleKeys(first_row);
  const size_t seen_by_last = g.VisibleKeys(first_row + rows - 1);
  for (size_t key = 0; key < seen_by_last; key += kKeyBlock) {
    const size_t count = std::min(kKeyBlock, seen_by_last - key);
    const float* const block_keys = keys + key * g.head_dim;
    const float* const block_values = values + key * g.head_dim;

    for (size_t i = 0; i < count; i += kTile) {
      // The tile's surplus rows repeat the last key: what lies past it must not be read.
      const float* k0 = block_keys + i * g.head_dim;
      const float* k1 = block_keys + std::min(i + 1, count - 1) * g.head_dim;
      const float* k2 = block_keys + std::min(i + 2, count - 1) * g.head_dim;
      const float* k3 = block_keys + std::min(i + 3, count - 1) * g.head_dim;
      OuterTile<kVectors, false>(queries, g.head_dim, k0, k1, k2, k3, 1, nullptr,
                                 scores + i * width);
    }
    if (key + count > seen_by_first) {
      for (size_t w = 0; w < width; ++w) {
        const size_t row = first_row + std::min(w, rows - 1);
        visible[w] = static_cast<float>(static_cast<int64_t>(g.VisibleKeys(row)) -
                                        static_cast<int64_t>(key));
      }
      MaskFuture<kVectors>(visible, count, scores);
    }
    SoftmaxStep<kVectors>(count, scale, scores, maximum, sum, factor);
    for (size_t i = 0; i < g.head_dim; i += kTile) {
      const float* v0 = block_values + i;
      const float* v1 = block_values + std::min(i + 1, g.head_dim - 1);
      const float* v2 = block_values + std::min(i + 2, g.head_dim - 1);
      const float* v3 = block_values + std::min(i + 3, g.head_dim - 1);
      OuterTile<kVectors, true>(scores, count, v0, v1, v2, v3, g.head_dim, factor,
                                outputs + i * width);
    }
  }
  for (size_t w = 0; w < width; ++w) factor[w] = 1.0f / sum[w];
  StoreOutputs(outputs, factor, row_offset, rows, width, g.head_dim, call.out);
}

// Dot products of one query with 8 keys that lie `stride` floats apart; the last of `count` stands
// in for those that are missing.
HWY_INLINE void Dot8(const float* HWY_RESTRICT query, const float* HWY_RESTRICT keys, size_t stride,
                     size_t count, size_t head_dim, float* HWY_RESTRICT scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t last = count - 1;
  const float* k0 = keys;
  const float* k1 = keys + std::min<size_t>(1, last) * stride;
  const float* k2 = keys + std::min<size_t>(2, last) * stride;
  const float* k3 = keys + std::min<size_t>(3, last) * stride;
  const float* k4 = keys + std::min<size_t>(4, last) * stride;
  const float* k5 = keys + std::min<size_t>(5, last) * stride;
  const float* k6 = keys + std::min<size_t>(6, last) * stride;
  const float* k7 = keys + std::min<size_t>(7, last) * stride;
  Vector s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  size_t i = 0;
  for (; i + lanes <= head_dim; i += lanes) {
    const Vector q = hn::LoadU(d, query + i);
    s0 = hn::MulAdd(q, hn::LoadU(d, k0 + i), s0);
    s1 = hn::MulAdd(q, hn::LoadU(d, k1 + i), s1);
    s2 = hn::MulAdd(q, hn::LoadU(d, k2 + i), s2);
    s3 = hn::MulAdd(q, hn::LoadU(d, k3 + i), s3);
    s4 = hn::MulAdd(q, hn::LoadU(d, k4 + i), s4);
    s5 = hn::MulAdd(q, hn::LoadU(d, k5 + i), s5);
    s6 = hn::MulAdd(q, hn::LoadU(d, k6 + i), s6);
    s7 = hn::MulAdd(q, hn::LoadU(d, k7 + i), s7);
  }
  scores[0] = hn::GetLane(hn::SumOfLanes(d, s0));
  scores[1] = hn::GetLane(hn::SumOfLanes(d, s1));
  scores[2] = hn::GetLane(hn::SumOfLanes(d, s2));
  scores[3] = hn::GetLane(hn::SumOfLanes(d, s3));
  scores[4] = hn::GetLane(hn::SumOfLanes(d, s4));
  scores[5] = hn::GetLane(hn::SumOfLanes(d, s5));
  scores[6] = hn::GetLane(hn::SumOfLanes(d, s6));
  scores[7] = hn::GetLane(hn::SumOfLanes(d, s7));
  for (; i < head_dim; ++i) {
    scores[0] += query[i] * k0[i];
    scores[1] += query[i] * k1[i];
    scores[2] += query[i] * k2[i];
    scores[3] += query[i] * k3[i];
    scores[4] += query[i] * k4[i];
    scores[5] += query[i] * k5[i];
    scores[6] += query[i] * k6[i];
    scores[7] += query[i] * k7[i];
  }
}

// out[i] = out[i] * factor + sum over keys of p[key] * values[key][i], for kVectors vectors of i.
// The first block ignores what `out` held.
template <size_t kVectors>
HWY_INLINE void AccumulateValues(const float* HWY_RESTRICT p, size_t keys,
                                 const float* HWY_RESTRICT values, size_t stride, bool first,
                                 float factor, float* HWY_RESTRICT out) {
  static_assert(kVectors == 1 || kVectors == 2 || kVectors == 4 || kVectors == 8);
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vector o0 = hn::Zero(d), o1 = o0, o2 = o0, o3 = o0, o4 = o0, o5 = o0, o6 = o0, o7 = o0;
  if (!first) {
    const Vector f = hn::Set(d, factor);
    o0 = hn::Mul(f, hn::LoadU(d, out));
    if constexpr (kVectors > 1) o1 = hn::Mul(f, hn::LoadU(d, out + lanes));
    if constexpr (kVectors > 2) {
      o2 = hn::Mul(f, hn::LoadU(d, out + 2 * lanes));
      o3 = hn::Mul(f, hn::LoadU(d, out + 3 * lanes));
    }
    if constexpr (kVectors > 4) {
      o4 = hn::Mul(f, hn::LoadU(d, out + 4 * lanes));
      o5 = hn::Mul(f, hn::LoadU(d, out + 5 * lanes));
      o6 = hn::Mul(f, hn::LoadU(d, out + 6 * lanes));
      o7 = hn::Mul(f, hn::LoadU(d, out + 7 * lanes));
    }
  }
  for (size_t key = 0; key < keys; ++key, values += stride) {
    const Vector w = hn::Set(d, p[key]);
    o0 = hn::MulAdd(w, hn::LoadU(d, values), o0);
    if constexpr (kVectors > 1) o1 = hn::MulAdd(w, hn::LoadU(d, values + lanes), o1);
    if constexpr (kVectors > 2) {
      o2 = hn::MulAdd(w, hn::LoadU(d, values + 2 * lanes), o2);
      o3 = hn::MulAdd(w, hn::LoadU(d, values + 3 * lanes), o3);
    }
    if constexpr (kVectors > 4) {
      o4 = hn::MulAdd(w, hn::LoadU(d, values + 4 * lanes), o4);
      o5 = hn::MulAdd(w, hn::LoadU(d, values + 5 * lanes), o5);
      o6 = hn::MulAdd(w, hn::LoadU(d, values + 6 * lanes), o6);
      o7 = hn::MulAdd(w, hn::LoadU(d, values + 7 * lanes), o7);
    }
  }
  hn::StoreU(o0, d, out);
  if constexpr (kVectors > 1) hn::StoreU(o1, d, out + lanes);
  if constexpr (kVectors > 2) {
    hn::StoreU(o2, d, out + 2 * lanes);
    hn::StoreU(o3, d, out + 3 * lanes);
  }
  if constexpr (kVectors > 4) {
    hn::StoreU(o4, d, out + 4 * lanes);
    hn::StoreU(o5, d, out + 5 * lanes);
    hn::StoreU(o6, d, out + 6 * lanes);
    hn::StoreU(o7, d, out + 7 * lanes);
  }
}

// Attends for a few rows (at most FewRows()) of one kv head, each on its own, key block by key
// block so that all rows find a block in the cache that the first one brought in.
void AttendRows(const CachedAttention& call, const Geometry& g, size_t kv_head, size_t first_row,
                size_t rows, float* HWY_RESTRICT scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t head_dim = g.head_dim;
  const size_t cache_offset = kv_head * static_cast<size_t>(call.capacity) * head_dim;
  const float scale = call.scale * kLog2E;
  const Vector scales = hn::Set(d, scale);
  float maximum[kMaxRows];
  float sum[kMaxRows];
  std::fill_n(maximum, rows, -kInfinity);
  std::fill_n(sum, rows, 0.0f);

  const size_t seen_by_last = g.VisibleKeys(first_row + rows - 1);
  for (size_t key = 0; key < seen_by_last; key += kKeyBlock) {
    const float* const keys = call.key_cache + cache_offset + key * head_dim;
    const float* const values = call.value_cache + cache_offset + key * head_dim;
    for (size_t row = 0; row < rows; ++row) {
      const size_t visible = g.VisibleKeys(first_row + row);
      if (visible <= key) continue;
      const size_t count = std::min(kKeyBlock, visible - key);
      const size_t offset = g.RowOffset(kv_head, first_row + row);
      const float* const query = call.query + offset;
      float* const out = call.out + offset;

      for (size_t i = 0; i < count; i += 8) {
        Dot8(query, keys + i * head_dim, head_dim, count - i, head_dim, scores + i);
      }
      const size_t padded = RoundUp(count, lanes);
      std::fill(scores + count, scores + padded, -kInfinity);
      Vector largest = hn::Set(d, maximum[row]);
      for (size_t i = 0; i < count; i += lanes) {
        largest = hn::Max(largest, hn::Load(d, scores + i));
      }
      largest = hn::MaxOfLanes(d, largest);
      Vector total = hn::Zero(d);
      for (size_t i = 0; i < count; i += lanes) {
        const Vector p = Exp2(hn::Mul(scales, hn::Sub(hn::Load(d, scores + i), largest)));
        hn::Store(p, d, scores + i);
        total = hn::Add(total, p);
      }
      const float factor =
          hn::GetLane(Exp2(hn::Mul(scales, hn::Sub(hn::Set(d, maximum[row]), largest))));
      maximum[row] = hn::GetLane(largest);
      sum[row] = sum[row] * factor + hn::GetLane(hn::SumOfLanes(d, total));

      const bool first = key == 0;
      size_t i = 0;
      for (; i + 8 * lanes <= head_dim; i += 8 * lanes) {
        AccumulateValues<8>(scores, count, values + i, head_dim, first, factor, out + i);
      }
      if (i + 4 * lanes <= head_dim) {
        AccumulateValues<4>(scores, count, values + i, head_dim, first, factor, out + i);
        i += 4 * lanes;
      }
      if (i + 2 * lanes <= head_dim) {
        AccumulateValues<2>(scores, count, values + i, head_dim, first, factor, out + i);
        i += 2 * lanes;
      }
      if (i + lanes <= head_dim) {
        AccumulateValues<1>(scores, count, values + i, head_dim, first, factor, out + i);
        i += lanes;
      }
      for (; i < head_dim; ++i) {
        float o = first ? 0.0f : out[i] * factor;
        for (size_t j = 0; j < count; ++j) o += scores[j] * values[j * head_dim + i];
        out[i] = o;
      }
    }
  }
  for (size_t row = 0; row < rows; ++row) {
    float* const out = call.out + g.RowOffset(kv_head, first_row + row);
    const float reciprocal = 1.0f / sum[row];
    for (size_t i = 0; i < head_dim; ++i) out[i] *= reciprocal;
  }
}

void AttendTask(const CachedAttention& call, size_t task, float* scratch) {
  const Geometry g(call);
  const size_t block_rows = BlockRows();
  const size_t blocks = DivideUp(g.rows, block_rows);
  const size_t kv_head = task / blocks;
  // Longest first, so that no worker is left with a long task at the end.
  const size_t first_row = (blocks - 1 - task % blocks) * block_rows;
  const size_t rows = std::min(block_rows, g.rows - first_row);
  if (rows <= FewRows()) {
    AttendRows(call, g, kv_head, first_row, rows, scratch);
    return;
  }
  switch (DivideUp(rows, hn::Lanes(Tag()))) {
    case 1:
      return AttendBlock<1>(call, g, kv_head, first_row, rows, scratch);
    case 2:
      return AttendBlock<2>(call, g, kv_head, first_row, rows, scratch);
    default:
      return AttendBlock<3>(call, g, kv_head, first_row, rows, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mvlm {
namespace {
HWY_EXPORT(BlockRows);
HWY_EXPORT(AttendTask);
HWY_EXPORT(TargetName);
}  // namespace

void WriteCache(const CachedAttention& call, int64_t kv_head) {
  const int64_t stride = call.kv_heads * call.head_dim;
  const int64_t from = kv_head * call.head_dim;
  const int64_t to = (kv_head * call.capacity + call.start_pos) * call.head_dim;
  const size_t bytes = static_cast<size_t>(call.head_dim) * sizeof(float);
  for (int64_t token = 0; token < call.tokens; ++token) {
    std::memcpy(call.key_cache + to + token * call.head_dim, call.key + from + token * stride,
                bytes);
    std::memcpy(call.value_cache + to + token * call.head_dim, call.value + from + token * stride,
                bytes);
  }
}

int64_t AttentionTasks(const CachedAttention& call) {
  const size_t blocks = DivideUp(Geometry(call).rows, HWY_DYNAMIC_DISPATCH(BlockRows)());
  return call.kv_heads * static_cast<int64_t>(blocks);
}

size_t AttentionScratchBytes(const CachedAttention& call) {
  const size_t columns = 2 * RoundUp(static_cast<size_t>(call.head_dim), kTile) + kKeyBlock;
  return RoundUp(columns * HWY_DYNAMIC_DISPATCH(BlockRows)() * sizeof(float), kScratchAlignment);
}

void Attend(const CachedAttention& call, int64_t task, void* scratch) {
  HWY_DYNAMIC_DISPATCH(AttendTask)(call, static_cast<size_t>(task), static_cast<float*>(scratch));
}

const char* AttentionTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

int64_t AttentionWorkers(const CachedAttention& call, int64_t threads) {
  const int64_t keys = call.start_pos + (call.tokens + 1) / 2;  // seen by a query on average
  const int64_t multiply_adds = 2 * call.tokens * call.heads * call.head_dim * keys;
  const int64_t worthwhile = 1 + multiply_adds / kMinMultiplyAddsPerWorker;
  return std::max<int64_t>(1, std::min({threads, worthwhile, AttentionTasks(call)}));
}

}  // namespace mvlm
#endif  // HWY_ONCE

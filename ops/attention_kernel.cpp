// The SIMD kernel. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.
//
// Letters used below: a "row" is one query of one head. The rows of one kv head are ordered
// (token, head within the group), so their positions never decrease, and with grouped queries one
// pass over a key serves every head of the group.
//
// Blocks of rows (prefill, vision). Vector lanes hold rows: a block is `width` = vectors x lanes
// rows, its queries and outputs are kept transposed, [head_dim][width], and so are the scores,
// [keys][width]. Softmax is then lane-wise arithmetic without horizontal sums, head_dim needs no
// multiple of the vector length, and both products, Q K^T and P V, are the same register tile
// (OuterTile): 4 scalars, each from a key or value, times up to 3 vectors. A task has up to
// kTaskBlocks blocks of rows, which all use a block of keys and values while it is at hand: it is
// converted to float and laid out for the tile once for all of them.
//
// Single rows (decode). One row would leave most lanes idle, so lanes hold head_dim instead and
// every key and value is streamed through once, in the type that the cache has.
//
// Both walk the keys in blocks of kKeyBlock with a running maximum m, a running sum l and a running
// output, rescaled whenever the maximum grows (Milakov & Gimelshein, "Online normalizer calculation
// for softmax", 2018; Dao et al., "FlashAttention", 2022): no [tokens x positions] score matrix
// ever exists.
//
// Queries are multiplied by scale * log2(e) when they are read, so that probabilities are powers of
// two of differences of scores.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention_kernel.cpp"
#include "attention_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "hwy/foreach_target.h"  // IWYU pragma: keep; must come before highway.h
#include "hwy/highway.h"

#ifndef MVLM_OPS_ATTENTION_KERNEL_SHARED
#define MVLM_OPS_ATTENTION_KERNEL_SHARED
namespace mvlm {
namespace {

constexpr size_t kMaxLanes = 16;
constexpr size_t kMaxVectors = 3;  // 3 x 4 accumulators + 3 + 1 operands fill 16 registers
constexpr size_t kTile = 4;        // rows of the register tile
constexpr size_t kMaxRows = kMaxVectors * kMaxLanes;
constexpr size_t kTaskBlocks = 8;  // blocks of rows per task
constexpr size_t kKeyBlock = 64;   // keys per step of the running softmax
// Floats of a panel of kTile components of kKeyBlock values. The line in addition keeps the panels
// from falling on the same lines of the L1 cache.
constexpr size_t kPanel = kTile * kKeyBlock + 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
// Vectors whose largest component is smaller count as zero when they are quantized: 127 / max would
// overflow for the smallest ones.
constexpr float kSmallestMaximum = 1e-30f;

constexpr size_t RoundUp(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr size_t DivideUp(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

// The call as the kernel sees it: sizes as size_t, and what follows from them.
struct Geometry {
  explicit Geometry(const AttentionCall& call)
      : cached(call.key_values != KeyValues::kProjection),
        group(static_cast<size_t>(call.heads / call.kv_heads)),
        tokens(static_cast<size_t>(call.tokens)),
        rows(group * tokens),
        heads(static_cast<size_t>(call.heads)),
        kv_heads(static_cast<size_t>(call.kv_heads)),
        head_dim(static_cast<size_t>(call.head_dim)),
        token_stride((heads + 2 * kv_heads) * head_dim),
        start_pos(cached ? static_cast<size_t>(call.start_pos) : 0) {}

  size_t Token(size_t row) const { return row / group; }
  size_t Head(size_t kv_head, size_t row) const { return kv_head * group + row % group; }

  // Offset of a row of kv_head in `out`.
  size_t OutOffset(size_t kv_head, size_t row) const {
    return (Token(row) * heads + Head(kv_head, row)) * head_dim;
  }

  // Number of keys that a row sees: with a cache its own position and all before it.
  size_t VisibleKeys(size_t row) const { return cached ? start_pos + Token(row) + 1 : tokens; }

  bool cached;
  size_t group;  // query heads per kv head
  size_t tokens;
  size_t rows;  // per kv head
  size_t heads;
  size_t kv_heads;
  size_t head_dim;      // floats
  size_t token_stride;  // floats between tokens in `qkv`
  size_t start_pos;
};

// Where a worker's memory for blocks of rows goes, in floats. Everything is aligned to 64 bytes.
struct BlockScratch {
  BlockScratch(const Geometry& g, size_t block_rows)
      : transposed(RoundUp(RoundUp(g.head_dim, kTile) * block_rows, 16)),
        row(RoundUp(g.head_dim, 16)),
        blocks(std::min(kTaskBlocks, DivideUp(g.rows, block_rows))),
        queries(0),
        outputs(queries + blocks * transposed),
        scores(outputs + blocks * transposed),
        rows(scores + RoundUp(kKeyBlock * block_rows, 16)),
        keys(rows + kTile * row),
        values(keys + RoundUp(kKeyBlock * g.head_dim, 16)),
        size(values + DivideUp(g.head_dim, kTile) * kPanel) {}

  size_t transposed;  // floats of a block's queries or outputs
  size_t row;         // floats from one query to the next in `rows`
  size_t blocks;
  size_t queries;  // [blocks][head_dim][width]
  size_t outputs;  // [blocks][head_dim][width]
  size_t scores;   // [kKeyBlock][width]
  size_t rows;     // [kTile][head_dim]
  size_t keys;     // [kKeyBlock][head_dim]
  size_t values;   // [head_dim / kTile][kKeyBlock][kTile]
  size_t size;
};

// Keys and values of one kv head. `scales` are null unless T is an integer.
template <class T>
struct Source {
  const T* keys;
  const T* values;
  size_t stride;  // elements from one position to the next
  const float* key_scales;
  const float* value_scales;
};

}  // namespace
}  // namespace mvlm
#endif  // MVLM_OPS_ATTENTION_KERNEL_SHARED

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using hwy::float16_t;
using Tag = hn::CappedTag<float, kMaxLanes>;
using Tag1 = hn::CappedTag<float, 1>;
using Vector = hn::Vec<Tag>;

// Rows per block.
size_t BlockRows() { return kMaxVectors * hn::Lanes(Tag()); }

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

// Up to this many rows it is cheaper to have lanes hold head_dim.
size_t FewRows() { return hn::Lanes(Tag()) / 2; }

// Calls f(d, i) for whole vectors of `count` elements, then for the rest one by one.
template <class F>
HWY_INLINE void ForVectors(size_t count, const F& f) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) f(d, i);
  for (; i < count; ++i) f(Tag1(), i);
}

template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const float16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float16_t, D>(), from));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const int8_t* from) {
  const hn::Rebind<int32_t, D> di;
  return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(hn::Rebind<int8_t, D>(), from)));
}

template <class T>
HWY_INLINE float ToFloat(const T* from) {
  return hn::GetLane(LoadFloat(Tag1(), from));
}
HWY_INLINE float ToFloat(const float* from) { return *from; }

// x[i] *= factor[i].
HWY_INLINE void MultiplyBy(const float* HWY_RESTRICT factor, size_t count, float* HWY_RESTRICT x) {
  ForVectors(count, [&](auto d, size_t i) {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, factor + i)), d, x + i);
  });
}

// 2^x for x <= 0, within 2.2e-7 relatively (measured with fused multiply-adds); exactly 1 at 0, and
// less than 1.2e-38 below -126 (0 at -infinity).
//
// x = n + f with integer n and |f| <= 1/2; 2^f is a polynomial and n goes to the exponent bits. The
// coefficients are the minimax fit of 1 + f q(f), q of degree 4, to the relative error of 2^f:
// 1.1e-7, twice float's rounding.
HWY_INLINE Vector Exp2(Vector x) {
  const Tag d;
  const hn::RebindToSigned<Tag> di;
  // At -127 the exponent bits become those of 0. The order lets x86's maximum return a NaN.
  x = hn::Max(hn::Set(d, -127.0f), x);
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
  const Vector magic = hn::Set(d, 12582912.0f);
  const Vector shifted = hn::Add(x, magic);
  const Vector f = hn::Sub(x, hn::Sub(shifted, magic));
  Vector p = hn::Set(d, 1.3264653e-3f);
  p = hn::MulAdd(p, f, hn::Set(d, 9.671511e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.550734e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022242e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.93147e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}

// Rotary embedding of one head: out = x turned by the angles of one position, times `factor`. The
// products are rounded before they are added, as in the eager reference (this file is compiled
// without contraction), so that quantized keys are the same integers.
HWY_INLINE void Rotate(const float* HWY_RESTRICT x, const float* HWY_RESTRICT cos,
                       const float* HWY_RESTRICT sin, size_t head_dim, float factor,
                       float* HWY_RESTRICT out) {
  const size_t half = head_dim / 2;
  ForVectors(half, [&](auto d, size_t i) {
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    const auto first = hn::LoadU(d, x + i);
    const auto second = hn::LoadU(d, x + half + i);
    const auto f = hn::Set(d, factor);
    hn::StoreU(hn::Mul(f, hn::Sub(hn::Mul(first, c), hn::Mul(second, s))), d, out + i);
    hn::StoreU(hn::Mul(f, hn::Add(hn::Mul(second, c), hn::Mul(first, s))), d, out + half + i);
  });
}

// One query as the scores need it: rotated if there is a cache, and scaled.
HWY_INLINE void LoadQuery(const AttentionCall& call, const Geometry& g, size_t kv_head, size_t row,
                          float* HWY_RESTRICT out) {
  const float* const query =
      call.qkv + g.Token(row) * g.token_stride + g.Head(kv_head, row) * g.head_dim;
  const float scale = call.scale * kLog2E;
  if (g.cached) {
    const size_t angles = (g.start_pos + g.Token(row)) * (g.head_dim / 2);
    Rotate(query, call.cos + angles, call.sin + angles, g.head_dim, scale, out);
  } else {
    ForVectors(g.head_dim, [&](auto d, size_t i) {
      hn::StoreU(hn::Mul(hn::Set(d, scale), hn::LoadU(d, query + i)), d, out + i);
    });
  }
}

// StoreHead() writes one head of one position into a cache; `scale` is written for integers only.
HWY_INLINE void StoreHead(const float* HWY_RESTRICT x, size_t head_dim, float* HWY_RESTRICT out,
                          float* /*scale*/) {
  std::memcpy(out, x, head_dim * sizeof(float));
}

// Rounds to nearest, ties to even, with integer arithmetic: Highway's DemoteTo truncates on some
// targets. After Giesen, "float->half variants", https://gist.github.com/rygorous/2156668.
HWY_INLINE void StoreHead(const float* HWY_RESTRICT x, size_t head_dim, float16_t* HWY_RESTRICT out,
                          float* /*scale*/) {
  ForVectors(head_dim, [&](auto d, size_t i) {
    const hn::RebindToSigned<decltype(d)> di;
    const hn::Rebind<uint16_t, decltype(d)> d16;
    const auto value = hn::LoadU(d, x + i);
    const auto magnitude = hn::Abs(value);
    const auto bits = hn::BitCast(di, magnitude);
    const auto sign = hn::ShiftRight<16>(hn::BitCast(di, hn::Xor(value, magnitude)));
    // Normal numbers: a new exponent bias, and half a unit to the last place (one less when it is
    // even, so that ties go there).
    const auto odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(di, 1));
    const auto rebias = hn::Set(di, ((15 - 127) * (1 << 23)) + 0xfff);
    const auto normal = hn::ShiftRight<13>(hn::Add(hn::Add(bits, rebias), odd));
    // Subnormal ones: adding 1/2 rounds them to multiples of 2^-24, which land in the low bits.
    const auto half = hn::Set(d, 0.5f);
    const auto small = hn::Sub(hn::BitCast(di, hn::Add(magnitude, half)), hn::BitCast(di, half));
    auto result = hn::IfThenElse(hn::Lt(bits, hn::Set(di, 113 << 23)), small, normal);
    result =
        hn::IfThenElse(hn::Gt(bits, hn::Set(di, (143 << 23) - 1)), hn::Set(di, 0x7c00), result);
    result = hn::IfThenElse(hn::Gt(bits, hn::Set(di, 255 << 23)), hn::Set(di, 0x7e00), result);
    // DemoteTo saturates, and sign bits came down as ones: keep 16 of them.
    result = hn::And(hn::Or(result, sign), hn::Set(di, 0xffff));
    hn::StoreU(hn::DemoteTo(d16, result), d16, reinterpret_cast<uint16_t*>(out) + i);
  });
}

HWY_INLINE void StoreHead(const float* HWY_RESTRICT x, size_t head_dim, int8_t* HWY_RESTRICT out,
                          float* scale) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  Vector largest = hn::Zero(d);
  Vector check = hn::Zero(d);  // 0, or NaN if a component is NaN or infinite
  size_t i = 0;
  for (; i + lanes <= head_dim; i += lanes) {
    const Vector v = hn::LoadU(d, x + i);
    largest = hn::Max(largest, hn::Abs(v));
    check = hn::MulAdd(v, hn::Zero(d), check);
  }
  float maximum = hn::GetLane(hn::MaxOfLanes(d, largest));
  float finite = hn::GetLane(hn::SumOfLanes(d, check));
  for (; i < head_dim; ++i) {
    maximum = std::max(maximum, std::abs(x[i]));
    finite += x[i] * 0.0f;
  }
  if (!(finite == 0.0f) || maximum < kSmallestMaximum) {
    std::memset(out, 0, head_dim);
    *scale = finite;
    return;
  }
  *scale = maximum / 127.0f;
  const float factor = 127.0f / maximum;
  ForVectors(head_dim, [&](auto tag, size_t at) {
    const hn::Rebind<int8_t, decltype(tag)> d8;
    const auto scaled = hn::Mul(hn::LoadU(tag, x + at), hn::Set(tag, factor));
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(scaled)), d8, out + at);
  });
}

template <class T>
void WriteCacheAs(const AttentionCall& call, size_t kv_head, float* HWY_RESTRICT rotated) {
  const Geometry g(call);
  const bool scaled = call.key_values == KeyValues::kInt8Cache;
  const size_t first = kv_head * static_cast<size_t>(call.capacity) + g.start_pos;
  for (size_t token = 0; token < g.tokens; ++token) {
    const float* const key = call.qkv + token * g.token_stride + (g.heads + kv_head) * g.head_dim;
    const float* const value = key + g.kv_heads * g.head_dim;
    const size_t angles = (g.start_pos + token) * (g.head_dim / 2);
    const size_t at = first + token;
    Rotate(key, call.cos + angles, call.sin + angles, g.head_dim, 1.0f, rotated);
    StoreHead(rotated, g.head_dim, static_cast<T*>(call.key_cache) + at * g.head_dim,
              scaled ? call.key_scales + at : nullptr);
    StoreHead(value, g.head_dim, static_cast<T*>(call.value_cache) + at * g.head_dim,
              scaled ? call.value_scales + at : nullptr);
  }
}

void WriteCacheTask(const AttentionCall& call, size_t kv_head, float* scratch) {
  switch (call.key_values) {
    case KeyValues::kProjection:
      return;
    case KeyValues::kFloat32Cache:
      return WriteCacheAs<float>(call, kv_head, scratch);
    case KeyValues::kFloat16Cache:
      return WriteCacheAs<float16_t>(call, kv_head, scratch);
    case KeyValues::kInt8Cache:
      return WriteCacheAs<int8_t>(call, kv_head, scratch);
  }
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

// Transposes a block's queries: out[i][w] = query of row w, component i. Lanes past the last row
// repeat it, so that they compute something finite that nobody reads. `four` has room for kTile
// queries, `row_stride` floats apart.
HWY_INLINE void LoadQueries(const AttentionCall& call, const Geometry& g, size_t kv_head,
                            size_t first_row, size_t rows, size_t width, size_t row_stride,
                            float* HWY_RESTRICT four, float* HWY_RESTRICT out) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  HWY_ALIGN float interleaved[kTile * kMaxLanes];
  const float* const q0 = four;
  const float* const q1 = four + row_stride;
  const float* const q2 = four + 2 * row_stride;
  const float* const q3 = four + 3 * row_stride;
  for (size_t w = 0; w < width; w += kTile) {
    for (size_t i = 0; i < kTile; ++i) {
      const size_t row = first_row + std::min(w + i, rows - 1);
      LoadQuery(call, g, kv_head, row, four + i * row_stride);
    }
    // Narrow vectors (fewer than 4 lanes) may leave less than a tile of columns.
    const size_t columns = std::min(kTile, width - w);
    size_t i = 0;
    for (; columns == kTile && i + lanes <= g.head_dim; i += lanes) {
      hn::StoreInterleaved4(hn::LoadU(d, q0 + i), hn::LoadU(d, q1 + i), hn::LoadU(d, q2 + i),
                            hn::LoadU(d, q3 + i), d, interleaved);
      for (size_t lane = 0; lane < lanes; ++lane) {
        std::memcpy(out + (i + lane) * width + w, interleaved + kTile * lane,
                    kTile * sizeof(float));
      }
    }
    for (; i < g.head_dim; ++i) {
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

// One step of the running softmax: scores become probabilities relative to the new maximum, and
// `factor` what the output so far is to be multiplied by.
template <size_t kVectors>
HWY_INLINE void SoftmaxStep(size_t keys, float* HWY_RESTRICT scores, float* HWY_RESTRICT maximum,
                            float* HWY_RESTRICT sum, float* HWY_RESTRICT factor) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t width = kVectors * lanes;
  for (size_t v = 0; v < kVectors; ++v) {
    float* const column = scores + v * lanes;
    const Vector before = hn::Load(d, maximum + v * lanes);
    Vector now = before;
    for (size_t key = 0; key < keys; ++key) {
      now = hn::Max(now, hn::Load(d, column + key * width));
    }
    Vector total = hn::Zero(d);
    for (size_t key = 0; key < keys; ++key) {
      const Vector p = Exp2(hn::Sub(hn::Load(d, column + key * width), now));
      hn::Store(p, d, column + key * width);
      total = hn::Add(total, p);
    }
    const Vector f = Exp2(hn::Sub(before, now));
    hn::Store(f, d, factor + v * lanes);
    hn::Store(hn::MulAdd(f, hn::Load(d, sum + v * lanes), total), d, sum + v * lanes);
    hn::Store(now, d, maximum + v * lanes);
  }
}

// A block of rows on its way along the keys.
struct RowBlock {
  size_t first_row;
  size_t rows;
  float* queries;  // [head_dim][width]
  float* outputs;  // [head_dim][width]
  HWY_ALIGN float maximum[kMaxRows];
  HWY_ALIGN float sum[kMaxRows];
};

// Takes a block of rows past `count` keys from `first_key` on.
template <size_t kVectors>
HWY_INLINE void BlockStep(const Geometry& g, size_t first_key, size_t count,
                          const float* HWY_RESTRICT keys, const float* HWY_RESTRICT values,
                          float* HWY_RESTRICT scores, RowBlock& block) {
  const size_t width = kVectors * hn::Lanes(Tag());
  HWY_ALIGN float factor[kMaxRows];
  for (size_t i = 0; i < count; i += kTile) {
    // The tile's surplus rows repeat the last key: what lies past it must not be read.
    const float* k0 = keys + i * g.head_dim;
    const float* k1 = keys + std::min(i + 1, count - 1) * g.head_dim;
    const float* k2 = keys + std::min(i + 2, count - 1) * g.head_dim;
    const float* k3 = keys + std::min(i + 3, count - 1) * g.head_dim;
    OuterTile<kVectors, false>(block.queries, g.head_dim, k0, k1, k2, k3, 1, nullptr,
                               scores + i * width);
  }
  if (first_key + count > g.VisibleKeys(block.first_row)) {
    HWY_ALIGN float visible[kMaxRows];
    for (size_t w = 0; w < width; ++w) {
      const size_t row = block.first_row + std::min(w, block.rows - 1);
      visible[w] = static_cast<float>(static_cast<int64_t>(g.VisibleKeys(row)) -
                                      static_cast<int64_t>(first_key));
    }
    MaskFuture<kVectors>(visible, count, scores);
  }
  SoftmaxStep<kVectors>(count, scores, block.maximum, block.sum, factor);
  for (size_t i = 0; i < g.head_dim; i += kTile, values += kPanel) {
    OuterTile<kVectors, true>(scores, count, values, values + 1, values + 2, values + 3, kTile,
                              factor, block.outputs + i * width);
  }
}

// Converts `count` keys to float, [keys][head_dim], times their scales.
template <class T>
HWY_INLINE void LoadKeys(const T* HWY_RESTRICT keys, size_t stride, const float* scales,
                         size_t count, size_t head_dim, float* HWY_RESTRICT out) {
  for (size_t key = 0; key < count; ++key) {
    const T* const from = keys + key * stride;
    float* const to = out + key * head_dim;
    const float scale = scales == nullptr ? 1.0f : scales[key];
    ForVectors(head_dim, [&](auto d, size_t i) {
      hn::StoreU(hn::Mul(LoadFloat(d, from + i), hn::Set(d, scale)), d, to + i);
    });
  }
}

// Converts `count` values to float, times their scales, into panels [head_dim / kTile][keys][kTile]
// that are kPanel floats apart. `row` has room for one value, rounded up to whole tiles.
template <class T>
HWY_INLINE void LoadValues(const T* HWY_RESTRICT values, size_t stride, const float* scales,
                           size_t count, size_t head_dim, float* HWY_RESTRICT row,
                           float* HWY_RESTRICT out) {
  // Components past the last one are computed too, and not used.
  std::fill(row + head_dim, row + RoundUp(head_dim, kTile), 0.0f);
  for (size_t key = 0; key < count; ++key) {
    LoadKeys(values + key * stride, stride, scales == nullptr ? nullptr : scales + key, 1, head_dim,
             row);
    float* to = out + key * kTile;
    for (size_t i = 0; i < head_dim; i += kTile, to += kPanel) {
      std::memcpy(to, row + i, kTile * sizeof(float));
    }
  }
}

// Attends for `rows` <= kTaskBlocks * BlockRows() rows of one kv head, starting at `first_row`.
template <class T>
void AttendBlocks(const AttentionCall& call, const Geometry& g, const Source<T>& source,
                  size_t kv_head, size_t first_row, size_t rows, float* HWY_RESTRICT scratch) {
  const size_t lanes = hn::Lanes(Tag());
  const BlockScratch layout(g, BlockRows());
  float* const scores = scratch + layout.scores;
  float* const four = scratch + layout.rows;
  float* const own_keys = scratch + layout.keys;
  float* const values = scratch + layout.values;

  RowBlock blocks[kTaskBlocks];
  size_t num_blocks = 0;
  for (size_t done = 0; done < rows; done += BlockRows()) {
    RowBlock& block = blocks[num_blocks];
    block.first_row = first_row + done;
    block.rows = std::min(BlockRows(), rows - done);
    block.queries = scratch + layout.queries + num_blocks * layout.transposed;
    block.outputs = scratch + layout.outputs + num_blocks * layout.transposed;
    const size_t width = RoundUp(block.rows, lanes);
    std::fill_n(block.maximum, width, -kInfinity);
    std::fill_n(block.sum, width, 0.0f);
    std::fill_n(block.outputs, RoundUp(g.head_dim, kTile) * width, 0.0f);
    LoadQueries(call, g, kv_head, block.first_row, block.rows, width, layout.row, four,
                block.queries);
    ++num_blocks;
  }

  const size_t seen_by_last = g.VisibleKeys(first_row + rows - 1);
  for (size_t key = 0; key < seen_by_last; key += kKeyBlock) {
    const size_t count = std::min(kKeyBlock, seen_by_last - key);
    const T* const from = source.keys + key * source.stride;
    const float* keys = own_keys;
    bool in_place = false;
    if constexpr (std::is_same_v<T, float>) {
      // Rows that lie apart by a power of two would fall on the same lines of the L1 cache.
      in_place = source.stride == g.head_dim;
      if (in_place) keys = from;
    }
    if (!in_place) {
      LoadKeys(from, source.stride,
               source.key_scales == nullptr ? nullptr : source.key_scales + key, count, g.head_dim,
               own_keys);
    }
    LoadValues(source.values + key * source.stride, source.stride,
               source.value_scales == nullptr ? nullptr : source.value_scales + key, count,
               g.head_dim, four, values);
    for (size_t b = 0; b < num_blocks; ++b) {
      RowBlock& block = blocks[b];
      const size_t visible = g.VisibleKeys(block.first_row + block.rows - 1);
      if (visible <= key) continue;
      const size_t seen = std::min(count, visible - key);
      switch (DivideUp(block.rows, lanes)) {
        case 1:
          BlockStep<1>(g, key, seen, keys, values, scores, block);
          break;
        case 2:
          BlockStep<2>(g, key, seen, keys, values, scores, block);
          break;
        default:
          BlockStep<3>(g, key, seen, keys, values, scores, block);
          break;
      }
    }
  }
  for (size_t b = 0; b < num_blocks; ++b) {
    RowBlock& block = blocks[b];
    const size_t width = RoundUp(block.rows, lanes);
    size_t row_offset[kMaxRows];
    for (size_t row = 0; row < block.rows; ++row) {
      row_offset[row] = g.OutOffset(kv_head, block.first_row + row);
    }
    for (size_t w = 0; w < width; ++w) block.sum[w] = 1.0f / block.sum[w];
    StoreOutputs(block.outputs, block.sum, row_offset, block.rows, width, g.head_dim, call.out);
  }
}

// Dot products of one query with 8 keys that lie `stride` elements apart; the last of `count`
// stands in for those that are missing.
template <class T>
HWY_INLINE void Dot8(const float* HWY_RESTRICT query, const T* HWY_RESTRICT keys, size_t stride,
                     size_t count, size_t head_dim, float* HWY_RESTRICT scores) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t last = count - 1;
  const T* k0 = keys;
  const T* k1 = keys + std::min<size_t>(1, last) * stride;
  const T* k2 = keys + std::min<size_t>(2, last) * stride;
  const T* k3 = keys + std::min<size_t>(3, last) * stride;
  const T* k4 = keys + std::min<size_t>(4, last) * stride;
  const T* k5 = keys + std::min<size_t>(5, last) * stride;
  const T* k6 = keys + std::min<size_t>(6, last) * stride;
  const T* k7 = keys + std::min<size_t>(7, last) * stride;
  Vector s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  size_t i = 0;
  for (; i + lanes <= head_dim; i += lanes) {
    const Vector q = hn::LoadU(d, query + i);
    s0 = hn::MulAdd(q, LoadFloat(d, k0 + i), s0);
    s1 = hn::MulAdd(q, LoadFloat(d, k1 + i), s1);
    s2 = hn::MulAdd(q, LoadFloat(d, k2 + i), s2);
    s3 = hn::MulAdd(q, LoadFloat(d, k3 + i), s3);
    s4 = hn::MulAdd(q, LoadFloat(d, k4 + i), s4);
    s5 = hn::MulAdd(q, LoadFloat(d, k5 + i), s5);
    s6 = hn::MulAdd(q, LoadFloat(d, k6 + i), s6);
    s7 = hn::MulAdd(q, LoadFloat(d, k7 + i), s7);
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
    scores[0] += query[i] * ToFloat(k0 + i);
    scores[1] += query[i] * ToFloat(k1 + i);
    scores[2] += query[i] * ToFloat(k2 + i);
    scores[3] += query[i] * ToFloat(k3 + i);
    scores[4] += query[i] * ToFloat(k4 + i);
    scores[5] += query[i] * ToFloat(k5 + i);
    scores[6] += query[i] * ToFloat(k6 + i);
    scores[7] += query[i] * ToFloat(k7 + i);
  }
}

// out[i] = out[i] * factor + sum over keys of p[key] * values[key][i], for kVectors vectors of i.
// The first block ignores what `out` held.
template <size_t kVectors, class T>
HWY_INLINE void AccumulateValues(const float* HWY_RESTRICT p, size_t keys,
                                 const T* HWY_RESTRICT values, size_t stride, bool first,
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
    o0 = hn::MulAdd(w, LoadFloat(d, values), o0);
    if constexpr (kVectors > 1) o1 = hn::MulAdd(w, LoadFloat(d, values + lanes), o1);
    if constexpr (kVectors > 2) {
      o2 = hn::MulAdd(w, LoadFloat(d, values + 2 * lanes), o2);
      o3 = hn::MulAdd(w, LoadFloat(d, values + 3 * lanes), o3);
    }
    if constexpr (kVectors > 4) {
      o4 = hn::MulAdd(w, LoadFloat(d, values + 4 * lanes), o4);
      o5 = hn::MulAdd(w, LoadFloat(d, values + 5 * lanes), o5);
      o6 = hn::MulAdd(w, LoadFloat(d, values + 6 * lanes), o6);
      o7 = hn::MulAdd(w, LoadFloat(d, values + 7 * lanes), o7);
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
template <class T>
void AttendRows(const AttentionCall& call, const Geometry& g, const Source<T>& source,
                size_t kv_head, size_t first_row, size_t rows, float* HWY_RESTRICT scratch) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  const size_t head_dim = g.head_dim;
  const size_t stride = source.stride;
  float* const scores = scratch;
  float* const queries = scratch + kKeyBlock;
  float maximum[kMaxLanes];
  float sum[kMaxLanes];
  for (size_t row = 0; row < rows; ++row) {
    maximum[row] = -kInfinity;
    sum[row] = 0.0f;
    LoadQuery(call, g, kv_head, first_row + row, queries + row * head_dim);
  }

  const size_t seen_by_last = g.VisibleKeys(first_row + rows - 1);
  for (size_t key = 0; key < seen_by_last; key += kKeyBlock) {
    const T* const keys = source.keys + key * stride;
    const T* const values = source.values + key * stride;
    for (size_t row = 0; row < rows; ++row) {
      const size_t visible = g.VisibleKeys(first_row + row);
      if (visible <= key) continue;
      const size_t count = std::min(kKeyBlock, visible - key);
      const float* const query = queries + row * head_dim;
      float* const out = call.out + g.OutOffset(kv_head, first_row + row);

      for (size_t i = 0; i < count; i += 8) {
        Dot8(query, keys + i * stride, stride, count - i, head_dim, scores + i);
      }
      if (source.key_scales != nullptr) MultiplyBy(source.key_scales + key, count, scores);
      const size_t padded = RoundUp(count, lanes);
      std::fill(scores + count, scores + padded, -kInfinity);
      Vector largest = hn::Set(d, maximum[row]);
      for (size_t i = 0; i < count; i += lanes) {
        largest = hn::Max(largest, hn::Load(d, scores + i));
      }
      largest = hn::MaxOfLanes(d, largest);
      Vector total = hn::Zero(d);
      for (size_t i = 0; i < count; i += lanes) {
        const Vector p = Exp2(hn::Sub(hn::Load(d, scores + i), largest));
        hn::Store(p, d, scores + i);
        total = hn::Add(total, p);
      }
      const float factor = hn::GetLane(Exp2(hn::Sub(hn::Set(d, maximum[row]), largest)));
      maximum[row] = hn::GetLane(largest);
      sum[row] = sum[row] * factor + hn::GetLane(hn::SumOfLanes(d, total));
      if (source.value_scales != nullptr) MultiplyBy(source.value_scales + key, count, scores);

      const bool first = key == 0;
      size_t i = 0;
      for (; i + 8 * lanes <= head_dim; i += 8 * lanes) {
        AccumulateValues<8>(scores, count, values + i, stride, first, factor, out + i);
      }
      if (i + 4 * lanes <= head_dim) {
        AccumulateValues<4>(scores, count, values + i, stride, first, factor, out + i);
        i += 4 * lanes;
      }
      if (i + 2 * lanes <= head_dim) {
        AccumulateValues<2>(scores, count, values + i, stride, first, factor, out + i);
        i += 2 * lanes;
      }
      if (i + lanes <= head_dim) {
        AccumulateValues<1>(scores, count, values + i, stride, first, factor, out + i);
        i += lanes;
      }
      for (; i < head_dim; ++i) {
        float o = first ? 0.0f : out[i] * factor;
        for (size_t j = 0; j < count; ++j) o += scores[j] * ToFloat(values + j * stride + i);
        out[i] = o;
      }
    }
  }
  for (size_t row = 0; row < rows; ++row) {
    float* const out = call.out + g.OutOffset(kv_head, first_row + row);
    const float reciprocal = 1.0f / sum[row];
    for (size_t i = 0; i < head_dim; ++i) out[i] *= reciprocal;
  }
}

template <class T>
void AttendFrom(const AttentionCall& call, const Geometry& g, const Source<T>& source,
                size_t kv_head, size_t first_row, size_t rows, float* scratch) {
  if (rows <= FewRows()) {
    AttendRows(call, g, source, kv_head, first_row, rows, scratch);
  } else {
    AttendBlocks(call, g, source, kv_head, first_row, rows, scratch);
  }
}

template <class T>
Source<T> CacheOf(const AttentionCall& call, const Geometry& g, size_t kv_head) {
  const size_t positions = kv_head * static_cast<size_t>(call.capacity);
  const bool scaled = call.key_values == KeyValues::kInt8Cache;
  return {static_cast<const T*>(call.key_cache) + positions * g.head_dim,
          static_cast<const T*>(call.value_cache) + positions * g.head_dim, g.head_dim,
          scaled ? call.key_scales + positions : nullptr,
          scaled ? call.value_scales + positions : nullptr};
}

void AttendTask(const AttentionCall& call, size_t task, float* scratch) {
  const Geometry g(call);
  const size_t task_rows = kTaskBlocks * BlockRows();
  const size_t tasks = DivideUp(g.rows, task_rows);
  const size_t kv_head = task / tasks;
  // Longest first, so that no worker is left with a long task at the end.
  const size_t first_row = (tasks - 1 - task % tasks) * task_rows;
  const size_t rows = std::min(task_rows, g.rows - first_row);
  switch (call.key_values) {
    case KeyValues::kProjection: {
      const float* const keys = call.qkv + (g.heads + kv_head) * g.head_dim;
      const Source<float> source = {keys, keys + g.kv_heads * g.head_dim, g.token_stride, nullptr,
                                    nullptr};
      return AttendFrom(call, g, source, kv_head, first_row, rows, scratch);
    }
    case KeyValues::kFloat32Cache:
      return AttendFrom(call, g, CacheOf<float>(call, g, kv_head), kv_head, first_row, rows,
                        scratch);
    case KeyValues::kFloat16Cache:
      return AttendFrom(call, g, CacheOf<float16_t>(call, g, kv_head), kv_head, first_row, rows,
                        scratch);
    case KeyValues::kInt8Cache:
      return AttendFrom(call, g, CacheOf<int8_t>(call, g, kv_head), kv_head, first_row, rows,
                        scratch);
  }
}

// Floats for one worker.
size_t ScratchSize(const AttentionCall& call) {
  const Geometry g(call);
  const size_t few = kKeyBlock + std::min(g.rows, FewRows()) * g.head_dim;
  return g.rows <= FewRows() ? few : std::max(few, BlockScratch(g, BlockRows()).size);
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
HWY_EXPORT(ScratchSize);
HWY_EXPORT(TargetName);
HWY_EXPORT(WriteCacheTask);
}  // namespace

void WriteCache(const AttentionCall& call, int64_t kv_head, void* scratch) {
  HWY_DYNAMIC_DISPATCH(WriteCacheTask)
  (call, static_cast<size_t>(kv_head), static_cast<float*>(scratch));
}

int64_t AttentionTasks(const AttentionCall& call) {
  const size_t task_rows = kTaskBlocks * HWY_DYNAMIC_DISPATCH(BlockRows)();
  return call.kv_heads * static_cast<int64_t>(DivideUp(Geometry(call).rows, task_rows));
}

size_t AttentionScratchBytes(const AttentionCall& call) {
  return RoundUp(HWY_DYNAMIC_DISPATCH(ScratchSize)(call) * sizeof(float), kScratchAlignment);
}

void Attend(const AttentionCall& call, int64_t task, void* scratch) {
  HWY_DYNAMIC_DISPATCH(AttendTask)(call, static_cast<size_t>(task), static_cast<float*>(scratch));
}

const char* AttentionTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

int64_t AttentionWorkers(const AttentionCall& call, int64_t threads) {
  // Keys seen by a query on average.
  const int64_t keys = call.key_values == KeyValues::kProjection
                           ? call.tokens
                           : call.start_pos + (call.tokens + 1) / 2;
  const int64_t multiply_adds = 2 * call.tokens * call.heads * call.head_dim * keys;
  const int64_t worthwhile = 1 + multiply_adds / kMinMultiplyAddsPerWorker;
  return std::max<int64_t>(1, std::min({threads, worthwhile, AttentionTasks(call)}));
}

}  // namespace mvlm
#endif  // HWY_ONCE

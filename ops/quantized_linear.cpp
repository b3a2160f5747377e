// The SIMD kernel. Highway compiles everything between HWY_BEFORE_NAMESPACE and
// HWY_AFTER_NAMESPACE once per instruction set and picks one when the program runs.
//
// Many rows. A task computes a panel of columns, two vectors of 32 bit lanes. Its weights are
// unpacked, a block of k at a time, into a buffer that stays in the L1 cache while all rows are
// multiplied by it. The buffer is laid out for a register tile (rows times two vectors of columns)
// without horizontal sums: 32 bits of a row's quantized numbers are broadcast and multiplied by the
// same k of every column.
//
//   4 bits: 32 bits are 4 k. A nibble u = weight + 8 is unsigned, so that vpmaddubsw multiplies it
//   by a signed 8 bit number and adds pairs, at most 2 * 15 * 128 in magnitude: kSafeSums of them
//   fit 16 bits and are added there, which is what makes this fast. The offsets are dealt with per
//   group:
//     sum (q - zero_point) * weight = sum q * u - 8 * sum q - zero_point * sum weight,
//   of which the last two terms are a single vpmaddwd of pairs (-zero_point, sum q) by pairs (sum
//   weight, -8).
//
//   The order of k within the buffer is the one that unpacking gives for free. The quantized rows
//   are permuted alike, by (0 2 4 6 1 3 5 7).
//
//   8 bits: 32 bits are 4 k, u = q + 128 - minimum is the unsigned side of vpmaddubsw, two of its
//   results are added in 16 bits, and vpmaddwd with ones widens the sum: five instructions for 8 k,
//   where widening both sides first would take eight. Such a sum of four products may not fit 16
//   bits. What it can be at most is known: `minimum` is that of all rows at this k, and u is at
//   most the range of q there, which is narrow where others span the rows' scales. Weights that
//   are too many are zeroed in the buffer, listed, and multiplied apart, with rows in the lanes:
//   exact for whatever weights, and the faster the fewer there are. In a vision encoder with
//   normally distributed weights up to 6 % of the sums do not fit.
//     sum (q - zero_point) * weight = sum u * weight + sum minimum * weight
//                                     - (128 + zero_point) * sum weight.
//
// Few rows. Unpacking into a buffer would not pay: lanes hold k, and a row of weights is streamed
// through once, from memory to the sum. That is bound by memory.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "quantized_linear.cpp"
#include "quantized_linear.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "hwy/foreach_target.h"  // IWYU pragma: keep; must come before highway.h
#include "hwy/highway.h"

#ifndef MVLM_OPS_QUANTIZED_LINEAR_SHARED
#define MVLM_OPS_QUANTIZED_LINEAR_SHARED
namespace mvlm {
namespace {

constexpr size_t kMaxBytes = 64;  // of a vector
constexpr size_t kMaxLanes = kMaxBytes / sizeof(float);
constexpr size_t kMaxColumns = 2 * kMaxLanes;  // of a panel

// Sums of two products of a nibble and 8 bits that can be added up in 16 bits.
constexpr size_t kSafeSums = 8;
constexpr size_t kSafeDepth = 4 * kSafeSums;  // the k of them
static_assert(kSafeSums * 2 * 15 * 128 <= 32767);

constexpr size_t kMinGroup = 32;
// k of a panel that are unpacked at a time: 16 KiB with 8 lanes.
constexpr size_t kDepth4 = 1024;
constexpr size_t kDepth8 = 512;
// Rows that lie together. 4 bits: those of the register tile, the most that leave registers for the
// operands. 8 bits: as many as make 32 bits of each a vector.
constexpr size_t kTile4 = 4;
constexpr size_t kTile8 = kMaxLanes;
static_assert(kLinearRowsAtOnce % kTile8 == 0);
// 8 bits: rows of the register tile.
constexpr size_t kRegisterRows8 = 4;
// Rows of a task: their sums (48 KiB with 8 lanes) should stay in the L2 cache.
constexpr size_t kMaxTaskRows = 768;

constexpr size_t kPage = 4096;

// Up to this many rows weights are streamed.
constexpr size_t kFewRows = 3;
// Columns of a task then, of which kColumnsAtOnce share the loads of a quantized row.
constexpr size_t kFewRowsColumns = 64;
constexpr size_t kColumnsAtOnce = 4;

constexpr size_t RoundUp(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr size_t DivideUp(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

// 8 bits: k whose minima are looked for together, 1 KiB of a tile.
constexpr size_t kMinimaDepth = 64;
static_assert(kMinimaDepth % kMaxBytes == 0 && kDepth8 % kMinimaDepth == 0);

// How a row was quantized.
struct RowScale {
  float inverse;  // 1 / scale; NaN poisons the output
  int32_t zero_point;
};

// Weights of a column that are multiplied apart: those of four k, some of which are zero.
struct Excess {
  int32_t weights;
  int32_t word;  // k / 4, from the start of the panel
};
// Per column and panel: up to three of eight k, and one that is written to but never read.
constexpr size_t kMaxExcess = kDepth8 / 8 * 3 + 1;

// The call as the kernel sees it: sizes as size_t, and where things are in the scratch memory.
struct Geometry {
  // `lanes` is the number of 32 bit lanes in a vector.
  Geometry(const QuantizedLinear& linear, int64_t row_count, size_t lanes)
      : rows(static_cast<size_t>(row_count)),
        in(static_cast<size_t>(linear.in)),
        out(static_cast<size_t>(linear.out)),
        group(static_cast<size_t>(linear.group)),
        groups(group == 0 ? 0 : in / group),
        few_rows(rows <= kFewRows),
        columns(few_rows ? kFewRowsColumns : 2 * lanes),
        depth(group == 0 ? kDepth8 : kDepth4) {
    tile = group == 0 ? kTile8 : kTile4;
    row_blocks = few_rows ? 1 : DivideUp(rows, kMaxTaskRows);
    task_rows = RoundUp(DivideUp(rows, row_blocks), tile);
    row_blocks = DivideUp(rows, task_rows);

    row_bytes = RoundUp(in, kMaxBytes) * (group == 0 && few_rows ? 2 : 1);
    // What quantized rows bring along per group: a number, and if they are few a vector as well.
    sums_per_row = (few_rows ? groups * kMaxLanes : 0) + RoundUp(groups, kMaxLanes);

    const size_t padded_rows = few_rows ? rows : RoundUp(rows, tile);
    scales_at = RoundUp(padded_rows * row_bytes, kMaxBytes);
    sums_at = scales_at + RoundUp(rows * sizeof(RowScale), kMaxBytes);
    minima_at = sums_at + RoundUp(rows * sums_per_row * sizeof(int32_t), kMaxBytes);
    workers_at = minima_at + (group == 0 && !few_rows ? 2 * row_bytes : 0);

    // Quantizing and multiplying use the same memory, one after the other.
    const size_t quantized = RoundUp(in, kMaxBytes) * (group == 0 && !few_rows ? tile : 1);
    if (few_rows) {
      worker_bytes = quantized;
      return;
    }
    // Everything is aligned to a vector.
    const auto add = [this](size_t bytes) {
      const size_t at = worker_bytes;
      worker_bytes += RoundUp(bytes, kMaxBytes);
      return at;
    };
    if (group == 0) {
      // A panel and a tile are read in step, which is a fifth slower (on Zen 3) where addresses are
      // equal modulo a page: they are kept half a page apart.
      worker_bytes = (kPage + kPage / 2 - workers_at % kPage) % kPage;
    }
    panel_at = add(columns * depth);
    group_sums_at = add(columns * (group == 0 ? 2 : depth / group) * sizeof(int32_t));
    outputs_at = add(task_rows * columns * sizeof(float));
    if (group != 0) {
      group_scales_at = add(columns * (depth / group) * sizeof(float));
    } else {
      excess_at = add(columns * kMaxExcess * sizeof(Excess));
      excess_sums_at = add(task_rows * columns * sizeof(int32_t));
    }
    worker_bytes = std::max(worker_bytes, quantized);
    if (group == 0) worker_bytes = RoundUp(worker_bytes, kPage);
  }

  size_t Tasks() const { return DivideUp(out, columns) * row_blocks; }

  size_t rows;
  size_t in;
  size_t out;
  size_t group;
  size_t groups;  // per column
  bool few_rows;
  size_t columns;  // per task
  size_t depth;    // k of a panel that are unpacked at a time
  size_t tile;     // rows of the register tile
  size_t row_blocks;
  size_t task_rows;

  // Scratch memory that all workers share.
  size_t row_bytes;  // of a quantized row
  size_t sums_per_row;
  size_t scales_at;
  size_t sums_at;
  size_t minima_at;
  size_t workers_at;

  // Scratch memory of a worker.
  size_t panel_at = 0;
  size_t group_sums_at = 0;  // 8 bits: of the whole column, and of its products with the minima
  size_t outputs_at = 0;
  size_t group_scales_at = 0;
  size_t excess_at = 0;
  size_t excess_sums_at = 0;
  size_t worker_bytes = 0;
};

// The scratch memory with types.
class Scratch {
 public:
  Scratch(const LinearCall& call, const Geometry& g, size_t worker)
      : g_(g),
        shared_(static_cast<char*>(call.scratch)),
        own_(shared_ + g.workers_at + worker * g.worker_bytes) {}

  // A quantized row of few.
  void* Row(size_t row) const { return shared_ + row * g_.row_bytes; }

  // Of many: the tile that starts with `row`, from k on, which starts a panel. Tiles are read from
  // front to back, and lie in the order in which they are read.
  void* Tile(size_t row, size_t k) const {
    const size_t tiles = DivideUp(g_.rows, g_.tile);
    return shared_ + (k * tiles + row / g_.tile * Depth(k)) * g_.tile;
  }

  // Numbers of a row in a tile that starts with k.
  size_t Depth(size_t k) const { return std::min(g_.depth, RoundUp(g_.in, kMaxBytes) - k); }

  RowScale* Scales() const { return reinterpret_cast<RowScale*>(shared_ + g_.scales_at); }
  int32_t* Sums(size_t row) const {
    return reinterpret_cast<int32_t*>(shared_ + g_.sums_at) + row * g_.sums_per_row;
  }

  // Of few rows, per group.
  int32_t* ZeroPoints(size_t row) const { return Sums(row) + g_.groups * kMaxLanes; }

  // 8 bits, many rows: per k, half of the minimum, which is even, and how far above it numbers are.
  uint8_t* HalfMinima() const { return reinterpret_cast<uint8_t*>(shared_ + g_.minima_at); }
  uint8_t* Ranges() const { return HalfMinima() + g_.row_bytes; }

  // Rows that are being quantized: one, or as many as there are in a tile of 8 bits.
  int8_t* Quantized() const { return reinterpret_cast<int8_t*>(own_); }
  uint8_t* Panel() const { return reinterpret_cast<uint8_t*>(own_ + g_.panel_at); }
  float* GroupScales() const { return reinterpret_cast<float*>(own_ + g_.group_scales_at); }
  int32_t* GroupSums() const { return reinterpret_cast<int32_t*>(own_ + g_.group_sums_at); }
  void* Outputs() const { return own_ + g_.outputs_at; }
  Excess* ExcessOf(size_t column) const {
    return reinterpret_cast<Excess*>(own_ + g_.excess_at) + column * kMaxExcess;
  }
  int32_t* ExcessSums(size_t column) const {
    return reinterpret_cast<int32_t*>(own_ + g_.excess_sums_at) + column * g_.task_rows;
  }

 private:
  const Geometry& g_;
  char* shared_;
  char* own_;
};

// Two 16 bit numbers as one of 32 bits.
inline int32_t Pair(int32_t low, int32_t high) {
  return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffff) |
                              (static_cast<uint32_t>(high) << 16));
}

// A scale of 4 bit weights.
inline float FromBfloat16(const void* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// As XNNPACK's xnn_f32_qd8_asymmetric_quantization_params(). `scale` is 0 for rows that no scale
// fits: all numbers are quantized to the zero point then.
RowScale ChooseScale(float smallest, float largest, float* scale) {
  smallest = std::min(smallest, 0.0f);
  largest = std::max(largest, 0.0f);
  const float range = largest - smallest;
  *scale = range == 0 ? 1.0f : 255.0f / range;
  if (!std::isfinite(range) || !std::isfinite(*scale)) {
    *scale = 0;
    // Overflow shows in the output. Rows that are denormal throughout count as zeros.
    return {std::isfinite(range) ? 1.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float low = smallest * *scale;
  const float high = largest * *scale;
  // The zero point follows from the end of the range where rounding has the smaller error.
  const float zero_point = (-128.0f + low) + (127.0f + high) > 0 ? -128.0f - low : 127.0f - high;
  return {1.0f / *scale,
          static_cast<int32_t>(std::nearbyintf(std::min(std::max(zero_point, -128.0f), 127.0f)))};
}

}  // namespace
}  // namespace mvlm
#endif  // MVLM_OPS_QUANTIZED_LINEAR_SHARED

HWY_BEFORE_NAMESPACE();
namespace mvlm {
namespace {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Vectors of all widths are named by their bytes; kernels take them as large as they come, except
// where a group of weights is smaller.
template <size_t kBytes>
using Bytes = hn::CappedTag<uint8_t, kBytes>;
using FloatTag = hn::CappedTag<float, kMaxLanes>;

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

size_t VectorLanes() { return hn::Lanes(FloatTag()); }

#if HWY_TARGET != HWY_SCALAR
// Sums of pairs of products: out[i] = u[2 i] * s[2 i] + u[2 i + 1] * s[2 i + 1], unsigned times
// signed. A sum that does not fit 16 bits saturates.
template <class D16, class VU, class VS>
HWY_INLINE hn::Vec<D16> MultiplyPairs8(D16 d16, VU u, VS s) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if constexpr (sizeof(u.raw) == 64) return hn::Vec<D16>{_mm512_maddubs_epi16(u.raw, s.raw)};
#endif
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  if constexpr (sizeof(u.raw) == 32) return hn::Vec<D16>{_mm256_maddubs_epi16(u.raw, s.raw)};
#endif
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  if constexpr (sizeof(u.raw) == 16) return hn::Vec<D16>{_mm_maddubs_epi16(u.raw, s.raw)};
#else
  const hn::RebindToUnsigned<D16> du;
  const auto u_pair = hn::BitCast(du, u);
  const auto s_pair = hn::BitCast(d16, s);
  const auto u_even = hn::BitCast(d16, hn::And(u_pair, hn::Set(du, 0xff)));
  const auto u_odd = hn::BitCast(d16, hn::ShiftRight<8>(u_pair));
  const auto s_even = hn::ShiftRight<8>(hn::ShiftLeft<8>(s_pair));
  const auto s_odd = hn::ShiftRight<8>(s_pair);
  return hn::SaturatedAdd(hn::Mul(u_even, s_even), hn::Mul(u_odd, s_odd));
#endif
}

// The same of 16 bits, both signed: out[i] = a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1].
template <class D32, class V>
HWY_INLINE hn::Vec<D32> MultiplyPairs16(D32 d32, V a, V b) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if constexpr (sizeof(a.raw) == 64) return hn::Vec<D32>{_mm512_madd_epi16(a.raw, b.raw)};
#endif
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  if constexpr (sizeof(a.raw) == 32) return hn::Vec<D32>{_mm256_madd_epi16(a.raw, b.raw)};
#endif
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  if constexpr (sizeof(a.raw) == 16) return hn::Vec<D32>{_mm_madd_epi16(a.raw, b.raw)};
#else
  const auto a_pair = hn::BitCast(d32, a);
  const auto b_pair = hn::BitCast(d32, b);
  const auto a_even = hn::ShiftRight<16>(hn::ShiftLeft<16>(a_pair));
  const auto b_even = hn::ShiftRight<16>(hn::ShiftLeft<16>(b_pair));
  return hn::Add(hn::Mul(a_even, b_even),
                 hn::Mul(hn::ShiftRight<16>(a_pair), hn::ShiftRight<16>(b_pair)));
#endif
}

// sum += v, for 16 or 32 bit lanes. The compiler must not add in another order (GCC would compute
// all products of a loop first), nor in another register: tiles have none to spare.
template <class V>
HWY_INLINE void Accumulate(V& sum, V v) {
#if HWY_ARCH_X86
  sum = hn::Add(sum, v);
  asm volatile("" : "+v"(sum.raw));
#else
  sum = hn::Add(sum, v);
#endif
}

// 32 bits at `from` in every lane, as a vector of D.
template <class D>
HWY_INLINE hn::Vec<D> Broadcast32(D d, const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return hn::BitCast(d, hn::Set(hn::Repartition<int32_t, D>(), bits));
}
#endif  // HWY_TARGET != HWY_SCALAR

// Quantizes a row into `quantized`, followed by zero points up to whole vectors of kMaxBytes.
HWY_INLINE RowScale QuantizeRow(const float* HWY_RESTRICT x, size_t count,
                                int8_t* HWY_RESTRICT quantized) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const hn::Rebind<int8_t, FloatTag> d8;
  using V = hn::Vec<FloatTag>;
  const size_t lanes = hn::Lanes(d);
  V low = hn::Zero(d), high = low, low1 = low, high1 = low;
  V poison = low;  // becomes NaN if a number is NaN or infinite
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const V a = hn::LoadU(d, x + i);
    const V b = hn::LoadU(d, x + i + lanes);
    low = hn::Min(low, a);
    low1 = hn::Min(low1, b);
    high = hn::Max(high, a);
    high1 = hn::Max(high1, b);
    poison = hn::MulAdd(hn::Zero(d), a, hn::MulAdd(hn::Zero(d), b, poison));
  }
  float smallest = hn::GetLane(hn::MinOfLanes(d, hn::Min(low, low1)));
  float largest = hn::GetLane(hn::MaxOfLanes(d, hn::Max(high, high1)));
  float not_finite = hn::GetLane(hn::SumOfLanes(d, poison));
  for (size_t j = i; j < count; ++j) {
    smallest = std::min(smallest, x[j]);
    largest = std::max(largest, x[j]);
    not_finite += 0.0f * x[j];
  }
  float scale;
  RowScale result = ChooseScale(smallest, std::isnan(not_finite) ? not_finite : largest, &scale);
  if (std::isnan(not_finite)) {
    std::fill_n(quantized, RoundUp(count, kMaxBytes), int8_t{0});
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const V scales = hn::Set(d, scale);
  const auto zero_point = hn::Set(di, result.zero_point);
  const auto quantize = [&](V v) HWY_ATTR {
    // Narrowing saturates.
    return hn::DemoteTo(d8, hn::Add(hn::NearestInt(hn::Mul(v, scales)), zero_point));
  };
  for (i = 0; i + lanes <= count; i += lanes) {
    hn::StoreU(quantize(hn::LoadU(d, x + i)), d8, quantized + i);
  }
  if (i < count) {
    HWY_ALIGN float rest[kMaxLanes] = {};
    HWY_ALIGN int8_t narrow[kMaxLanes];
    std::copy(x + i, x + count, rest);
    hn::StoreU(quantize(hn::Load(d, rest)), d8, narrow);
    std::copy_n(narrow, count - i, quantized + i);
  }
  std::fill(quantized + count, quantized + RoundUp(count, kMaxBytes),
            static_cast<int8_t>(result.zero_point));
  return result;
}

#if HWY_TARGET != HWY_SCALAR
// Applies a permutation of 16 bytes to all of them; `bytes` is a multiple of kMaxBytes.
HWY_INLINE void Permute(void* row, size_t bytes, const uint8_t* order) {
  const Bytes<kMaxBytes> d;
  const auto indices = hn::LoadDup128(d, order);
  uint8_t* const at = static_cast<uint8_t*>(row);
  for (size_t i = 0; i < bytes; i += hn::Lanes(d)) {
    hn::Store(hn::TableLookupBytes(hn::Load(d, at + i), indices), d, at + i);
  }
}

// 4 bits: puts a quantized row where its tile is, tile[k / 4][row][4].
HWY_INLINE void StoreInTile(const Geometry& g, const Scratch& scratch, size_t row,
                            const void* quantized) {
  constexpr size_t kWord = 4;
  const char* from = static_cast<const char*>(quantized);
  for (size_t k = 0; k < g.in; k += g.depth) {
    char* to = static_cast<char*>(scratch.Tile(row, k)) + row % g.tile * kWord;
    for (size_t i = 0; i < scratch.Depth(k); i += kWord, from += kWord, to += g.tile * kWord) {
      std::memcpy(to, from, kWord);
    }
  }
}

// ------------------------------------------------------------------------------ many rows, 4 bits

// Sixteen bytes of as many rows as there are 32 bit lanes / 4 blocks: block b from rows[4 * b].
template <class D>
HWY_INLINE hn::Vec<D> LoadBlocks(D d, const uint8_t* const* rows, size_t offset) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  const hn::FixedTag<uint8_t, 16> d128;
  const hn::FixedTag<uint8_t, 32> d256;
  const auto low =
      hn::Combine(d256, hn::LoadU(d128, rows[4] + offset), hn::LoadU(d128, rows[0] + offset));
#if HWY_TARGET <= HWY_AVX3
  const auto high =
      hn::Combine(d256, hn::LoadU(d128, rows[12] + offset), hn::LoadU(d128, rows[8] + offset));
  return hn::Combine(d, high, low);
#else
  (void)d;
  return low;
#endif
#else
  HWY_ALIGN uint8_t blocks[kMaxBytes];
  for (size_t i = 0; i < hn::Lanes(d); i += 16) std::memcpy(blocks + i, rows[i / 4] + offset, 16);
  return hn::Load(d, blocks);
#endif
}

// Reads sixteen bytes of as many rows as there are 32 bit lanes, and calls use(i, v) with bytes 4 i
// .. 4 i + 3 of all rows, for i < 4.
template <class D, class Use>
HWY_INLINE void Transpose32(D d, const uint8_t* const* rows, size_t offset, const Use& use) {
  const hn::Repartition<uint32_t, D> d32;
  const hn::Repartition<uint64_t, D> d64;
  const auto a = hn::BitCast(d32, LoadBlocks(d, rows, offset));
  const auto b = hn::BitCast(d32, LoadBlocks(d, rows + 1, offset));
  const auto c = hn::BitCast(d32, LoadBlocks(d, rows + 2, offset));
  const auto e = hn::BitCast(d32, LoadBlocks(d, rows + 3, offset));
  const auto ab01 = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
  const auto ab23 = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
  const auto ce01 = hn::BitCast(d64, hn::InterleaveLower(d32, c, e));
  const auto ce23 = hn::BitCast(d64, hn::InterleaveUpper(d32, c, e));
  use(0, hn::BitCast(d, hn::InterleaveLower(d64, ab01, ce01)));
  use(1, hn::BitCast(d, hn::InterleaveUpper(d64, ab01, ce01)));
  use(2, hn::BitCast(d, hn::InterleaveLower(d64, ab23, ce23)));
  use(3, hn::BitCast(d, hn::InterleaveUpper(d64, ab23, ce23)));
}

// Unpacks `depth` k (a multiple of kMinGroup) of the columns whose packed bytes start at `rows`:
// panel[k / 4][column][4].
HWY_INLINE void UnpackPanel4(const uint8_t* const* rows, size_t depth,
                             uint8_t* HWY_RESTRICT panel) {
  const Bytes<kMaxBytes> d;
  const hn::Repartition<uint16_t, decltype(d)> d16;
  const size_t bytes = hn::Lanes(d);
  const auto nibble = hn::Set(d, 0x0f);
  for (size_t vector = 0; vector < 2; ++vector, rows += bytes / 4, panel += bytes) {
    for (size_t k = 0; k < depth; k += kMinGroup) {
      uint8_t* const to = panel + k / 4 * 2 * bytes;
      Transpose32(d, rows, k / 2, [&](size_t i, hn::Vec<decltype(d)> v) HWY_ATTR {
        const auto high = hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(d16, v)));
        hn::Store(hn::And(v, nibble), d, to + 4 * i * bytes);
        hn::Store(hn::And(high, nibble), d, to + (4 * i + 2) * bytes);
      });
    }
  }
}

// For each group and column of an unpacked panel: the pair (sum of weights, -8).
HWY_INLINE void SumPanel4(const uint8_t* HWY_RESTRICT panel, size_t groups, size_t group,
                          int32_t* HWY_RESTRICT sums) {
  const Bytes<kMaxBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const size_t bytes = hn::Lanes(d);
  const auto ones8 = hn::Set(d8, 1);
  const auto ones16 = hn::Set(d16, 1);
  const auto offset = hn::Set(d32, static_cast<int32_t>(8 * group));
  const auto low_half = hn::Set(d32, 0xffff);
  const auto high_half = hn::Set(d32, Pair(0, -8));
  for (size_t g = 0; g < groups; ++g) {
    auto sum0 = hn::Zero(d16), sum1 = sum0;
    for (size_t k = 0; k < group; k += 4, panel += 2 * bytes) {
      sum0 = hn::Add(sum0, MultiplyPairs8(d16, hn::Load(d, panel), ones8));
      sum1 = hn::Add(sum1, MultiplyPairs8(d16, hn::Load(d, panel + bytes), ones8));
    }
    const auto weights0 = hn::Sub(MultiplyPairs16(d32, sum0, ones16), offset);
    const auto weights1 = hn::Sub(MultiplyPairs16(d32, sum1, ones16), offset);
    hn::Store(hn::Or(hn::And(weights0, low_half), high_half), d32, sums);
    hn::Store(hn::Or(hn::And(weights1, low_half), high_half), d32, sums + bytes / 4);
    sums += bytes / 2;
  }
}

// Multiplies kRows <= kTile4 quantized rows by a panel and adds to their rows of `outputs`.
// `row_sums` has the pairs (-zero_point, sum of q) of the rows' groups. Accumulators are named, not
// an array, since SVE's vectors have no size at compile time.
template <size_t kRows>
HWY_NOINLINE void MultiplyPanel4(const uint8_t* HWY_RESTRICT panel, size_t groups, size_t group,
                                 const float* HWY_RESTRICT group_scales,
                                 const int32_t* HWY_RESTRICT group_sums,
                                 const int8_t* HWY_RESTRICT tile, const int32_t* row_sums,
                                 size_t sums_per_row, float* HWY_RESTRICT outputs) {
  static_assert(1 <= kRows && kRows <= kTile4);
  const Bytes<kMaxBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const hn::Repartition<float, decltype(d)> df;
  using V16 = hn::Vec<decltype(d16)>;
  const size_t bytes = hn::Lanes(d);
  const size_t lanes = bytes / 4;
  const size_t width = 2 * lanes;
  const auto ones = hn::Set(d16, 1);
  // Exact sums of a group. There are no registers left for them.
  HWY_ALIGN int32_t exact[kRows * kMaxColumns];
  const auto widen = [&](V16 sum, int32_t* to) HWY_ATTR {
    hn::Store(hn::Add(hn::Load(d32, to), MultiplyPairs16(d32, sum, ones)), d32, to);
  };

  for (size_t g = 0; g < groups; ++g) {
    const V16 sums0 = hn::BitCast(d16, hn::Load(d32, group_sums + g * width));
    const V16 sums1 = hn::BitCast(d16, hn::Load(d32, group_sums + g * width + lanes));
    for (size_t r = 0; r < kRows; ++r) {
      const V16 pair = Broadcast32(d16, row_sums + r * sums_per_row + g);
      hn::Store(MultiplyPairs16(d32, sums0, pair), d32, exact + r * width);
      hn::Store(MultiplyPairs16(d32, sums1, pair), d32, exact + r * width + lanes);
    }
    for (size_t k = 0; k < group; k += kSafeDepth) {
      V16 c00 = hn::Zero(d16), c01 = c00, c10 = c00, c11 = c00;
      V16 c20 = c00, c21 = c00, c30 = c00, c31 = c00;
      HWY_UNROLL(8)
      for (size_t step = 0; step < kSafeSums; ++step) {
        const auto w0 = hn::Load(d, panel + step * 2 * bytes);
        const auto w1 = hn::Load(d, panel + step * 2 * bytes + bytes);
        auto q = Broadcast32(d8, tile + 4 * kTile4 * step);
        Accumulate(c00, MultiplyPairs8(d16, w0, q));
        Accumulate(c01, MultiplyPairs8(d16, w1, q));
        if constexpr (kRows > 1) {
          q = Broadcast32(d8, tile + 4 * (kTile4 * step + 1));
          Accumulate(c10, MultiplyPairs8(d16, w0, q));
          Accumulate(c11, MultiplyPairs8(d16, w1, q));
        }
        if constexpr (kRows > 2) {
          q = Broadcast32(d8, tile + 4 * (kTile4 * step + 2));
          Accumulate(c20, MultiplyPairs8(d16, w0, q));
          Accumulate(c21, MultiplyPairs8(d16, w1, q));
        }
        if constexpr (kRows > 3) {
          q = Broadcast32(d8, tile + 4 * (kTile4 * step + 3));
          Accumulate(c30, MultiplyPairs8(d16, w0, q));
          Accumulate(c31, MultiplyPairs8(d16, w1, q));
        }
      }
      panel += kSafeSums * 2 * bytes;
      tile += kTile4 * kSafeDepth;
      widen(c00, exact);
      widen(c01, exact + lanes);
      if constexpr (kRows > 1) {
        widen(c10, exact + width);
        widen(c11, exact + width + lanes);
      }
      if constexpr (kRows > 2) {
        widen(c20, exact + 2 * width);
        widen(c21, exact + 2 * width + lanes);
      }
      if constexpr (kRows > 3) {
        widen(c30, exact + 3 * width);
        widen(c31, exact + 3 * width + lanes);
      }
    }
    const auto scale0 = hn::Load(df, group_scales + g * width);
    const auto scale1 = hn::Load(df, group_scales + g * width + lanes);
    for (size_t r = 0; r < kRows; ++r) {
      float* const to = outputs + r * width;
      const auto exact0 = hn::ConvertTo(df, hn::Load(d32, exact + r * width));
      const auto exact1 = hn::ConvertTo(df, hn::Load(d32, exact + r * width + lanes));
      hn::Store(hn::MulAdd(exact0, scale0, hn::Load(df, to)), df, to);
      hn::Store(hn::MulAdd(exact1, scale1, hn::Load(df, to + lanes)), df, to + lanes);
    }
  }
}

// ------------------------------------------------------------------------------ many rows, 8 bits

// Puts the tile that starts with `row` where it is, tile[k / 4][row][4], as unsigned numbers, q +
// 128. `quantized` has its rows, `count` of them one after the other; the last one fills the tile.
HWY_INLINE void StoreTile8(const Geometry& g, const Scratch& scratch, size_t row, size_t count,
                           const int8_t* quantized) {
  const Bytes<kMaxBytes> d;
  const size_t bytes = hn::Lanes(d);
  const auto sign = hn::Set(d, 0x80);
  const uint8_t* rows[kTile8];
  for (size_t i = 0; i < kTile8; ++i) {
    rows[i] = reinterpret_cast<const uint8_t*>(quantized) + std::min(i, count - 1) * g.row_bytes;
  }
  for (size_t k = 0; k < g.row_bytes; k += 16) {
    const size_t panel = k / g.depth * g.depth;
    uint8_t* const to = static_cast<uint8_t*>(scratch.Tile(row, panel)) + (k - panel) * kTile8;
    for (size_t first = 0; first < kTile8; first += bytes / 4) {
      Transpose32(d, rows + first, k, [&](size_t i, hn::Vec<decltype(d)> v) HWY_ATTR {
        hn::Store(hn::Xor(v, sign), d, to + (i * kTile8 + first) * 4);
      });
    }
  }
}

// Subtracts the minima of the numbers at kMinimaDepth k, from k on, from all rows.
HWY_INLINE void SubtractMinima(const Geometry& g, const Scratch& scratch, size_t k) {
  constexpr size_t kWords = kMinimaDepth / 4;
  constexpr size_t kWordBytes = 4 * kTile8;
  const Bytes<kMaxBytes> d;
  const size_t bytes = hn::Lanes(d);
  const size_t panel = k / g.depth * g.depth;
  const auto tile_at = [&](size_t row) {
    return static_cast<uint8_t*>(scratch.Tile(row, panel)) + (k - panel) / 4 * kWordBytes;
  };
  HWY_ALIGN uint8_t low[kWords * kMaxBytes];
  HWY_ALIGN uint8_t high[kWords * kMaxBytes];
  std::fill_n(low, sizeof(low), uint8_t{255});
  std::fill_n(high, sizeof(high), uint8_t{0});
  for (size_t row = 0; row < g.rows; row += kTile8) {
    const uint8_t* const tile = tile_at(row);
    for (size_t word = 0; word < kWords; ++word) {
      auto smallest = hn::Load(d, low + word * bytes);
      auto largest = hn::Load(d, high + word * bytes);
      for (size_t i = 0; i < kWordBytes; i += bytes) {
        const auto u = hn::Load(d, tile + word * kWordBytes + i);
        smallest = hn::Min(smallest, u);
        largest = hn::Max(largest, u);
      }
      hn::Store(smallest, d, low + word * bytes);
      hn::Store(largest, d, high + word * bytes);
    }
  }
  uint8_t minima[kMinimaDepth];
  for (size_t word = 0; word < kWords; ++word) {
    for (size_t i = 0; i < 4; ++i) {
      uint8_t smallest = 255, largest = 0;
      for (size_t at = word * bytes + i; at < (word + 1) * bytes; at += 4) {
        smallest = std::min(smallest, low[at]);
        largest = std::max(largest, high[at]);
      }
      const uint8_t half = smallest / 2;
      minima[4 * word + i] = static_cast<uint8_t>(2 * half);
      scratch.HalfMinima()[k + 4 * word + i] = half;
      scratch.Ranges()[k + 4 * word + i] = static_cast<uint8_t>(largest - 2 * half);
    }
  }
  for (size_t row = 0; row < g.rows; row += kTile8) {
    uint8_t* const tile = tile_at(row);
    for (size_t word = 0; word < kWords; ++word) {
      const auto minimum = Broadcast32(d, minima + 4 * word);
      for (size_t i = 0; i < kWordBytes; i += bytes) {
        uint8_t* const at = tile + word * kWordBytes + i;
        hn::Store(hn::Sub(hn::Load(d, at), minimum), d, at);
      }
    }
  }
}

// Takes weights from `first` and `second`, each four k of as many columns as there are lanes, until
// sums of their products fit 16 bits; the other factors are 0 to `first_range` and `second_range`.
// What was taken is handed to list(weights, is_second): sums of products of it fit as well.
template <class D, class VU, class List>
HWY_INLINE void TakeExcess(D d, VU first_range, VU second_range, hn::Vec<D>& first,
                           hn::Vec<D>& second, const List& list) {
  const hn::Repartition<int16_t, D> d16;
  using V = hn::Vec<D>;
  using V16 = hn::Vec<decltype(d16)>;
  // The largest and the smallest sum that there can be.
  const auto positive = [&](VU range, V w) HWY_ATTR {
    return MultiplyPairs8(d16, range, hn::Max(w, hn::Zero(d)));
  };
  const auto negative = [&](VU range, V w) HWY_ATTR {
    return MultiplyPairs8(d16, range, hn::Min(w, hn::Zero(d)));
  };
  // Where sums saturated, or nearly.
  const auto too_large = [&](V16 largest, V16 smallest) HWY_ATTR {
    return hn::BitCast(d, hn::VecFromMask(d16, hn::Or(hn::Eq(largest, hn::Set(d16, 32767)),
                                                      hn::Eq(smallest, hn::Set(d16, -32768)))));
  };
  const auto both_too_large = [&] HWY_ATTR {
    return too_large(
        hn::SaturatedAdd(positive(first_range, first), positive(second_range, second)),
        hn::SaturatedAdd(negative(first_range, first), negative(second_range, second)));
  };
  const auto none = [&](V v) HWY_ATTR { return hn::AllTrue(d, hn::Eq(v, hn::Zero(d))); };

  V excess = both_too_large();
  if (none(excess)) return;
  // A pair that is too large by itself is split.
  const auto even_of_too_large = [&](VU range, V w) HWY_ATTR {
    return hn::And(hn::BitCast(d, hn::Set(d16, 0x00ff)),
                   too_large(positive(range, w), negative(range, w)));
  };
  const V first_even = even_of_too_large(first_range, first);
  const V second_even = even_of_too_large(second_range, second);
  if (!none(hn::Or(first_even, second_even))) {
    list(hn::And(first, first_even), false);
    list(hn::And(second, second_even), true);
    first = hn::AndNot(first_even, first);
    second = hn::AndNot(second_even, second);
    excess = both_too_large();
  }
  list(hn::And(second, excess), true);
  second = hn::AndNot(excess, second);
}

// Unpacks `depth` k (a multiple of 16) from first_k on of the columns whose weights start at
// `rows`: panel[k / 4][column][4]. Only `available` k may be read; the rest become zeros. Adds to
// the columns' sums, and lists what is multiplied apart: counts[column] of
// scratch.ExcessOf(column).
HWY_INLINE void UnpackPanel8(const uint8_t* const* rows, size_t first_k, size_t available,
                             size_t depth, const Scratch& scratch, size_t* HWY_RESTRICT counts) {
  const Bytes<kMaxBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const size_t bytes = hn::Lanes(d);
  const size_t lanes = bytes / 4;
  const auto ones8 = hn::Set(d, 1);
  const auto ones16 = hn::Set(d16, 1);
  const auto twos16 = hn::Set(d16, 2);
  const uint8_t* const half_minima = scratch.HalfMinima() + first_k;
  const uint8_t* const ranges = scratch.Ranges() + first_k;
  HWY_ALIGN uint8_t rest[kMaxColumns * 16];
  const uint8_t* rest_rows[kMaxColumns];
  std::fill_n(counts, 2 * lanes, 0);
  for (size_t vector = 0; vector < 2; ++vector, rows += lanes, counts += lanes) {
    uint8_t* const panel = scratch.Panel() + vector * bytes;
    Excess* const excess = scratch.ExcessOf(vector * lanes);
    int32_t* const column_sums = scratch.GroupSums() + vector * lanes;
    int32_t* const minima_sums = column_sums + 2 * lanes;
    auto sums = hn::Load(d32, column_sums);
    auto products = hn::Load(d32, minima_sums);
    auto first = hn::Zero(d8);
    for (size_t k = 0; k < depth; k += 16) {
      const uint8_t* const* from = rows;
      size_t offset = k;
      if (HWY_UNLIKELY(k + 16 > available)) {
        std::memset(rest, 0, sizeof(rest));
        for (size_t row = 0; row < lanes; ++row) {
          rest_rows[row] = rest + 16 * row;
          if (k < available) std::memcpy(rest + 16 * row, rows[row] + k, available - k);
        }
        from = rest_rows;
        offset = 0;
      }
      Transpose32(d, from, offset, [&](size_t i, hn::Vec<decltype(d)> v) HWY_ATTR {
        if (i % 2 == 0) {
          first = hn::BitCast(d8, v);
          return;
        }
        auto second = hn::BitCast(d8, v);
        const auto four =
            hn::Add(MultiplyPairs8(d16, ones8, first), MultiplyPairs8(d16, ones8, second));
        sums = hn::Add(sums, MultiplyPairs16(d32, four, ones16));
        const size_t word = k / 4 + i - 1;
        // At most 2 * 127 * 128 in magnitude.
        const auto first_half = MultiplyPairs8(d16, Broadcast32(d, half_minima + 4 * word), first);
        const auto second_half =
            MultiplyPairs8(d16, Broadcast32(d, half_minima + 4 * word + 4), second);
        products = hn::Add(products, hn::Add(MultiplyPairs16(d32, first_half, twos16),
                                             MultiplyPairs16(d32, second_half, twos16)));
        TakeExcess(d8, Broadcast32(d, ranges + 4 * word), Broadcast32(d, ranges + 4 * word + 4),
                   first, second, [&](hn::Vec<decltype(d8)> weights, bool is_second) HWY_ATTR {
          HWY_ALIGN int32_t taken[kMaxLanes] = {};
          hn::Store(hn::BitCast(d32, weights), d32, taken);
          // Without branches, which nobody could predict.
          for (size_t lane = 0; lane < lanes; ++lane) {
            excess[lane * kMaxExcess + counts[lane]] = {taken[lane],
                                                        static_cast<int32_t>(word + is_second)};
            counts[lane] += taken[lane] != 0;
          }
        });
        hn::Store(hn::BitCast(d, first), d, panel + word * 2 * bytes);
        hn::Store(hn::BitCast(d, second), d, panel + (word + 1) * 2 * bytes);
      });
    }
    hn::Store(sums, d32, column_sums);
    hn::Store(products, d32, minima_sums);
  }
}

// Multiplies kRows <= kRegisterRows8 quantized rows, the first of which starts at `tile`, by a
// panel and adds to their rows of `sums`.
template <size_t kRows>
HWY_NOINLINE void MultiplyPanel8(const uint8_t* HWY_RESTRICT panel, size_t depth,
                                 const uint8_t* HWY_RESTRICT tile, int32_t* HWY_RESTRICT sums) {
  static_assert(1 <= kRows && kRows <= kRegisterRows8);
  constexpr size_t kWordBytes = 4 * kTile8;  // of a tile
  const Bytes<kMaxBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  using V32 = hn::Vec<decltype(d32)>;
  const size_t bytes = hn::Lanes(d);
  const size_t lanes = bytes / 4;
  const auto ones = hn::Set(d16, 1);
  const auto start = [&](size_t i) HWY_ATTR { return hn::Load(d32, sums + i * lanes); };
  V32 c00 = start(0), c01 = start(1), c10 = c00, c11 = c00;
  V32 c20 = c00, c21 = c00, c30 = c00, c31 = c00;
  if constexpr (kRows > 1) c10 = start(2), c11 = start(3);
  if constexpr (kRows > 2) c20 = start(4), c21 = start(5);
  if constexpr (kRows > 3) c30 = start(6), c31 = start(7);
  HWY_UNROLL(1)
  for (size_t k = 0; k < depth; k += 8, tile += 2 * kWordBytes, panel += 4 * bytes) {
    const auto w00 = hn::BitCast(d8, hn::Load(d, panel));
    const auto w01 = hn::BitCast(d8, hn::Load(d, panel + bytes));
    const auto w10 = hn::BitCast(d8, hn::Load(d, panel + 2 * bytes));
    const auto w11 = hn::BitCast(d8, hn::Load(d, panel + 3 * bytes));
    const auto add = [&](size_t row, V32& sum0, V32& sum1) HWY_ATTR {
      const auto u0 = Broadcast32(d, tile + 4 * row);
      const auto u1 = Broadcast32(d, tile + kWordBytes + 4 * row);
      const auto four0 = hn::Add(MultiplyPairs8(d16, u0, w00), MultiplyPairs8(d16, u1, w10));
      Accumulate(sum0, MultiplyPairs16(d32, four0, ones));
      const auto four1 = hn::Add(MultiplyPairs8(d16, u0, w01), MultiplyPairs8(d16, u1, w11));
      Accumulate(sum1, MultiplyPairs16(d32, four1, ones));
    };
    add(0, c00, c01);
    if constexpr (kRows > 1) add(1, c10, c11);
    if constexpr (kRows > 2) add(2, c20, c21);
    if constexpr (kRows > 3) add(3, c30, c31);
  }
  const auto finish = [&](size_t row, V32 a, V32 b) HWY_ATTR {
    hn::Store(a, d32, sums + 2 * row * lanes);
    hn::Store(b, d32, sums + (2 * row + 1) * lanes);
  };
  finish(0, c00, c01);
  if constexpr (kRows > 1) finish(1, c10, c11);
  if constexpr (kRows > 2) finish(2, c20, c21);
  if constexpr (kRows > 3) finish(3, c30, c31);
}

// Multiplies quantized rows by the weights of a column that are multiplied apart: sums[row] becomes
// their products, added to what is there unless `is_first`. The rows are those of `row_count` that
// are in 4 vectors.
HWY_INLINE void MultiplyExcess8(const Excess* HWY_RESTRICT excess, size_t count,
                                const uint8_t* HWY_RESTRICT tiles, size_t tile_bytes,
                                size_t row_count, bool is_first, int32_t* HWY_RESTRICT sums) {
  constexpr size_t kWordBytes = 4 * kTile8;
  const Bytes<kMaxBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  using V32 = hn::Vec<decltype(d32)>;
  const size_t lanes = hn::Lanes(d32);
  const auto ones = hn::Set(d16, 1);
  // Vectors past the last one repeat it.
  const size_t last = (row_count - 1) / lanes * lanes;
  const size_t row1 = std::min(lanes, last);
  const size_t row2 = std::min(2 * lanes, last);
  const size_t row3 = std::min(3 * lanes, last);
  const auto rows_at = [&](size_t row) HWY_ATTR {
    return tiles + row / kTile8 * tile_bytes + row % kTile8 * 4;
  };
  const uint8_t* const at1 = rows_at(row1);
  const uint8_t* const at2 = rows_at(row2);
  const uint8_t* const at3 = rows_at(row3);
  V32 c0 = hn::Zero(d32), c1 = c0, c2 = c0, c3 = c0;
  if (!is_first) {
    c0 = hn::Load(d32, sums);
    c1 = hn::Load(d32, sums + row1);
    c2 = hn::Load(d32, sums + row2);
    c3 = hn::Load(d32, sums + row3);
  }
  HWY_UNROLL(4)
  for (size_t i = 0; i < count; ++i) {
    const auto weights = hn::BitCast(d8, hn::Set(d32, excess[i].weights));
    const size_t offset = static_cast<size_t>(excess[i].word) * kWordBytes;
    const auto add = [&](const uint8_t* from, V32& sum) HWY_ATTR {
      const auto two = MultiplyPairs8(d16, hn::Load(d, from + offset), weights);
      Accumulate(sum, MultiplyPairs16(d32, two, ones));
    };
    add(tiles, c0);
    add(at1, c1);
    add(at2, c2);
    add(at3, c3);
  }
  hn::Store(c0, d32, sums);
  hn::Store(c1, d32, sums + row1);
  hn::Store(c2, d32, sums + row2);
  hn::Store(c3, d32, sums + row3);
}

// ------------------------------------------------------------------------------ many rows, both

// The part of the output that a task computes.
struct Panel {
  size_t first_row;
  size_t rows;
  size_t first_column;
  size_t columns;  // that exist
  float bias[kMaxColumns];
  float scales[kMaxColumns];  // 8 bits only
};

// Calls multiply(number of rows as a type) for a register tile of `rows` rows, or of as many as
// there are in one. Both kernels' have four.
template <class Multiply>
HWY_INLINE void MultiplyTile(size_t rows, const Multiply& multiply) {
  static_assert(kTile4 == 4 && kRegisterRows8 == 4);
  switch (rows) {
    case 1:
      multiply(std::integral_constant<size_t, 1>());
      break;
    case 2:
      multiply(std::integral_constant<size_t, 2>());
      break;
    case 3:
      multiply(std::integral_constant<size_t, 3>());
      break;
    default:
      multiply(std::integral_constant<size_t, 4>());
  }
}

HWY_INLINE void MultiplyRows4(const Geometry& g, const Scratch& scratch, const Panel& p, size_t k,
                              size_t depth) {
  const size_t first_group = k / g.group;
  for (size_t row = 0; row < p.rows; row += kTile4) {
    MultiplyTile(p.rows - row, [&](auto rows) HWY_ATTR {
      MultiplyPanel4<decltype(rows)::value>(
          scratch.Panel(), depth / g.group, g.group, scratch.GroupScales(), scratch.GroupSums(),
          static_cast<const int8_t*>(scratch.Tile(p.first_row + row, k)),
          scratch.Sums(p.first_row + row) + first_group, g.sums_per_row,
          static_cast<float*>(scratch.Outputs()) + row * g.columns);
    });
  }
}

HWY_INLINE void MultiplyRows8(const Geometry& g, const Scratch& scratch, const Panel& p, size_t k,
                              size_t depth, const size_t* excess_counts) {
  const uint8_t* const tiles = static_cast<const uint8_t*>(scratch.Tile(p.first_row, k));
  const size_t tile_bytes = scratch.Depth(k) * kTile8;
  int32_t* const sums = static_cast<int32_t*>(scratch.Outputs());
  const size_t together = std::max(kTile8, 2 * g.columns);  // 4 vectors, or a tile
  for (size_t begin = 0; begin < p.rows; begin += together) {
    const size_t end = std::min(p.rows, begin + together);
    for (size_t row = begin; row < end; row += kRegisterRows8) {
      MultiplyTile(end - row, [&](auto rows) HWY_ATTR {
        MultiplyPanel8<decltype(rows)::value>(
            scratch.Panel(), depth, tiles + row / kTile8 * tile_bytes + row % kTile8 * 4,
            sums + row * g.columns);
      });
    }
    for (size_t column = 0; column < g.columns; ++column) {
      if (k != 0 && excess_counts[column] == 0) continue;
      MultiplyExcess8(scratch.ExcessOf(column), excess_counts[column],
                      tiles + begin / kTile8 * tile_bytes, tile_bytes, end - begin, k == 0,
                      scratch.ExcessSums(column) + begin);
    }
  }
}

// Stores the `vector`th vector of a row of the output, as far as there are columns.
HWY_INLINE void StoreOutput(const LinearCall& call, const Geometry& g, const Panel& p, size_t row,
                            size_t vector, hn::Vec<FloatTag> outputs) {
  const FloatTag d;
  HWY_ALIGN float some[kMaxLanes];
  const size_t lanes = g.columns / 2;
  const size_t first = vector * lanes;
  if (first >= p.columns) return;
  float* const out = call.output + (p.first_row + row) * g.out + p.first_column + first;
  const size_t count = std::min(lanes, p.columns - first);
  if (count == lanes) {
    hn::StoreU(outputs, d, out);
  } else {
    hn::Store(outputs, d, some);
    std::copy_n(some, count, out);
  }
}

// The task's part of the output, from what MultiplyRows4() summed up.
HWY_INLINE void StoreOutputs4(const LinearCall& call, const Geometry& g, const Scratch& scratch,
                              const Panel& p) {
  const FloatTag d;
  const size_t lanes = hn::Lanes(d);
  const float* sums = static_cast<const float*>(scratch.Outputs());
  for (size_t row = 0; row < p.rows; ++row) {
    const auto inverse = hn::Set(d, scratch.Scales()[p.first_row + row].inverse);
    for (size_t vector = 0; vector < 2; ++vector, sums += lanes) {
      const auto bias = hn::LoadU(d, p.bias + vector * lanes);
      StoreOutput(call, g, p, row, vector, hn::MulAdd(hn::Load(d, sums), inverse, bias));
    }
  }
}

// The same from what MultiplyRows8() summed up.
HWY_INLINE void StoreOutputs8(const LinearCall& call, const Geometry& g, const Scratch& scratch,
                              const Panel& p) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> d32;
  const Bytes<kMaxBytes> d8;
  const size_t lanes = hn::Lanes(d);
  const int32_t* const sums = static_cast<const int32_t*>(scratch.Outputs());
  const uint8_t* excess[kMaxColumns];
  for (size_t i = 0; i < g.columns; ++i) {
    excess[i] = reinterpret_cast<const uint8_t*>(scratch.ExcessSums(i));
  }
  for (size_t vector = 0; vector < 2; ++vector) {
    const auto bias = hn::LoadU(d, p.bias + vector * lanes);
    const auto scales = hn::LoadU(d, p.scales + vector * lanes);
    const auto column_sums = hn::Load(d32, scratch.GroupSums() + vector * lanes);
    const auto minima_sums = hn::Load(d32, scratch.GroupSums() + (2 + vector) * lanes);
    for (size_t first = 0; first < p.rows; first += 4) {
      Transpose32(d8, excess + vector * lanes, first * sizeof(int32_t),
                  [&](size_t i, hn::Vec<decltype(d8)> apart) HWY_ATTR {
        const size_t row = first + i;
        if (row >= p.rows) return;
        const RowScale& scale = scratch.Scales()[p.first_row + row];
        const auto offset = hn::Sub(
            hn::Mul(column_sums, hn::Set(d32, 128 + scale.zero_point)), minima_sums);
        const auto sum = hn::Sub(hn::Add(hn::Load(d32, sums + row * g.columns + vector * lanes),
                                         hn::BitCast(d32, apart)),
                                 offset);
        const auto scaled = hn::Mul(hn::ConvertTo(d, sum), hn::Set(d, scale.inverse));
        StoreOutput(call, g, p, row, vector, hn::MulAdd(scaled, scales, bias));
      });
    }
  }
}

HWY_INLINE void MultiplyPanel(const LinearCall& call, const Geometry& g, size_t task,
                              const Scratch& scratch) {
  const QuantizedLinear& linear = *call.linear;
  const size_t panels = DivideUp(g.out, g.columns);
  Panel p;
  p.first_row = task / panels * g.task_rows;
  p.rows = std::min(g.task_rows, g.rows - p.first_row);
  p.first_column = task % panels * g.columns;
  p.columns = std::min(g.columns, g.out - p.first_column);

  // Columns past the last one repeat it.
  const uint8_t* weights[kMaxColumns];
  const char* scales[kMaxColumns];
  const size_t column_bytes = g.group == 0 ? g.in : g.in / 2;
  for (size_t i = 0; i < g.columns; ++i) {
    const size_t column = p.first_column + std::min(i, p.columns - 1);
    weights[i] = static_cast<const uint8_t*>(linear.weight) + column * column_bytes;
    p.bias[i] = linear.bias == nullptr ? 0.0f : linear.bias[column];
    if (g.group == 0) {
      p.scales[i] = static_cast<const float*>(linear.scales)[column];
    } else {
      scales[i] = static_cast<const char*>(linear.scales) + column * g.groups * sizeof(uint16_t);
    }
  }
  std::memset(scratch.Outputs(), 0, p.rows * g.columns * sizeof(float));

  if (g.group == 0) std::memset(scratch.GroupSums(), 0, 2 * g.columns * sizeof(int32_t));

  for (size_t k = 0; k < g.in; k += g.depth) {
    const size_t available = std::min(g.depth, g.in - k);
    if (g.group == 0) {
      const size_t depth = RoundUp(available, 16);
      size_t excess_counts[kMaxColumns];
      UnpackPanel8(weights, k, available, depth, scratch, excess_counts);
      MultiplyRows8(g, scratch, p, k, depth, excess_counts);
    } else {
      UnpackPanel4(weights, available, scratch.Panel());
      const size_t groups = available / g.group;
      SumPanel4(scratch.Panel(), groups, g.group, scratch.GroupSums());
      float* const to = scratch.GroupScales();
      for (size_t i = 0; i < g.columns; ++i) {
        for (size_t group = 0; group < groups; ++group) {
          to[group * g.columns + i] = FromBfloat16(scales[i]);
          scales[i] += sizeof(uint16_t);
        }
      }
      MultiplyRows4(g, scratch, p, k, available);
    }
    for (size_t i = 0; i < g.columns; ++i) {
      weights[i] += g.group == 0 ? available : available / 2;
    }
  }
  if (g.group == 0) {
    StoreOutputs8(call, g, scratch, p);
  } else {
    StoreOutputs4(call, g, scratch, p);
  }
}

// ------------------------------------------------------------------------------ few rows, 4 bits

// A quantized row is kept as its even numbers, followed by its odd ones: they meet the low and the
// high nibbles of consecutive bytes. Groups where q - zero_point fits 8 bits, nearly all, are kept
// like that, and count as having a zero point of 0.
//
// `sums` has, per group and lane, what the offsets add to the products of nibbles and kept numbers:
//     sum (q - zero_point) * (u - 8) = sum q * u - zero_point * sum u
//                                      + sum (8 * zero_point - 8 * q).
//
// kBytes is at most half a group, so that no vector spans two groups.
template <size_t kBytes>
HWY_INLINE void ArrangeRow4(const Geometry& g, const int8_t* HWY_RESTRICT quantized,
                            int32_t zero_point, int8_t* HWY_RESTRICT row,
                            int32_t* HWY_RESTRICT sums, int32_t* HWY_RESTRICT zero_points) {
  const Bytes<kBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const size_t bytes = hn::Lanes(d);
  const size_t half = g.group / 2;
  const auto eights = hn::Set(d, 8);
  const auto ones = hn::Set(d16, 1);
  const auto shift = hn::Set(d8, static_cast<int8_t>(zero_point));
  for (size_t group = 0; group < g.groups; ++group) {
    const int8_t* const from = quantized + group * g.group;
    bool fits = true;
    for (size_t i = 0; i < g.group; i += bytes) {
      const auto q = hn::LoadU(d8, from + i);
      fits = fits && hn::AllTrue(d8, hn::Eq(hn::Sub(q, shift), hn::SaturatedSub(q, shift)));
    }
    const auto subtract = fits ? shift : hn::Zero(d8);
    zero_points[group] = fits ? 0 : zero_point;
    auto sum = hn::Set(d32, static_cast<int32_t>(8 * half / bytes) * 8 * zero_points[group]);
    for (size_t i = 0; i < half; i += bytes) {
      hn::Vec<decltype(d8)> even, odd;
      hn::LoadInterleaved2(d8, from + 2 * i, even, odd);
      even = hn::Sub(even, subtract);
      odd = hn::Sub(odd, subtract);
      hn::StoreU(even, d8, row + group * half + i);
      hn::StoreU(odd, d8, row + g.in / 2 + group * half + i);
      const auto products =
          hn::Add(MultiplyPairs8(d16, eights, even), MultiplyPairs8(d16, eights, odd));
      sum = hn::Sub(sum, MultiplyPairs16(d32, products, ones));
    }
    hn::StoreU(sum, d32, sums + group * kMaxLanes);
  }
}

// zero_point * sum u of a group of a column, in parts.
template <size_t kBytes>
HWY_INLINE hn::Vec<hn::Repartition<int32_t, Bytes<kBytes>>> Offsets4(
    const uint8_t* weights, size_t half_group, int32_t zero_point) {
  const Bytes<kBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<uint16_t, decltype(d)> du16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const auto nibble = hn::Set(d, 0x0f);
  // Else the compiler would keep the nibbles that have been multiplied for this, in memory.
  asm volatile("" : "+r"(weights));
  auto sum = hn::Zero(d);  // of at most 16 nibbles
  for (size_t i = 0; i < half_group; i += hn::Lanes(d)) {
    const auto both = hn::LoadU(d, weights + i);
    const auto high = hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(du16, both)));
    sum = hn::Add(sum, hn::Add(hn::And(both, nibble), hn::And(high, nibble)));
  }
  const auto wide = MultiplyPairs8(d16, sum, hn::Set(d8, 1));
  return MultiplyPairs16(d32, wide, hn::Set(d16, static_cast<int16_t>(zero_point)));
}

// Products of a row and kColumnsAtOnce columns, whose weights start at w[i] and whose scales at
// scales[i].
template <size_t kBytes, size_t kGroup>
HWY_NOINLINE void MultiplyColumns4(const Geometry& g, const int8_t* HWY_RESTRICT row,
                                   const int32_t* HWY_RESTRICT sums,
                                   const int32_t* HWY_RESTRICT zero_points,
                                   const uint8_t* const* w, const char* const* scales,
                                   float* HWY_RESTRICT products) {
  const Bytes<kBytes> d;
  const hn::Repartition<int8_t, decltype(d)> d8;
  const hn::Repartition<int16_t, decltype(d)> d16;
  const hn::Repartition<uint16_t, decltype(d)> du16;
  const hn::Repartition<int32_t, decltype(d)> d32;
  const hn::Repartition<float, decltype(d)> df;
  using V16 = hn::Vec<decltype(d16)>;
  using VF = hn::Vec<decltype(df)>;
  const size_t bytes = hn::Lanes(d);
  constexpr size_t half = kGroup / 2;
  // Bytes until 16 bits may overflow: two products are added per vector.
  const size_t safe = std::min(half, kSafeSums / 2 * bytes);
  const auto nibble = hn::Set(d, 0x0f);
  const V16 ones = hn::Set(d16, 1);
  const int8_t* even = row;
  const int8_t* odd = row + g.in / 2;
  const uint8_t* w0 = w[0];
  const uint8_t* w1 = w[1];
  const uint8_t* w2 = w[2];
  const uint8_t* w3 = w[3];
  const char* const scales0 = scales[0];
  const char* const scales1 = scales[1];
  const char* const scales2 = scales[2];
  const char* const scales3 = scales[3];
  VF f0 = hn::Zero(df), f1 = f0, f2 = f0, f3 = f0;
  for (size_t group = 0; group < g.groups; ++group) {
    const auto start = hn::LoadU(d32, sums + group * kMaxLanes);
    const auto multiply = [&](const uint8_t* weights) HWY_ATTR {
      auto exact = start;
      for (size_t part = 0; part < half; part += safe) {
        V16 sum = hn::Zero(d16);
        for (size_t i = part; i < part + safe; i += bytes) {
          const auto both = hn::LoadU(d, weights + i);
          const auto low = hn::And(both, nibble);
          const auto high =
              hn::And(hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(du16, both))), nibble);
          sum = hn::Add(sum, hn::Add(MultiplyPairs8(d16, low, hn::LoadU(d8, even + i)),
                                     MultiplyPairs8(d16, high, hn::LoadU(d8, odd + i))));
        }
        exact = hn::Add(exact, MultiplyPairs16(d32, sum, ones));
      }
      return exact;
    };
    auto e0 = multiply(w0);
    auto e1 = multiply(w1);
    auto e2 = multiply(w2);
    auto e3 = multiply(w3);
    const int32_t zero_point = zero_points[group];
    if (HWY_UNLIKELY(zero_point != 0)) {
      e0 = hn::Sub(e0, Offsets4<kBytes>(w0, half, zero_point));
      e1 = hn::Sub(e1, Offsets4<kBytes>(w1, half, zero_point));
      e2 = hn::Sub(e2, Offsets4<kBytes>(w2, half, zero_point));
      e3 = hn::Sub(e3, Offsets4<kBytes>(w3, half, zero_point));
    }
    const auto scale_of = [&](const char* from) HWY_ATTR {
      uint16_t scale;
      std::memcpy(&scale, from + group * sizeof(scale), sizeof(scale));
      return hn::BitCast(df, hn::ShiftLeft<16>(hn::BitCast(d32, hn::Set(du16, scale))));
    };
    f0 = hn::MulAdd(hn::ConvertTo(df, e0), scale_of(scales0), f0);
    f1 = hn::MulAdd(hn::ConvertTo(df, e1), scale_of(scales1), f1);
    f2 = hn::MulAdd(hn::ConvertTo(df, e2), scale_of(scales2), f2);
    f3 = hn::MulAdd(hn::ConvertTo(df, e3), scale_of(scales3), f3);
    even += half, odd += half;
    w0 += half, w1 += half, w2 += half, w3 += half;
  }
  products[0] = hn::GetLane(hn::SumOfLanes(df, f0));
  products[1] = hn::GetLane(hn::SumOfLanes(df, f1));
  products[2] = hn::GetLane(hn::SumOfLanes(df, f2));
  products[3] = hn::GetLane(hn::SumOfLanes(df, f3));
}

// ------------------------------------------------------------------------------ few rows, 8 bits

// Exact products of a row and kColumnsAtOnce columns, whose weights start at w[i].
HWY_NOINLINE void MultiplyColumns8(const Geometry& g, const int16_t* HWY_RESTRICT row,
                                   const uint8_t* const* w, int32_t* HWY_RESTRICT products) {
  const hn::CappedTag<int16_t, kMaxBytes / 2> d16;
  const hn::Rebind<int8_t, decltype(d16)> d8;
  const hn::Repartition<int32_t, decltype(d16)> d32;
  const size_t lanes = hn::Lanes(d16);
  const int8_t* const w0 = reinterpret_cast<const int8_t*>(w[0]);
  const int8_t* const w1 = reinterpret_cast<const int8_t*>(w[1]);
  const int8_t* const w2 = reinterpret_cast<const int8_t*>(w[2]);
  const int8_t* const w3 = reinterpret_cast<const int8_t*>(w[3]);
  auto e0 = hn::Zero(d32), e1 = e0, e2 = e0, e3 = e0;
  size_t i = 0;
  for (; i + lanes <= g.in; i += lanes) {
    const auto q = hn::LoadU(d16, row + i);
    e0 = hn::Add(e0, MultiplyPairs16(d32, hn::PromoteTo(d16, hn::LoadU(d8, w0 + i)), q));
    e1 = hn::Add(e1, MultiplyPairs16(d32, hn::PromoteTo(d16, hn::LoadU(d8, w1 + i)), q));
    e2 = hn::Add(e2, MultiplyPairs16(d32, hn::PromoteTo(d16, hn::LoadU(d8, w2 + i)), q));
    e3 = hn::Add(e3, MultiplyPairs16(d32, hn::PromoteTo(d16, hn::LoadU(d8, w3 + i)), q));
  }
  products[0] = hn::GetLane(hn::SumOfLanes(d32, e0));
  products[1] = hn::GetLane(hn::SumOfLanes(d32, e1));
  products[2] = hn::GetLane(hn::SumOfLanes(d32, e2));
  products[3] = hn::GetLane(hn::SumOfLanes(d32, e3));
  for (; i < g.in; ++i) {
    products[0] += row[i] * w0[i];
    products[1] += row[i] * w1[i];
    products[2] += row[i] * w2[i];
    products[3] += row[i] * w3[i];
  }
}

// ------------------------------------------------------------------------------ few rows, both

HWY_INLINE void MultiplyFewRows(const LinearCall& call, const Geometry& g, size_t task,
                                const Scratch& scratch) {
  const QuantizedLinear& linear = *call.linear;
  const size_t column_bytes = g.group == 0 ? g.in : g.in / 2;
  const size_t begin = task * g.columns;
  const size_t count = std::min(g.columns, g.out - begin);
  // Columns that are multiplied at once are not neighbours: each is followed by the next one of its
  // stream. The CPU prefetches long streams well, which doubled the bandwidth on a Zen 3, while
  // prefetching by hand added nothing.
  const size_t stream = DivideUp(count, kColumnsAtOnce);
  for (size_t step = 0; step < stream; ++step) {
    size_t columns[kColumnsAtOnce];
    const uint8_t* weights[kColumnsAtOnce];
    const char* scales[kColumnsAtOnce];
    for (size_t i = 0; i < kColumnsAtOnce; ++i) {
      // Columns past the last one repeat it.
      columns[i] = begin + std::min(i * stream + step, count - 1);
      weights[i] = static_cast<const uint8_t*>(linear.weight) + columns[i] * column_bytes;
      scales[i] =
          static_cast<const char*>(linear.scales) + columns[i] * g.groups * sizeof(uint16_t);
    }
    for (size_t row = 0; row < g.rows; ++row) {
      const RowScale& scale = scratch.Scales()[row];
      float* const out = call.output + row * g.out;
      float products[kColumnsAtOnce];
      if (g.group == 0) {
        int32_t exact[kColumnsAtOnce];
        MultiplyColumns8(g, static_cast<const int16_t*>(scratch.Row(row)), weights, exact);
        for (size_t i = 0; i < kColumnsAtOnce; ++i) {
          products[i] = static_cast<float>(exact[i]) * scale.inverse *
                        static_cast<const float*>(linear.scales)[columns[i]];
        }
      } else {
        const int8_t* const quantized = static_cast<const int8_t*>(scratch.Row(row));
        const int32_t* const sums = scratch.Sums(row);
        const int32_t* const zero_points = scratch.ZeroPoints(row);
        if (g.group == 32) {
          MultiplyColumns4<16, 32>(g, quantized, sums, zero_points, weights, scales, products);
        } else if (g.group == 64) {
          MultiplyColumns4<32, 64>(g, quantized, sums, zero_points, weights, scales, products);
        } else if (g.group == 128) {
          MultiplyColumns4<kMaxBytes, 128>(g, quantized, sums, zero_points, weights, scales,
                                           products);
        } else {
          MultiplyColumns4<kMaxBytes, 256>(g, quantized, sums, zero_points, weights, scales,
                                           products);
        }
        for (float& product : products) product *= scale.inverse;
      }
      for (size_t i = 0; i < kColumnsAtOnce; ++i) {
        const float bias = linear.bias == nullptr ? 0.0f : linear.bias[columns[i]];
        out[columns[i]] = products[i] + bias;
      }
    }
  }
}

// ------------------------------------------------------------------------------ the call

void QuantizeRowsHere(const LinearCall& call, size_t begin, size_t end, size_t worker) {
  const Geometry g(*call.linear, call.rows, VectorLanes());
  const Scratch scratch(call, g, worker);
  int8_t* const quantized = scratch.Quantized();
  const size_t padded = RoundUp(g.in, kMaxBytes);
  if (g.group == 0 && !g.few_rows) {
    for (size_t first = begin; first < end; first += kTile8) {
      const size_t count = std::min(kTile8, end - first);
      for (size_t i = 0; i < count; ++i) {
        scratch.Scales()[first + i] =
            QuantizeRow(call.input + (first + i) * g.in, g.in, quantized + i * padded);
      }
      StoreTile8(g, scratch, first, count, quantized);
    }
    return;
  }
  for (size_t row = begin; row < end; ++row) {
    const RowScale scale = QuantizeRow(call.input + row * g.in, g.in, quantized);
    const int32_t zero_point = scale.zero_point;
    scratch.Scales()[row] = scale;
    int32_t* const sums = scratch.Sums(row);
    if (g.group == 0) {
      int16_t* const to = static_cast<int16_t*>(scratch.Row(row));
      for (size_t i = 0; i < padded; ++i) to[i] = static_cast<int16_t>(quantized[i] - zero_point);
      continue;
    }
    int8_t* const to = static_cast<int8_t*>(scratch.Row(row));
    if (!g.few_rows) {
      for (size_t group = 0; group < g.groups; ++group) {
        int32_t sum = 0;
        for (size_t i = 0; i < g.group; ++i) sum += quantized[group * g.group + i];
        sums[group] = Pair(-zero_point, sum);
      }
      alignas(16) static constexpr uint8_t kOrder[16] = {0, 2,  4,  6,  1, 3,  5,  7,
                                                         8, 10, 12, 14, 9, 11, 13, 15};
      Permute(quantized, padded, kOrder);
      StoreInTile(g, scratch, row, quantized);
    } else if (g.group == 32) {
      ArrangeRow4<16>(g, quantized, zero_point, to, sums, scratch.ZeroPoints(row));
    } else if (g.group == 64) {
      ArrangeRow4<32>(g, quantized, zero_point, to, sums, scratch.ZeroPoints(row));
    } else {
      ArrangeRow4<kMaxBytes>(g, quantized, zero_point, to, sums, scratch.ZeroPoints(row));
    }
  }
}

void SubtractMinimaHere(const LinearCall& call, size_t part) {
  const Geometry g(*call.linear, call.rows, VectorLanes());
  SubtractMinima(g, Scratch(call, g, 0), part * kMinimaDepth);
}

void MultiplyTaskHere(const LinearCall& call, size_t task, size_t worker) {
  const Geometry g(*call.linear, call.rows, VectorLanes());
  const Scratch scratch(call, g, worker);
  if (g.few_rows) {
    MultiplyFewRows(call, g, task, scratch);
  } else {
    MultiplyPanel(call, g, task, scratch);
  }
}

#else   // HWY_TARGET == HWY_SCALAR
// Without vectors: the definition in plain loops.

void QuantizeRowsHere(const LinearCall& call, size_t begin, size_t end, size_t worker) {
  const Geometry g(*call.linear, call.rows, VectorLanes());
  const Scratch scratch(call, g, worker);
  for (size_t row = begin; row < end; ++row) {
    scratch.Scales()[row] =
        QuantizeRow(call.input + row * g.in, g.in, static_cast<int8_t*>(scratch.Row(row)));
  }
}

void SubtractMinimaHere(const LinearCall&, size_t) {}

void MultiplyTaskHere(const LinearCall& call, size_t task, size_t worker) {
  const QuantizedLinear& linear = *call.linear;
  const Geometry g(linear, call.rows, VectorLanes());
  const Scratch scratch(call, g, worker);
  const size_t panels = DivideUp(g.out, g.columns);
  const size_t first_row = task / panels * g.task_rows;
  const size_t first_column = task % panels * g.columns;
  const size_t group_size = g.group == 0 ? g.in : g.group;
  const uint8_t* const weights = static_cast<const uint8_t*>(linear.weight);
  for (size_t row = first_row; row < std::min(g.rows, first_row + g.task_rows); ++row) {
    const int8_t* const q = static_cast<const int8_t*>(scratch.Row(row));
    const RowScale& scale = scratch.Scales()[row];
    for (size_t n = first_column; n < std::min(g.out, first_column + g.columns); ++n) {
      float sum = 0;
      for (size_t k = 0; k < g.in;) {
        int32_t exact = 0;
        for (const size_t end = k + group_size; k < end; ++k) {
          const size_t at = n * g.in + k;
          const int32_t weight = g.group == 0 ? static_cast<int8_t>(weights[at])
                                              : (weights[at / 2] >> (k % 2 * 4) & 15) - 8;
          exact += (q[k] - scale.zero_point) * weight;
        }
        const float weight_scale =
            g.group == 0 ? static_cast<const float*>(linear.scales)[n]
                         : FromBfloat16(static_cast<const char*>(linear.scales) +
                                        (n * g.groups + k / g.group - 1) * sizeof(uint16_t));
        sum += static_cast<float>(exact) * weight_scale;
      }
      call.output[row * g.out + n] =
          sum * scale.inverse + (linear.bias == nullptr ? 0.0f : linear.bias[n]);
    }
  }
}
#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace
}  // namespace mvlm
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace mvlm {
namespace {
HWY_EXPORT(VectorLanes);
HWY_EXPORT(QuantizeRowsHere);
HWY_EXPORT(SubtractMinimaHere);
HWY_EXPORT(MultiplyTaskHere);
HWY_EXPORT(TargetName);

Geometry GeometryOf(const QuantizedLinear& linear, int64_t rows) {
  return Geometry(linear, rows, HWY_DYNAMIC_DISPATCH(VectorLanes)());
}

#if HWY_ARCH_X86
bool HasDotProducts() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (c & (1u << 11)) return true;  // AVX512_VNNI
  const bool has_more_features = a >= 1;
  return has_more_features && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         (a & (1u << 4));  // AVX-VNNI
}
#endif
}  // namespace

bool LinearIsFasterHere() {
#if HWY_ARCH_X86
  static const bool is_faster =
      (hwy::SupportedTargets() & (HWY_AVX2 | HWY_AVX3)) != 0 && !HasDotProducts();
  return is_faster;
#else
  return false;
#endif
}

const char* LinearTarget() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

size_t LinearScratchBytes(const QuantizedLinear& linear, int64_t rows, int64_t threads) {
  const Geometry g = GeometryOf(linear, std::max<int64_t>(1, rows));
  return g.workers_at + static_cast<size_t>(std::max<int64_t>(1, threads)) * g.worker_bytes;
}

void QuantizeRows(const LinearCall& call, int64_t begin, int64_t end, int64_t worker) {
  HWY_DYNAMIC_DISPATCH(QuantizeRowsHere)
  (call, static_cast<size_t>(begin), static_cast<size_t>(end), static_cast<size_t>(worker));
}

int64_t MinimaParts(const LinearCall& call) {
  const Geometry g = GeometryOf(*call.linear, call.rows);
  return g.group == 0 && !g.few_rows ? static_cast<int64_t>(DivideUp(g.in, kMinimaDepth)) : 0;
}

void SubtractMinima(const LinearCall& call, int64_t part) {
  HWY_DYNAMIC_DISPATCH(SubtractMinimaHere)(call, static_cast<size_t>(part));
}

int64_t LinearTasks(const LinearCall& call) {
  return static_cast<int64_t>(GeometryOf(*call.linear, call.rows).Tasks());
}

void MultiplyTask(const LinearCall& call, int64_t task, int64_t worker) {
  HWY_DYNAMIC_DISPATCH(MultiplyTaskHere)
  (call, static_cast<size_t>(task), static_cast<size_t>(worker));
}

}  // namespace mvlm
#endif  // HWY_ONCE

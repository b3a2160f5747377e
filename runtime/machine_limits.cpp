// What this machine can do at the most: bytes read from memory and multiply-adds, per second and
// with a given number of threads. mvlm.runtime.machine loads this library with ctypes and says how
// much of it a model makes use of.
//
// The arithmetic kernels keep everything in registers: no matrix multiplication can be faster. Each
// of them does what a real one must do for exact results, so that on x86 without VNNI it is
// measured, and said, how many instructions it takes to get products of int8 numbers into 32 bits.
//
// Not with Highway, as the kernels in ops/: its targets do not tell CPUs with VNNI, dotprod or i8mm
// from those without. Functions are compiled for an instruction set with an attribute, and called
// where the CPU has it.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs work(thread, deadline) in `threads` threads, all of which begin at the same time, after
// prepare(thread). `work` returns how much it got done per second. Returns the sum, or -1 if a
// thread failed.
template <typename Prepare, typename Work>
double RunThreads(int threads, double seconds, const Prepare& prepare, const Work& work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> failed{false};
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  const auto run = [&](int thread) {
    if (!prepare(thread)) failed = true;
    ++waiting;
    while (waiting < threads) std::this_thread::yield();
    if (failed) return;
    const Clock::time_point start = Clock::now();
    const auto expired = [&] { return SecondsSince(start) >= seconds; };
    rates[static_cast<size_t>(thread)] = work(thread, start, expired);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  if (failed) return -1.0;
  double sum = 0.0;
  for (const double rate : rates) sum += rate;
  return sum;
}

// -- arithmetic ----------------------------------------------------------------------------------

// Sums that do not wait for each other: enough for two units with a latency of five cycles.
constexpr int kSums = 10;
// Multiply-adds between two looks at the clock take some 10 microseconds.
constexpr int kRounds = 4096;

// What a kernel multiplies by a number of 8 bits, or 32 for float32.
enum class Weights : int { kInt8 = 8, kInt4 = 4, kFloat32 = 32 };

struct Kernel {
  const char* name;  // instructions, for people
  Weights weights;
  bool (*runs_here)();
  void (*run)();  // does kRounds rounds
  int64_t macs;   // of a round
};

bool Always() { return true; }

#if defined(__x86_64__)

// Keeps the compiler from taking a product out of the loop and from dropping sums that nobody
// reads. It is no instruction.
#define MVLM_OPAQUE(v) asm volatile("" : "+x"(v))
#define MVLM_OPAQUE_ZMM(v) asm volatile("" : "+v"(v))

// Constant trip counts: all sums are registers.
#define MVLM_UNROLL _Pragma("GCC unroll 16")

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }

// __builtin_cpu_supports of older compilers does not know it. Leaf 7, subleaf 1, EAX bit 4.
bool HasAvxVnni() {
  uint32_t eax = 7;
  uint32_t ebx = 0;
  uint32_t ecx = 1;
  uint32_t edx = 0;
  if (!HasAvx2()) return false;  // so the system keeps 256 bit registers, and leaf 7 is there
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax & (1U << 4)) != 0;
}

// 16 bit pairs: (a0 b0 + a1 b1) to 32 bits, exact for numbers that were 8 bits.
void Pmaddwd128() {
  __m128i sums[kSums] = {};
  __m128i a = _mm_set1_epi16(3);
  const __m128i b = _mm_set1_epi16(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m128i& sum : sums) {
      MVLM_OPAQUE(a);
      sum = _mm_add_epi32(sum, _mm_madd_epi16(a, b));
      MVLM_OPAQUE(sum);
    }
  }
}

// Unsigned by signed 8 bits: sums of four products in 16 bits, which is exact for nearly all weights
// (ops/quantized_linear.cpp), widened to 32.
__attribute__((target("avx2"))) void SumsOfFour256() {
  __m256i sums[kSums] = {};
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m256i& sum : sums) {
      MVLM_OPAQUE(a);
      const __m256i two = _mm256_maddubs_epi16(a, b);
      MVLM_OPAQUE(a);
      const __m256i four = _mm256_add_epi16(two, _mm256_maddubs_epi16(a, b));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(four, ones));
      MVLM_OPAQUE(sum);
    }
  }
}

__attribute__((target("avx512f,avx512bw"))) void SumsOfFour512() {
  __m512i sums[kSums] = {};
  __m512i a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(5);
  const __m512i ones = _mm512_set1_epi16(1);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m512i& sum : sums) {
      MVLM_OPAQUE_ZMM(a);
      const __m512i two = _mm512_maddubs_epi16(a, b);
      MVLM_OPAQUE_ZMM(a);
      const __m512i four = _mm512_add_epi16(two, _mm512_maddubs_epi16(a, b));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(four, ones));
      MVLM_OPAQUE_ZMM(sum);
    }
  }
}

// 4 unsigned by 8 signed bits: pairs of products are at most 2 * 15 * 128, of which eight fit 16
// bits; then they are widened.
constexpr int kSafeSums = 8;

__attribute__((target("avx2"))) void Pmaddubsw256() {
  constexpr int kColumns = 4;
  __m256i sums[kColumns] = {};
  __m256i a = _mm256_set1_epi8(15);
  const __m256i b = _mm256_set1_epi8(-3);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int round = 0; round < kRounds; ++round) {
    __m256i narrow[kColumns] = {};
    MVLM_UNROLL for (int k = 0; k < kSafeSums; ++k) {
      MVLM_UNROLL for (__m256i& sum : narrow) {
        MVLM_OPAQUE(a);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
        MVLM_OPAQUE(sum);
      }
    }
    MVLM_UNROLL for (int column = 0; column < kColumns; ++column) {
      sums[column] = _mm256_add_epi32(sums[column], _mm256_madd_epi16(narrow[column], ones));
      MVLM_OPAQUE(sums[column]);
    }
  }
}

__attribute__((target("avx512f,avx512bw"))) void Pmaddubsw512() {
  constexpr int kColumns = 4;
  __m512i sums[kColumns] = {};
  __m512i a = _mm512_set1_epi8(15);
  const __m512i b = _mm512_set1_epi8(-3);
  const __m512i ones = _mm512_set1_epi16(1);
  for (int round = 0; round < kRounds; ++round) {
    __m512i narrow[kColumns] = {};
    MVLM_UNROLL for (int k = 0; k < kSafeSums; ++k) {
      MVLM_UNROLL for (__m512i& sum : narrow) {
        MVLM_OPAQUE_ZMM(a);
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b));
        MVLM_OPAQUE_ZMM(sum);
      }
    }
    MVLM_UNROLL for (int column = 0; column < kColumns; ++column) {
      sums[column] = _mm512_add_epi32(sums[column], _mm512_madd_epi16(narrow[column], ones));
      MVLM_OPAQUE_ZMM(sums[column]);
    }
  }
}

// Sums of four products to 32 bits, exact.
__attribute__((target("avx2,avxvnni"))) void Vpdpbusd256() {
  __m256i sums[kSums] = {};
  const __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m256i& sum : sums) {
      sum = _mm256_dpbusd_avx_epi32(sum, a, b);
      MVLM_OPAQUE(sum);
    }
  }
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) void Vpdpbusd512() {
  __m512i sums[kSums] = {};
  const __m512i a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, a, b);
      MVLM_OPAQUE_ZMM(sum);
    }
  }
}

void MulAdd128() {
  __m128 sums[kSums] = {};
  __m128 a = _mm_set1_ps(0.5F);
  const __m128 b = _mm_set1_ps(0.5F);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m128& sum : sums) {
      MVLM_OPAQUE(a);
      sum = _mm_add_ps(sum, _mm_mul_ps(a, b));
      MVLM_OPAQUE(sum);
    }
  }
}

__attribute__((target("avx2,fma"))) void Fma256() {
  __m256 sums[kSums] = {};
  const __m256 a = _mm256_set1_ps(0.5F);
  const __m256 b = _mm256_set1_ps(0.5F);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m256& sum : sums) {
      sum = _mm256_fmadd_ps(a, b, sum);
      MVLM_OPAQUE(sum);
    }
  }
}

__attribute__((target("avx512f"))) void Fma512() {
  __m512 sums[kSums] = {};
  const __m512 a = _mm512_set1_ps(0.5F);
  const __m512 b = _mm512_set1_ps(0.5F);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (__m512& sum : sums) {
      sum = _mm512_fmadd_ps(a, b, sum);
      MVLM_OPAQUE_ZMM(sum);
    }
  }
}

constexpr Kernel kKernels[] = {
    {"AVX-512 VNNI vpdpbusd", Weights::kInt8, HasAvx512Vnni, Vpdpbusd512, kSums * 64},
    {"AVX-VNNI vpdpbusd", Weights::kInt8, HasAvxVnni, Vpdpbusd256, kSums * 32},
    {"AVX-512 vpmaddubsw, vpmaddwd", Weights::kInt8, HasAvx512, SumsOfFour512, kSums * 128},
    {"AVX2 vpmaddubsw, vpmaddwd", Weights::kInt8, HasAvx2, SumsOfFour256, kSums * 64},
    {"SSE2 pmaddwd on 16 bits", Weights::kInt8, Always, Pmaddwd128, kSums * 8},
    {"AVX-512 VNNI vpdpbusd", Weights::kInt4, HasAvx512Vnni, Vpdpbusd512, kSums * 64},
    {"AVX-VNNI vpdpbusd", Weights::kInt4, HasAvxVnni, Vpdpbusd256, kSums * 32},
    {"AVX-512 vpmaddubsw", Weights::kInt4, HasAvx512, Pmaddubsw512, 4 * kSafeSums * 64},
    {"AVX2 vpmaddubsw", Weights::kInt4, HasAvx2, Pmaddubsw256, 4 * kSafeSums * 32},
    {"SSE2 pmaddwd on 16 bits", Weights::kInt4, Always, Pmaddwd128, kSums * 8},
    {"AVX-512 FMA", Weights::kFloat32, HasAvx512, Fma512, kSums * 16},
    {"AVX2 FMA", Weights::kFloat32, HasAvx2, Fma256, kSums * 8},
    {"SSE2 mulps, addps", Weights::kFloat32, Always, MulAdd128, kSums * 4},
};

#elif defined(__aarch64__)

#define MVLM_OPAQUE(v) asm volatile("" : "+w"(v))
#define MVLM_UNROLL _Pragma("GCC unroll 16")
#if defined(__clang__)
#define MVLM_TARGET(extension) __attribute__((target(extension)))
#else
#define MVLM_TARGET(extension) __attribute__((target("arch=armv8.2-a+" extension)))
#endif

#if defined(__linux__)
bool HasDotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
bool HasI8mm() { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#elif defined(__APPLE__)
bool HasDotprod() { return true; }  // all Macs have it; of i8mm not even M1 does
bool HasI8mm() { return false; }
#else
bool HasDotprod() { return false; }
bool HasI8mm() { return false; }
#endif

// Products to 16 bits, pairs of them added up in 32.
void SmullSadalp() {
  int32x4_t sums[kSums] = {};
  int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (int32x4_t& sum : sums) {
      MVLM_OPAQUE(a);
      sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
      sum = vpadalq_s16(sum, vmull_high_s8(a, b));
      MVLM_OPAQUE(sum);
    }
  }
}

MVLM_TARGET("dotprod") void Sdot() {
  int32x4_t sums[kSums] = {};
  const int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (int32x4_t& sum : sums) {
      sum = vdotq_s32(sum, a, b);
      MVLM_OPAQUE(sum);
    }
  }
}

MVLM_TARGET("i8mm") void Smmla() {
  int32x4_t sums[kSums] = {};
  const int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (int32x4_t& sum : sums) {
      sum = vmmlaq_s32(sum, a, b);
      MVLM_OPAQUE(sum);
    }
  }
}

void Fmla() {
  float32x4_t sums[kSums] = {};
  const float32x4_t a = vdupq_n_f32(0.5F);
  const float32x4_t b = vdupq_n_f32(0.5F);
  for (int round = 0; round < kRounds; ++round) {
    MVLM_UNROLL for (float32x4_t& sum : sums) {
      sum = vfmaq_f32(sum, a, b);
      MVLM_OPAQUE(sum);
    }
  }
}

constexpr Kernel kKernels[] = {
    {"i8mm smmla", Weights::kInt8, HasI8mm, Smmla, kSums * 32},
    {"dotprod sdot", Weights::kInt8, HasDotprod, Sdot, kSums * 16},
    {"NEON smull, sadalp", Weights::kInt8, Always, SmullSadalp, kSums * 16},
    {"i8mm smmla", Weights::kInt4, HasI8mm, Smmla, kSums * 32},
    {"dotprod sdot", Weights::kInt4, HasDotprod, Sdot, kSums * 16},
    {"NEON smull, sadalp", Weights::kInt4, Always, SmullSadalp, kSums * 16},
    {"NEON fmla", Weights::kFloat32, Always, Fmla, kSums * 4},
};

#else

// What the compiler makes of plain C++.
void Scalar() {
  uint32_t sums[kSums] = {};
  uint32_t a = 3;
  for (int round = 0; round < kRounds; ++round) {
    for (uint32_t& sum : sums) {
      asm volatile("" : "+r"(a));
      sum += a * 5U;
    }
  }
  for (uint32_t& sum : sums) asm volatile("" : "+r"(sum));
}

constexpr Kernel kKernels[] = {
    {"scalar", Weights::kInt8, Always, Scalar, kSums},
    {"scalar", Weights::kInt4, Always, Scalar, kSums},
    {"scalar", Weights::kFloat32, Always, Scalar, kSums},
};

#endif

constexpr int kKernelCount = static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]));

// -- memory --------------------------------------------------------------------------------------

// Memory of a thread, touched by itself so that it is near it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(kAlignment), std::nothrow); }

  bool Allocate(size_t bytes) {
    data_ = static_cast<unsigned char*>(
        ::operator new(bytes, std::align_val_t(kAlignment), std::nothrow));
    if (data_ == nullptr) return false;
#if defined(__linux__)
    // With small pages, address translation would be measured, too. Nothing is lost if refused.
    (void)madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    std::memset(data_, 1, bytes);
    bytes_ = bytes;
    return true;
  }

  // Reads all of it once.
  void Read() const {
    constexpr size_t kStep = 16;
    const auto* words = reinterpret_cast<const uint64_t*>(data_);
    uint64_t sums[kStep] = {};
    for (size_t i = 0; i + kStep <= bytes_ / sizeof(uint64_t); i += kStep) {
      for (size_t lane = 0; lane < kStep; ++lane) sums[lane] += words[i + lane];
    }
    uint64_t sum = 0;
    for (const uint64_t lane : sums) sum += lane;
    asm volatile("" : : "r"(sum));
  }

  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = size_t{1} << 21;  // a huge page

  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

#define MVLM_EXPORT extern "C" __attribute__((visibility("default")))

// Kernels are numbered from 0. Their names live as long as the library.
MVLM_EXPORT int mvlm_kernel_count() { return kKernelCount; }

MVLM_EXPORT const char* mvlm_kernel_name(int kernel) {
  return kernel >= 0 && kernel < kKernelCount ? kKernels[kernel].name : nullptr;
}

// Bits of the weights that it multiplies: 4, 8, or 32 for float32.
MVLM_EXPORT int mvlm_kernel_weight_bits(int kernel) {
  return kernel >= 0 && kernel < kKernelCount ? static_cast<int>(kKernels[kernel].weights) : -1;
}

// Whether this CPU has the instructions.
MVLM_EXPORT int mvlm_kernel_runs_here(int kernel) {
  return kernel >= 0 && kernel < kKernelCount && kKernels[kernel].runs_here() ? 1 : 0;
}

// Multiply-adds per second, measured for `seconds`; -1 if the arguments are wrong or a thread could
// not be started.
MVLM_EXPORT double mvlm_multiply_add_rate(int kernel, int threads, double seconds) {
  if (mvlm_kernel_runs_here(kernel) == 0 || threads < 1) return -1.0;
  const Kernel& chosen = kKernels[kernel];
  try {
    return RunThreads(
        threads, seconds, [](int) { return true; },
        [&](int, Clock::time_point start, const auto& expired) {
          double macs = 0.0;
          do {
            chosen.run();
            macs += static_cast<double>(kRounds) * static_cast<double>(chosen.macs);
          } while (!expired());
          return macs / SecondsSince(start);
        });
  } catch (...) {  // no exception may leave a C function
    return -1.0;
  }
}

// Bytes read from memory per second. Every thread reads a buffer of its own, bytes / threads large,
// again and again for `seconds`, at least once. -1 as above, or if there is no memory.
MVLM_EXPORT double mvlm_read_bandwidth(int threads, int64_t bytes, double seconds) {
  if (threads < 1 || bytes < threads) return -1.0;
  try {
    const std::unique_ptr<Buffer[]> buffers(new Buffer[static_cast<size_t>(threads)]);
    return RunThreads(
        threads, seconds,
        [&](int thread) {
          return buffers[static_cast<size_t>(thread)].Allocate(
              static_cast<size_t>(bytes / threads));
        },
        [&](int thread, Clock::time_point start, const auto& expired) {
          const Buffer& buffer = buffers[static_cast<size_t>(thread)];
          double read = 0.0;
          do {
            buffer.Read();
            read += static_cast<double>(buffer.bytes());
          } while (!expired());
          return read / SecondsSince(start);
        });
  } catch (...) {
    return -1.0;
  }
}

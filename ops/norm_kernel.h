// RMSNorm and LayerNorm of rows of float32, alone or together with the addition before them: the
// arithmetic alone, raw pointers and sizes in, numbers out.
//
// A row's result depends on nothing but the row, so that cutting the work into ranges differently
// does not change a bit.
#pragma once

#include <cstdint>

namespace mvlm {

// One call. All tensors are contiguous float32; what is written overlaps nothing else.
struct Norm {
  const float* input;     // [rows, width]
  const float* residual;  // [rows, width], added to the input, or null
  const float* weight;    // [width]
  const float* bias;      // [width]; RMSNorm has none
  float* sum;             // [rows, width], input + residual; null if there is no residual
  float* out;             // [rows, width]

  int64_t rows;
  int64_t width;  // >= 1
  float eps;      // >= 0
};

// For rows begin <= row < end, with x = input or sum: out = x / sqrt(mean(x^2) + eps) * weight.
void RmsNorm(const Norm& call, int64_t begin, int64_t end);

// For rows begin <= row < end, with x = input or sum:
// out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias.
void LayerNorm(const Norm& call, int64_t begin, int64_t end);

// Name of the instruction set that the kernels use on this CPU, such as "AVX2" or "NEON".
const char* NormTarget();

}  // namespace mvlm

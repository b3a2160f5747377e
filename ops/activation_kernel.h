// Activations of float32: the arithmetic alone, raw pointers and sizes in, numbers out.
//
// Every element is computed in the same way wherever it lies, so that cutting the work into ranges
// differently does not change a bit.
#pragma once

#include <cstdint>

namespace mvlm {

// For rows begin <= row < end: out[row, i] = silu(gate_up[row, i]) * gate_up[row, width + i], with
// gate_up [rows, 2 * width] and out [rows, width], which do not overlap.
void Swiglu(const float* gate_up, int64_t begin, int64_t end, int64_t width, float* out);

// For begin <= i < end: out[i] = in[i] * sigmoid(1.702 * in[i]).
void QuickGelu(const float* in, int64_t begin, int64_t end, float* out);

// Name of the instruction set that the kernels use on this CPU, such as "AVX2" or "NEON".
const char* ActivationTarget();

}  // namespace mvlm

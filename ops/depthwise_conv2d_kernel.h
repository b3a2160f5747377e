// Depthwise convolution over grids of float32 with the channels last: the arithmetic alone, raw
// pointers and sizes in, numbers out.
//
// A call is cut into tasks that depend on its shapes only and write different memory: any number of
// threads gives the same bits.
#pragma once

#include <cstdint>

namespace mvlm {

// One call. All tensors are contiguous float32; `out` overlaps no other.
struct DepthwiseConv2d {
  const float* input;   // [batch, rows, columns, channels]
  const float* weight;  // [kernel_rows, kernel_columns, channels]
  const float* bias;    // [channels], or null
  float* out;           // [batch, out_rows, out_columns, channels]

  int64_t batch, rows, columns, channels;  // each >= 1
  int64_t kernel_rows, kernel_columns;     // from 1 to rows or columns + 2 * padding
  int64_t stride;                          // >= 1
  int64_t padding;                         // >= 0, less than both sizes of the kernel
  int64_t out_rows, out_columns;           // (rows + 2 * padding - kernel_rows) / stride + 1
};

// Number of tasks that the call consists of.
int64_t DepthwiseConv2dTasks(const DepthwiseConv2d& call);

// Runs the tasks begin <= task < end.
void RunDepthwiseConv2d(const DepthwiseConv2d& call, int64_t begin, int64_t end);

// Name of the instruction set that the kernel uses on this CPU, such as "AVX2" or "NEON".
const char* DepthwiseConv2dTarget();

}  // namespace mvlm

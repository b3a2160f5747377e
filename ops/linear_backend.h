// A backend in front of XNNPACK, for CPUs on which our kernels of dynamically quantized linears
// (quantized_linear.h) are several times as fast as XNNPACK's: x86 without VNNI.
//
// A .pte names the backend of each of its delegates, and ours name XNNPACK's: any ExecuTorch
// program runs them. A runner that wants our kernels hands ExecuTorch the program with
// kXnnpackBackendId replaced by kLinearBackendId, see runner/program_loader.h. This backend then
// runs what the exporter describes as one linear (compile spec "mvlm_linear", see
// export/linear_specs.py) by itself, with the weights where the .pte has them, and hands all other
// delegates on to XNNPACK.

#pragma once

namespace mvlm {

inline constexpr char kXnnpackBackendId[] = "XnnpackBackend";

// As long as XNNPACK's, so that one can be put in place of the other in a serialized program.
inline constexpr char kLinearBackendId[] = "MvlmCpuBackend";
static_assert(sizeof(kLinearBackendId) == sizeof(kXnnpackBackendId));

// Whether our kernels are the faster ones on this CPU.
__attribute__((visibility("default"))) bool LinearBackendPays();

}  // namespace mvlm

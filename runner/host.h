// What decides, besides a .pte, how XNNPACK lays out packed weights: the processor, for which it
// chooses kernels, and the library itself.

#pragma once

#include <string>
#include <string_view>

namespace mvlm {

// What the text of /proc/cpuinfo says about the processor that a choice of kernels can depend on:
// make, model and features, of every kind of core that there is, each once. Not how many cores
// there are, nor what changes while they run.
std::string CpuIdentity(std::string_view cpuinfo);

// A hash of CpuIdentity() of this machine, in hexadecimal digits.
std::string HostCpuId();

// The build id of the library with ExecuTorch's XNNPACK backend, or of this program if it is
// linked into it; "unknown" if neither has one.
std::string XnnpackBuildId();

}  // namespace mvlm

#include "runner/host.h"

#include <gtest/gtest.h>

namespace mvlm {
namespace {

TEST(CpuIdentity, HasWhatChoosesKernelsAndNothingElse) {
  const std::string one = CpuIdentity(
      "processor\t: 0\nvendor_id\t: A\nmodel\t\t: 1\ncpu MHz\t\t: 2400\nflags\t\t: avx avx2\n\n");
  EXPECT_EQ(one, "flags: avx avx2\nmodel: 1\nvendor_id: A\n");
  const std::string two_at_another_speed = CpuIdentity(
      "processor\t: 0\nvendor_id\t: A\nmodel\t\t: 1\ncpu MHz\t\t: 1\nflags\t\t: avx avx2\n\n"
      "processor\t: 1\nvendor_id\t: A\nmodel\t\t: 1\ncpu MHz\t\t: 2\nflags\t\t: avx avx2\n");
  EXPECT_EQ(two_at_another_speed, one);
  EXPECT_NE(CpuIdentity("vendor_id\t: A\nmodel\t\t: 1\nflags\t\t: avx\n"), one);
}

TEST(CpuIdentity, KnowsEveryKindOfArmCore) {
  EXPECT_EQ(CpuIdentity("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd05\n\n"
                        "processor\t: 4\nFeatures\t: fp asimd\nCPU part\t: 0xd41\n"),
            "CPU part: 0xd05\nCPU part: 0xd41\nFeatures: fp asimd\n");
  EXPECT_EQ(CpuIdentity(""), "");
  EXPECT_EQ(CpuIdentity("nonsense"), "");
}

TEST(Host, IsTheSameEveryTime) {
  EXPECT_EQ(HostCpuId().size(), 16u);
  EXPECT_EQ(HostCpuId(), HostCpuId());
  EXPECT_GE(XnnpackBuildId().size(), 7u);
  EXPECT_EQ(XnnpackBuildId(), XnnpackBuildId());
}

}  // namespace
}  // namespace mvlm

#include "runner/memory.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <vector>

namespace mvlm {
namespace {

TEST(StatusFieldBytes, ReadsKilobytes) {
  const char* status = "Name:\tx\nVmHWM:\t    1234 kB\nRssAnon:\t      56 kB\n";
  EXPECT_EQ(StatusFieldBytes(status, "VmHWM"), 1234 * 1024);
  EXPECT_EQ(StatusFieldBytes(status, "RssAnon"), 56 * 1024);
  EXPECT_EQ(StatusFieldBytes(status, "VmSwap"), 0);
  EXPECT_EQ(StatusFieldBytes("", "VmHWM"), 0);
}

TEST(ReadMemory, ConsistsOfItsParts) {
  const MemoryNow now = ReadMemory();
  EXPECT_GT(now.anonymous_bytes, 0);
  EXPECT_GT(now.file_bytes, 0);
  EXPECT_GE(now.rss_bytes, now.anonymous_bytes);
}

TEST(MemoryMeter, SeesMemoryThatIsGoneAgain) {
  constexpr size_t kBytes = size_t{64} << 20;
  MemoryMeter meter;
  const MemoryUse before = meter.Sample();
  {
    std::vector<char> block(kBytes, 1);
    // Longer than the meter's interval.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    EXPECT_EQ(block[kBytes / 2], 1);
  }
  const MemoryUse after = meter.Sample();
  EXPECT_GT(after.peak_anonymous_bytes - before.peak_anonymous_bytes, int64_t{60} << 20);
  EXPECT_GE(after.peak_rss_bytes, after.peak_anonymous_bytes);
}

}  // namespace
}  // namespace mvlm

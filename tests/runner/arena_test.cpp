#include "runner/arena.h"

#include <gtest/gtest.h>

#include "runner/memory.h"

namespace mvlm {
namespace {

constexpr size_t kBytes = size_t{64} << 20;

TEST(Arena, TakesNoMemoryBeforeItIsWrittenTo) {
  const int64_t before = ReadMemory().anonymous_bytes;
  Arena arena(kBytes);
  ASSERT_NE(arena.data(), nullptr);
  EXPECT_EQ(arena.size(), kBytes);
  EXPECT_LT(ReadMemory().anonymous_bytes - before, int64_t{8} << 20);
  EXPECT_EQ(arena.data()[kBytes - 1], 0);
  arena.data()[kBytes - 1] = 1;
  EXPECT_LT(ReadMemory().anonymous_bytes - before, int64_t{8} << 20);
}

TEST(Arena, MayBeEmptyAndMayBeMoved) {
  Arena empty(0);
  EXPECT_NE(empty.data(), nullptr);
  Arena moved(std::move(empty));
  EXPECT_NE(moved.data(), nullptr);
  EXPECT_EQ(empty.data(), nullptr);
}

TEST(Arena, SaysWhenThereIsNoMemory) { EXPECT_EQ(Arena(SIZE_MAX / 2).data(), nullptr); }

}  // namespace
}  // namespace mvlm

// The memory that a method's tensors and caches live in.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace mvlm {

// Zeroed memory, straight from the operating system: a page of it takes no place before it is
// written to, and all of it is given back at once. So a KV cache takes as much as a conversation
// fills of it, and not what it could hold.
class Arena {
 public:
  // data() is null if there is no such memory. `bytes` may be 0.
  explicit Arena(size_t bytes);
  Arena(Arena&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Arena& operator=(Arena&&) = delete;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mvlm

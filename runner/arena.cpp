#include "runner/arena.h"

#include <sys/mman.h>

#include <algorithm>

namespace mvlm {

Arena::Arena(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
  void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    bytes_ = 0;
    return;
  }
  data_ = static_cast<uint8_t*>(data);
#ifdef MADV_NOHUGEPAGE
  // A page of 2 MiB would bring back what a cache could hold: of every head, the beginning is used.
  madvise(data, bytes_, MADV_NOHUGEPAGE);
#endif
}

Arena::~Arena() {
  if (data_ != nullptr) {
    munmap(data_, bytes_);
  }
}

}  // namespace mvlm

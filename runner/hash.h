// A hash for telling files and names apart; no protection against forgery.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mvlm {

inline constexpr uint64_t kHashSeed = 0xcbf29ce484222325;

// 64-bit FNV-1a. Hashing the parts of something one after the other, each with the result for the
// part before as its `seed`, gives the hash of the whole.
inline uint64_t Hash(std::string_view bytes, uint64_t seed = kHashSeed) {
  uint64_t hash = seed;
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  }
  return hash;
}

// 16 hexadecimal digits.
inline std::string HashToHex(uint64_t hash) {
  std::string text(16, '0');
  for (size_t i = text.size(); i > 0; --i, hash >>= 4) {
    text[i - 1] = "0123456789abcdef"[hash & 15];
  }
  return text;
}

}  // namespace mvlm

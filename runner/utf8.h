// What the runner needs to know about UTF-8. Pure functions over bytes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace mvlm {

struct Utf8Char {
  enum class Kind {
    kValid,       // `length` bytes hold `code_point`
    kInvalid,     // the first byte begins no character; `length` is 1
    kIncomplete,  // the bytes end inside a character that more bytes could complete
  };
  Kind kind;
  uint32_t code_point;
  size_t length;
};

// Reads the first character of `bytes`, which must not be empty. Strict as RFC 3629: no overlong
// forms, no surrogates, nothing above U+10FFFF.
Utf8Char ReadUtf8Char(std::string_view bytes);

// The number of bytes before the first that is not part of a valid character.
size_t ValidUtf8PrefixLength(std::string_view bytes);

inline bool IsValidUtf8(std::string_view bytes) {
  return ValidUtf8PrefixLength(bytes) == bytes.size();
}

// The number of bytes at the end of `bytes` (0 to 3) that begin a character whose rest is missing.
size_t IncompleteUtf8SuffixLength(std::string_view bytes);

// The number of bytes of white space at the beginning and at the end of `text`: what Python's
// str.strip() takes away, so that both runtimes give the same answer.
size_t LeadingSpaceLength(std::string_view text);
size_t TrailingSpaceLength(std::string_view text);

}  // namespace mvlm

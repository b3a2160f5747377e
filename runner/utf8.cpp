#include "runner/utf8.h"

#include <algorithm>

namespace mvlm {
namespace {

bool IsContinuation(unsigned char byte) { return (byte & 0xC0) == 0x80; }

// The characters for which Python's str.isspace() is true.
bool IsSpace(uint32_t code_point) {
  switch (code_point) {
    case 0x20:
    case 0x85:
    case 0xA0:
    case 0x1680:
    case 0x2028:
    case 0x2029:
    case 0x202F:
    case 0x205F:
    case 0x3000:
      return true;
    default:
      return (code_point >= 0x09 && code_point <= 0x0D) ||
             (code_point >= 0x1C && code_point <= 0x1F) ||
             (code_point >= 0x2000 && code_point <= 0x200A);
  }
}

}  // namespace

Utf8Char ReadUtf8Char(std::string_view bytes) {
  constexpr Utf8Char kInvalidByte{Utf8Char::Kind::kInvalid, 0, 1};
  const auto lead = static_cast<unsigned char>(bytes[0]);
  if (lead < 0x80) {
    return {Utf8Char::Kind::kValid, lead, 1};
  }
  // Length from the lead byte, and the range of the second byte, which is what excludes overlong
  // forms (E0, F0), surrogates (ED) and code points above U+10FFFF (F4).
  size_t length = 0;
  unsigned char second_low = 0x80;
  unsigned char second_high = 0xBF;
  uint32_t code_point = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    code_point = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    code_point = lead & 0x0F;
    second_low = lead == 0xE0 ? 0xA0 : 0x80;
    second_high = lead == 0xED ? 0x9F : 0xBF;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    code_point = lead & 0x07;
    second_low = lead == 0xF0 ? 0x90 : 0x80;
    second_high = lead == 0xF4 ? 0x8F : 0xBF;
  } else {
    return kInvalidByte;
  }
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) {
      return {Utf8Char::Kind::kIncomplete, 0, bytes.size()};
    }
    const auto byte = static_cast<unsigned char>(bytes[i]);
    if (!IsContinuation(byte) || (i == 1 && (byte < second_low || byte > second_high))) {
      return kInvalidByte;
    }
    code_point = (code_point << 6) | (byte & 0x3F);
  }
  return {Utf8Char::Kind::kValid, code_point, length};
}

size_t ValidUtf8PrefixLength(std::string_view bytes) {
  size_t offset = 0;
  while (offset < bytes.size()) {
    const Utf8Char next = ReadUtf8Char(bytes.substr(offset));
    if (next.kind != Utf8Char::Kind::kValid) {
      break;
    }
    offset += next.length;
  }
  return offset;
}

size_t IncompleteUtf8SuffixLength(std::string_view bytes) {
  // A character is at most 4 bytes long, so an incomplete one has at most 3.
  for (size_t length = 1; length <= std::min<size_t>(3, bytes.size()); ++length) {
    const std::string_view suffix = bytes.substr(bytes.size() - length);
    if (!IsContinuation(static_cast<unsigned char>(suffix[0]))) {
      return ReadUtf8Char(suffix).kind == Utf8Char::Kind::kIncomplete ? length : 0;
    }
  }
  return 0;
}

size_t LeadingSpaceLength(std::string_view text) {
  size_t offset = 0;
  while (offset < text.size()) {
    const Utf8Char next = ReadUtf8Char(text.substr(offset));
    if (next.kind != Utf8Char::Kind::kValid || !IsSpace(next.code_point)) {
      break;
    }
    offset += next.length;
  }
  return offset;
}

size_t TrailingSpaceLength(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t begin = end - 1;
    while (begin > 0 && end - begin < 4 &&
           IsContinuation(static_cast<unsigned char>(text[begin]))) {
      --begin;
    }
    const Utf8Char last = ReadUtf8Char(text.substr(begin, end - begin));
    if (last.kind != Utf8Char::Kind::kValid || last.length != end - begin ||
        !IsSpace(last.code_point)) {
      break;
    }
    end = begin;
  }
  return text.size() - end;
}

}  // namespace mvlm

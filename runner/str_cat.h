// Joins values into a string, for messages.

#pragma once

#include <sstream>
#include <string>

namespace mvlm {

// StrCat("takes ", 812, " positions") == "takes 812 positions".
template <typename... Parts>
std::string StrCat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace mvlm

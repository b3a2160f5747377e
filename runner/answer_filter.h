// What of the decoded text is the answer: everything before the first stop string, without white
// space at either end. Knows nothing about tokens.

#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mvlm {

// Works on text that comes in parts, and lets through as early as possible what will be in the
// answer whatever follows: white space waits until something else follows it, and text that may
// be the beginning of a stop string waits until it is known to be none.
class AnswerFilter {
 public:
  // Empty stop strings are ignored.
  explicit AnswerFilter(std::vector<std::string> stop_strings);

  // Appends `text` (whole UTF-8 characters) and returns what may be shown. After stopped(),
  // nothing.
  std::string Push(std::string_view text);

  // Returns the rest of the answer. To be called once, at the end.
  std::string Finish();

  // Whether a stop string was seen.
  bool stopped() const { return stopped_; }

 private:
  // Returns pending_[0, end) less white space at its ends, and forgets it; white space at the end
  // stays pending, because it is part of the answer if something follows.
  std::string Release(size_t end);

  std::vector<std::string> stop_strings_;
  std::string pending_;  // not yet returned
  bool begun_ = false;   // something was returned, so white space in front is inside the answer
  bool stopped_ = false;
};

}  // namespace mvlm

#include "runner/answer_filter.h"

#include <algorithm>
#include <utility>

#include "runner/utf8.h"

namespace mvlm {
namespace {

// The length of the longest end of `text` that is a beginning of `stop`, but not all of it.
size_t PartialMatchLength(std::string_view text, std::string_view stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.substr(text.size() - length) == stop.substr(0, length)) {
      return length;
    }
  }
  return 0;
}

}  // namespace

AnswerFilter::AnswerFilter(std::vector<std::string> stop_strings)
    : stop_strings_(std::move(stop_strings)) {
  stop_strings_.erase(std::remove(stop_strings_.begin(), stop_strings_.end(), ""),
                      stop_strings_.end());
}

std::string AnswerFilter::Push(std::string_view text) {
  if (stopped_) {
    return "";
  }
  pending_ += text;
  size_t stop_at = std::string::npos;
  size_t held = 0;
  for (const std::string& stop : stop_strings_) {
    stop_at = std::min(stop_at, pending_.find(stop));
    held = std::max(held, PartialMatchLength(pending_, stop));
  }
  if (stop_at != std::string::npos) {
    stopped_ = true;
    pending_.resize(stop_at);
    held = 0;
  }
  return Release(pending_.size() - held);
}

std::string AnswerFilter::Finish() {
  std::string rest = Release(pending_.size());
  pending_.clear();
  return rest;
}

std::string AnswerFilter::Release(size_t end) {
  if (!begun_) {
    const size_t space = LeadingSpaceLength(std::string_view(pending_).substr(0, end));
    pending_.erase(0, space);
    end -= space;
  }
  const std::string_view candidate = std::string_view(pending_).substr(0, end);
  std::string released(candidate.substr(0, end - TrailingSpaceLength(candidate)));
  pending_.erase(0, released.size());
  begun_ = begun_ || !released.empty();
  return released;
}

}  // namespace mvlm

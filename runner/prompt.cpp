#include "runner/prompt.h"

#include <algorithm>

#include "runner/contract.h"
#include "runner/str_cat.h"
#include "runner/utf8.h"

namespace mvlm {
namespace {

std::vector<std::string> Split(std::string_view text, std::string_view separator) {
  std::vector<std::string> parts;
  for (size_t at = 0;;) {
    const size_t end = text.find(separator, at);
    parts.emplace_back(text.substr(at, end == std::string_view::npos ? end : end - at));
    if (end == std::string_view::npos) {
      return parts;
    }
    at = end + separator.size();
  }
}

std::string FillTemplate(std::string_view prompt_template, std::string_view prompt) {
  const size_t at = prompt_template.find(contract::kPromptPlaceholder);
  std::string filled(prompt_template.substr(0, at));
  filled += prompt;
  filled += prompt_template.substr(at + std::string_view(contract::kPromptPlaceholder).size());
  return filled;
}

}  // namespace

Result<std::vector<std::string>> PromptPieces(const PromptFormat& format,
                                              const Question& question) {
  const size_t valid = ValidUtf8PrefixLength(question.text);
  if (valid != question.text.size()) {
    return InvalidInput(StrCat("the prompt is not valid UTF-8: byte ", valid,
                               " begins no character; give the prompt in UTF-8"));
  }
  if (LeadingSpaceLength(question.text) == question.text.size()) {
    return InvalidInput("the prompt is empty; ask something, e.g. \"What is in the image?\"");
  }
  const std::string& marker = format.image_marker;
  const bool has_marker = !marker.empty() && question.text.find(marker) != std::string_view::npos;
  if (has_marker && !question.has_image) {
    return InvalidInput(StrCat("the prompt contains ", marker,
                               ", which stands for a picture, but no picture was given; add one "
                               "(--image_path) or take ",
                               marker, " out of the prompt"));
  }
  if (question.raw && question.has_image && !has_marker) {
    return InvalidInput(
        StrCat("a raw prompt is taken as it is, so it must say itself where the "
               "picture goes: put ",
               marker, " into it once"));
  }

  std::string text(question.text);
  if (question.has_image && !has_marker) {
    text = format.image_prefix + text;
  }
  if (!question.raw) {
    text = FillTemplate(format.prompt_template, text);
  }
  if (!question.has_image) {
    return std::vector<std::string>{std::move(text)};
  }
  std::vector<std::string> pieces = Split(text, marker);
  if (pieces.size() != 2) {
    return InvalidInput(StrCat("the prompt contains ", marker, " ", pieces.size() - 1,
                               " times, but one picture goes to one place; keep one ", marker));
  }
  return pieces;
}

int64_t TokenizedPrompt::positions() const {
  int64_t count = image_tokens;
  for (const std::vector<int64_t>& piece : pieces) {
    count += static_cast<int64_t>(piece.size());
  }
  return count;
}

Result<int64_t> ResolveSeqLen(std::optional<int64_t> requested, int64_t max_context_len) {
  if (!requested.has_value()) {
    return max_context_len;
  }
  if (*requested < 2 || *requested > max_context_len) {
    return InvalidInput(StrCat("--seq_len ", *requested, " is out of range: this .pte has ",
                               max_context_len, " positions, so 2 to ", max_context_len,
                               " can be used; for more, export with a larger --max-context-len"));
  }
  return *requested;
}

Result<int64_t> ResolveMaxNewTokens(std::optional<int64_t> requested, int64_t prompt_positions,
                                    int64_t seq_len) {
  if (prompt_positions >= seq_len) {
    return InvalidInput(StrCat("the prompt takes ", prompt_positions,
                               " tokens (picture and template included), but at most ", seq_len - 1,
                               " fit into ", seq_len,
                               " positions with room for an answer; shorten the prompt, raise "
                               "--seq_len, or export with a larger --max-context-len"));
  }
  return std::min(requested.value_or(kDefaultMaxNewTokens), seq_len - prompt_positions);
}

std::vector<int64_t> PrefillSteps(int64_t positions, int64_t max_seq_len) {
  std::vector<int64_t> steps;
  for (int64_t left = positions; left > 0; left -= steps.back()) {
    steps.push_back(std::min(left, max_seq_len));
  }
  return steps;
}

}  // namespace mvlm

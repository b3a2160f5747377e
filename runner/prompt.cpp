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
  const auto markers =
      marker.empty() ? 0 : static_cast<int64_t>(Split(question.text, marker).size()) - 1;
  if (markers > 0 && question.images == 0) {
    return InvalidInput(StrCat("the prompt contains ", marker,
                               ", which stands for a picture, but no picture was given; add one "
                               "(--image_path) or take ",
                               marker, " out of the prompt"));
  }
  if (markers > 0 && markers != question.images) {
    return InvalidInput(
        StrCat("the prompt contains ", marker, " ", markers, " times, but there ",
               question.images == 1 ? "is 1 picture" : StrCat("are ", question.images, " pictures"),
               "; put it where each picture goes, or nowhere: then they go before "
               "the question"));
  }
  if (question.raw && question.images > 0 && markers == 0) {
    return InvalidInput(StrCat("a raw prompt is taken as it is, so it must say itself where ",
                               question.images == 1 ? "the picture goes" : "the pictures go",
                               ": put ", marker, " into it for each"));
  }

  std::string text(question.text);
  for (int64_t i = markers; i < question.images; ++i) {
    text = format.image_prefix + text;
  }
  if (!question.raw) {
    text =
        FillTemplate(question.follows ? format.next_turn_template : format.prompt_template, text);
  }
  if (question.images == 0) {
    return std::vector<std::string>{std::move(text)};
  }
  return Split(text, marker);
}

int64_t TokenizedPrompt::positions() const {
  int64_t count = image_tokens * (static_cast<int64_t>(pieces.size()) - 1);
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
                                    int64_t seq_len, int64_t start_pos) {
  const int64_t room = seq_len - start_pos - prompt_positions;
  if (room < 1 && start_pos > 0) {
    return InvalidInput(StrCat("the conversation has used ", start_pos, " of ", seq_len,
                               " positions, and this question takes ", prompt_positions,
                               " (pictures and template included) and its answer 1 at least; begin "
                               "a new conversation or ask something shorter"));
  }
  if (room < 1) {
    return InvalidInput(StrCat("the prompt takes ", prompt_positions,
                               " tokens (picture and template included), but at most ", seq_len - 1,
                               " fit into ", seq_len,
                               " positions with room for an answer; shorten the prompt, raise "
                               "--seq_len, or export with a larger --max-context-len"));
  }
  return std::min(requested.value_or(kDefaultMaxNewTokens), room);
}

std::vector<int64_t> PrefillSteps(int64_t positions, int64_t max_seq_len) {
  std::vector<int64_t> steps;
  for (int64_t left = positions; left > 0; left -= steps.back()) {
    steps.push_back(std::min(left, max_seq_len));
  }
  return steps;
}

}  // namespace mvlm

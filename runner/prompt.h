// From a question to the text pieces that the tokenizer sees, and how many tokens fit. Pure
// functions; nothing here knows a tokenizer, a model or a file.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"

namespace mvlm {

// How a model wants to be asked; read from the .pte.
struct PromptFormat {
  std::string prompt_template;  // contains "{prompt}" exactly once
  // The same for the second and further questions of a conversation. Before it comes an end token.
  std::string next_turn_template;
  // E.g. "<image>": stands where the picture's embeddings go. Empty for a language model alone,
  // which takes no picture and to which "<image>" is text like any other.
  std::string image_marker;
  // E.g. "<image>\n": put before a question that has no marker, once for every picture.
  std::string image_prefix;
};

struct Question {
  std::string_view text;
  int64_t images = 0;  // how many pictures go with it
  // The text is the whole prompt already: it is put into no template and gets no image prefix.
  bool raw = false;
  // Others of its conversation came before it.
  bool follows = false;
};

// The texts around the pictures, one more than there are pictures. Every piece is to be tokenized
// on its own. Pieces may be empty.
//
// InvalidInput: the question is empty or only white space, is not UTF-8, has markers but not as
// many as there are pictures, or is raw and does not say where its pictures go.
Result<std::vector<std::string>> PromptPieces(const PromptFormat& format, const Question& question);

// The token ids of a prompt, by piece, as PromptPieces() gave them. The first piece begins with
// what else comes before it: BOS, or what the conversation has not read yet of the answer before.
// A picture's embeddings go between any two pieces.
struct TokenizedPrompt {
  std::vector<std::vector<int64_t>> pieces;
  int64_t image_tokens = 0;  // positions that each picture takes

  int64_t positions() const;
};

// The number of positions to work with: `requested`, or all that the .pte has. InvalidInput if
// the request is below 2 (one for the prompt, one for the answer) or above the .pte's.
Result<int64_t> ResolveSeqLen(std::optional<int64_t> requested, int64_t max_context_len);

// The number of new tokens to stop after when nobody asked for another number: what the MobileVLM
// reference does.
inline constexpr int64_t kDefaultMaxNewTokens = 512;

// How many tokens may be generated after a prompt of `prompt_positions` that begins at position
// `start_pos`: `requested` (default kDefaultMaxNewTokens) or what is left of `seq_len`, whichever
// is less.
//
// InvalidInput if the prompt leaves no room for a single new token; the message says how many
// positions the prompt takes and how many there are.
Result<int64_t> ResolveMaxNewTokens(std::optional<int64_t> requested, int64_t prompt_positions,
                                    int64_t seq_len, int64_t start_pos = 0);

// The calls in which the decoder, which takes up to `max_seq_len` positions at once, goes over
// `positions` of them: how many each takes, in this order.
std::vector<int64_t> PrefillSteps(int64_t positions, int64_t max_seq_len);

}  // namespace mvlm

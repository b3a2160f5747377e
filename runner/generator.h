// The loop that turns a prompt into tokens and tokens into text. Knows nothing about files,
// pictures or flags.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "mvlm/result.h"
#include "mvlm/runner.h"
#include "runner/model.h"
#include "runner/prompt.h"
#include "runner/sampler.h"
#include "runner/tokenizer.h"

namespace mvlm {

struct Generation {
  std::vector<int64_t> tokens;  // of the answer, without an end token that ended it
  StopReason reason = StopReason::kMaxNewTokens;
  double prefill_ms = 0;               // embedding the prompt and running the model over it
  std::vector<int64_t> prefill_steps;  // positions in each of the calls that took
  double first_token_ms = 0;           // until the first token was sampled; 0 if none was
  double decode_ms = 0;                // running the model over the tokens after that
  int64_t decode_tokens = 0;  // how many times it ran in decode_ms: the first token is prefill's
  // For the next prompt of the same conversation: how many positions the model has run over, and
  // the ids that it must run over first, the rest of the answer and the end token that closes it.
  // If it was interrupted before the first token, as if it had never been asked.
  int64_t end_pos = 0;
  std::vector<int64_t> unread;
};

struct GenerationRequest {
  const TokenizedPrompt& prompt;
  // Of every picture of the prompt, [prompt.image_tokens, hidden].
  const std::vector<std::vector<float>>& image_embeddings;
  int64_t start_pos = 0;       // how many positions of the conversation the KV cache holds
  int64_t max_new_tokens = 1;  // >= 1; prompt and new tokens fit into the KV cache
  bool ignore_eos = false;     // end tokens and stop strings are tokens like others
  // Called with parts of the answer as soon as they are certain: never empty, whole UTF-8
  // characters, no white space at the answer's ends, nothing from a stop string on. Returns
  // whether more is wanted.
  std::function<bool(std::string_view)> on_text;
  // Set from a signal handler or another thread to stop after the current token.
  const std::atomic<bool>& interrupted;
};

// Runs the model over a prompt, in as few calls as its max_seq_len allows: how many positions each
// took is appended to `steps`. The logits of the last call; nothing if it was interrupted between
// two calls.
Result<std::optional<Logits>> Prefill(Model& model, const TokenizedPrompt& prompt,
                                      const std::vector<std::vector<float>>& image_embeddings,
                                      int64_t start_pos, const std::atomic<bool>& interrupted,
                                      std::vector<int64_t>* steps);

// Runs the model over the whole prompt, in as few calls as its max_seq_len allows, and then over
// one token at a time. All of the text was passed to on_text() when this returns, also when it was
// interrupted.
//
// Failure if the model fails or gives logits that are not finite.
Result<Generation> Generate(Model& model, const Tokenizer& tokenizer, Sampler& sampler,
                            const GenerationRequest& request);

}  // namespace mvlm

// A model with its tokenizer and the conversation that is held with it: what llava_main and the
// library are made of. Knows nothing about flags, files of pictures, or where words go.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"
#include "runner/generator.h"
#include "runner/image.h"
#include "runner/model.h"
#include "runner/prompt.h"
#include "runner/sampler.h"
#include "runner/scorer.h"
#include "runner/stats.h"
#include "runner/tokenizer.h"

namespace mvlm {

inline constexpr char kWeightCacheAuto[] = "auto";
inline constexpr char kWeightCacheOff[] = "off";

// An empty optional stands for a default that depends on the .pte or the machine.
struct SessionOptions {
  std::string model_path;
  std::optional<std::string> tokenizer_path;  // in place of the tokenizer in the .pte
  std::optional<int64_t> seq_len;             // positions of a conversation
  std::optional<int64_t> cpu_threads;
  std::optional<WorkspaceSharing> workspace_sharing;
  LinearKernels linear_kernels = LinearKernels::kAuto;
  std::string weight_cache = kWeightCacheAuto;  // or kWeightCacheOff, or a folder
  // Nothing is loaded before it is needed, and the vision encoder is not kept.
  bool low_memory = false;
};

// Checks what can be checked without opening a file; the message names the flag, what was given
// and what is allowed.
Status CheckSessionOptions(const SessionOptions& options);
Status CheckSamplerConfig(const SamplerConfig& config);
// `max_new_tokens` of a question.
Status CheckMaxNewTokens(std::optional<int64_t> max_new_tokens);

// A seed that nobody chose.
uint64_t RandomSeed();

// A question that fits into the conversation.
struct Turn {
  TokenizedPrompt prompt;
  int64_t start_pos = 0;  // of the conversation, when the question was asked
  int64_t max_new_tokens = 0;
};

// Not thread-safe: one call at a time.
class Session {
 public:
  // `say` is told, a line at a time, what a person who waits would want to know; may be empty.
  Session(SessionOptions options, std::function<void(std::string_view)> say);

  // To be called first, and once. Reads metadata and tokenizer and chooses the number of threads;
  // no weights yet. `need_weight_cache`: that there can be none is a failure, and not only said.
  Status Open(bool need_weight_cache = false);

  Model& model() { return *model_; }
  const Metadata& metadata() const { return model_->metadata(); }

  // What was loaded so far and what that took. To be read at any time after Open().
  const RunStats& stats() const { return stats_; }
  // Adds what is in memory now to stats().
  void RecordMemory(std::string stage);

  // InvalidInput unless the .pte takes pictures.
  Status CheckTakesPictures() const;

  // What Encode() and Generate() do by themselves if it was not done before.
  Status LoadVision();
  Status LoadText();
  // Fills the weight cache, in place of loading.
  Status Prepare();

  // Tokenizes a question. InvalidInput if it cannot be asked, or does not fit into what is left of
  // the conversation. Changes nothing.
  Result<Turn> Ask(const Question& question, std::optional<int64_t> max_new_tokens) const;

  // The same for a question that is followed by so many tokens that are given. A question without
  // text and pictures is what comes before it alone: BOS, or the rest of the answer before.
  Result<TokenizedPrompt> AskToScore(const Question& question, int64_t num_ids) const;

  // Token ids of a text, without BOS. InvalidInput if it is not UTF-8.
  Result<std::vector<int64_t>> Tokenize(std::string_view text) const;

  // Embeddings of a picture, [image_tokens, hidden], and in `stats` what that took. Only after
  // CheckTakesPictures().
  Result<std::vector<float>> Encode(const Image& image, ImageStats* stats);
  // Gives back what the vision encoder takes, until the next Encode().
  void UnloadVision();

  // Answers. The conversation goes on from there; after an error, or if it was interrupted before
  // the first token, it is as it was before.
  //
  // `images`: Encode()'s, one for each picture of the question.
  Result<Generation> Generate(const Turn& turn, const std::vector<std::vector<float>>& images,
                              const SamplerConfig& sampling, bool ignore_eos,
                              const std::function<bool(std::string_view)>& on_text,
                              const std::atomic<bool>& interrupted);

  // Runs over a prompt of AskToScore() and then over `ids`, and calls `on_logits` (see scorer.h)
  // for 0, 1, ... ids.size() of them. The conversation is afterwards as it was before.
  //
  // `prompt_logits`: what it gave after the prompt, to be given back for the same prompt unless
  // Generate(), Reset() or Score() of another prompt was called since; it is then not read again.
  // Else empty.
  Status Score(const TokenizedPrompt& prompt, const std::vector<std::vector<float>>& images,
               std::vector<float>* prompt_logits, const std::vector<int64_t>& ids,
               const LogitsCallback& on_logits, const std::atomic<bool>& interrupted);

  // Begins a new conversation.
  void Reset();
  // Positions of the conversation so far, of seq_len(): those that were run and those of unread_,
  // for which there may be no room any more.
  int64_t position() const {
    return std::min(position_ + static_cast<int64_t>(unread_.size()), seq_len());
  }
  int64_t seq_len() const { return stats_.seq_len; }

 private:
  Status OpenWeightCache(bool needed);
  // The text pieces of a prompt, and what comes before it.
  Result<TokenizedPrompt> TokenizePieces(const Question& question,
                                         const std::vector<std::string>& pieces) const;
  void RecordLoad(std::string part, double ms);
  void RecordPackedWeights();
  void Say(const std::string& line) const;

  const SessionOptions options_;
  const std::function<void(std::string_view)> say_;
  std::unique_ptr<Model> model_;
  std::optional<Tokenizer> tokenizer_;
  RunStats stats_;
  bool has_vision_ = false;  // loaded
  bool has_text_ = false;
  // Positions that the KV cache holds, and the ids that are the conversation's, too, but were not
  // run yet.
  int64_t position_ = 0;
  std::vector<int64_t> unread_;
};

}  // namespace mvlm

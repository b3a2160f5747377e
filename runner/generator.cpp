#include "runner/generator.h"

#include <algorithm>
#include <optional>
#include <string>

#include "runner/answer_filter.h"
#include "runner/stopwatch.h"

namespace mvlm {
namespace {

// The prompt as the decoder takes it: [positions, hidden].
Result<std::vector<float>> EmbedPrompt(Model& model, const TokenizedPrompt& prompt,
                                       const std::vector<std::vector<float>>& image_embeddings) {
  std::vector<float> embeddings;
  embeddings.reserve(static_cast<size_t>(prompt.positions() * model.hidden_size()));
  for (size_t i = 0; i < prompt.pieces.size(); ++i) {
    if (i > 0) {
      const std::vector<float>& image = image_embeddings[i - 1];
      embeddings.insert(embeddings.end(), image.begin(), image.end());
    }
    if (Status status = model.EmbedTokens(prompt.pieces[i], &embeddings); !status.ok()) {
      return status.error();
    }
  }
  return embeddings;
}

// From tokens to what on_text() gets.
class TextOutput {
 public:
  TextOutput(const Tokenizer& tokenizer, const std::vector<std::string>& stop_strings,
             const std::function<bool(std::string_view)>& on_text)
      : detokenizer_(tokenizer), filter_(stop_strings), on_text_(on_text) {}

  Status Push(int64_t token) { return Pass(detokenizer_.Push(token)); }

  Status Finish() {
    if (Status status = Pass(detokenizer_.Finish()); !status.ok()) {
      return status;
    }
    Show(filter_.Finish());
    return {};
  }

  bool stopped() const { return filter_.stopped(); }
  bool wanted() const { return wanted_; }

 private:
  Status Pass(const Result<std::string>& text) {
    if (!text.ok()) {
      return text.error();
    }
    Show(filter_.Push(*text));
    return {};
  }

  void Show(const std::string& text) {
    if (!text.empty() && wanted_) {
      wanted_ = on_text_(text);
    }
  }

  Detokenizer detokenizer_;
  AnswerFilter filter_;
  const std::function<bool(std::string_view)>& on_text_;
  bool wanted_ = true;
};

}  // namespace

std::string_view ToString(StopReason reason) {
  switch (reason) {
    case StopReason::kEndOfText:
      return "end of text";
    case StopReason::kStopString:
      return "stop string";
    case StopReason::kMaxNewTokens:
      return "max new tokens";
    case StopReason::kInterrupted:
      return "interrupted";
    case StopReason::kNotWanted:
      return "output closed";
  }
  return "unknown";
}

Result<std::optional<Logits>> Prefill(Model& model, const TokenizedPrompt& prompt,
                                      const std::vector<std::vector<float>>& image_embeddings,
                                      int64_t start_pos, const std::atomic<bool>& interrupted,
                                      std::vector<int64_t>* steps) {
  const Result<std::vector<float>> embeddings = EmbedPrompt(model, prompt, image_embeddings);
  if (!embeddings.ok()) {
    return embeddings.error();
  }
  std::optional<Logits> last;
  int64_t position = 0;
  for (const int64_t n : PrefillSteps(prompt.positions(), model.metadata().max_seq_len)) {
    if (position > 0 && interrupted) {
      return std::optional<Logits>();
    }
    const Result<Logits> logits = model.DecodeText(
        embeddings->data() + position * model.hidden_size(), n, start_pos + position);
    if (!logits.ok()) {
      return logits.error();
    }
    last = *logits;
    position += n;
    steps->push_back(n);
  }
  return last;
}

Result<Generation> Generate(Model& model, const Tokenizer& tokenizer, Sampler& sampler,
                            const GenerationRequest& request) {
  const Metadata& metadata = model.metadata();
  TextOutput output(tokenizer,
                    request.ignore_eos ? std::vector<std::string>() : metadata.stop_strings,
                    request.on_text);
  Generation generation;

  const auto is_end = [&](int64_t token) {
    return !request.ignore_eos && std::find(metadata.eos_ids.begin(), metadata.eos_ids.end(),
                                            token) != metadata.eos_ids.end();
  };
  // Why to stop after the newest token of the answer, if at all.
  const auto stop_reason = [&]() -> std::optional<StopReason> {
    if (output.stopped()) {
      return StopReason::kStopString;
    }
    if (!output.wanted()) {
      return StopReason::kNotWanted;
    }
    if (static_cast<int64_t>(generation.tokens.size()) >= request.max_new_tokens) {
      return StopReason::kMaxNewTokens;
    }
    if (request.interrupted) {
      return StopReason::kInterrupted;
    }
    return std::nullopt;
  };

  const Stopwatch prefill;
  const Result<std::optional<Logits>> after_prompt =
      Prefill(model, request.prompt, request.image_embeddings, request.start_pos,
              request.interrupted, &generation.prefill_steps);
  if (!after_prompt.ok()) {
    return after_prompt.error();
  }
  generation.prefill_ms = prefill.ms();
  if (!after_prompt->has_value()) {
    generation.reason = StopReason::kInterrupted;
    generation.end_pos = request.start_pos;
    return generation;
  }

  Result<Logits> logits = **after_prompt;
  int64_t position = request.start_pos + request.prompt.positions();
  std::vector<float> embedding;
  std::optional<StopReason> reason;
  for (Stopwatch decode;;) {
    if (!logits.ok()) {
      return logits.error();
    }
    const Result<int64_t> token =
        sampler.Sample(logits->last(), static_cast<size_t>(logits->vocab_size));
    if (!token.ok()) {
      return token.error();
    }
    if (generation.decode_tokens == 0) {
      generation.first_token_ms = prefill.ms();
    } else {
      generation.decode_ms = decode.ms();
    }
    if (is_end(*token)) {
      reason = StopReason::kEndOfText;
      generation.unread = {*token};
      break;
    }
    generation.tokens.push_back(*token);
    if (Status status = output.Push(*token); !status.ok()) {
      return status.error();
    }
    reason = stop_reason();
    if (reason.has_value()) {
      generation.unread = {*token, metadata.eos_ids[0]};
      break;
    }
    embedding.clear();
    if (Status status = model.EmbedTokens({*token}, &embedding); !status.ok()) {
      return status.error();
    }
    logits = model.DecodeText(embedding.data(), 1, position);
    ++position;
    ++generation.decode_tokens;
  }
  if (Status status = output.Finish(); !status.ok()) {
    return status.error();
  }
  generation.end_pos = position;
  // The last part may be what found the output closed.
  generation.reason = output.wanted() ? *reason : StopReason::kNotWanted;
  return generation;
}

}  // namespace mvlm

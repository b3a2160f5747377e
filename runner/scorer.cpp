#include "runner/scorer.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "runner/sampler.h"

namespace mvlm {

Status ScoreTokens(Model& model, const std::vector<int64_t>& ids, int64_t start_pos,
                   const std::atomic<bool>& interrupted, const LogitsCallback& on_logits) {
  const auto count = static_cast<int64_t>(ids.size());
  std::vector<float> embeddings;
  if (Status status = model.EmbedTokens(ids, &embeddings); !status.ok()) {
    return status;
  }
  for (int64_t at = 0; at < count;) {
    if (interrupted) {
      return ScoreInterrupted();
    }
    const int64_t n = std::min(model.metadata().logit_positions, count - at);
    const Result<Logits> logits =
        model.DecodeText(embeddings.data() + at * model.hidden_size(), n, start_pos + at);
    if (!logits.ok()) {
      return logits.error();
    }
    for (int64_t row = 0; row < n; ++row) {
      if (Status status = on_logits(at + row + 1, logits->row(row)); !status.ok()) {
        return status;
      }
    }
    at += n;
  }
  return {};
}

Result<double> LogProbability(const float* logits, int64_t vocab_size, int64_t id) {
  const std::optional<size_t> best = ArgMax(logits, static_cast<size_t>(vocab_size));
  if (!best.has_value()) {
    return Failure("the model gave logits that are not finite (NaN or infinity)");
  }
  // Relative to the largest, so that nothing overflows.
  const double largest = logits[*best];
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) {
    sum += std::exp(logits[i] - largest);
  }
  return logits[id] - largest - std::log(sum);
}

Error ScoreInterrupted() { return Failure("stopped before all was read"); }

}  // namespace mvlm

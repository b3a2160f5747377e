#include "runner/sampler.h"

#include <algorithm>
#include <cmath>

namespace mvlm {

std::optional<size_t> ArgMax(const float* logits, size_t size) {
  if (size == 0) {
    return std::nullopt;
  }
  size_t best = 0;
  for (size_t i = 0; i < size; ++i) {
    if (!std::isfinite(logits[i])) {
      return std::nullopt;
    }
    if (logits[i] > logits[best]) {
      best = i;
    }
  }
  return best;
}

Sampler::Sampler(const SamplerConfig& config) : config_(config), generator_(config.seed) {}

Result<int64_t> Sampler::Sample(const float* logits, size_t size) {
  const std::optional<size_t> best = ArgMax(logits, size);
  if (!best.has_value()) {
    return Failure(size == 0 ? "the model gave no logits"
                             : "the model gave logits that are not finite (NaN or infinity), so no "
                               "token can be chosen; the .pte is damaged or badly exported");
  }
  if (config_.temperature == 0.0) {
    return static_cast<int64_t>(*best);
  }

  candidates_.resize(size);
  double total = 0.0;
  for (size_t i = 0; i < size; ++i) {
    // Relative to the largest, so that the exponent is never positive and nothing overflows.
    const double relative = static_cast<double>(logits[i]) - static_cast<double>(logits[*best]);
    candidates_[i] = {std::exp(relative / config_.temperature), i};
    total += candidates_[i].weight;
  }
  if (config_.top_k > 0 || config_.top_p < 1.0) {
    Restrict();
    total = 0.0;
    for (const Candidate& candidate : candidates_) {
      total += candidate.weight;
    }
  }

  double left = UniformRandom() * total;
  size_t drawn = *best;  // stands if rounding lets the loop run out
  for (const Candidate& candidate : candidates_) {
    left -= candidate.weight;
    if (left < 0.0) {
      drawn = candidate.token;
      break;
    }
  }
  return static_cast<int64_t>(drawn);
}

void Sampler::Restrict() {
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    // Equal weights are told apart by id, so that the outcome does not depend on the sort.
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  if (config_.top_k > 0 && static_cast<uint64_t>(config_.top_k) < candidates_.size()) {
    const auto end = candidates_.begin() + static_cast<ptrdiff_t>(config_.top_k);
    std::nth_element(candidates_.begin(), end, candidates_.end(), likelier);
    candidates_.erase(end, candidates_.end());
  }
  std::sort(candidates_.begin(), candidates_.end(), likelier);
  if (config_.top_p < 1.0) {
    double total = 0.0;
    for (const Candidate& candidate : candidates_) {
      total += candidate.weight;
    }
    double sum = 0.0;
    size_t kept = 0;
    while (kept < candidates_.size() && sum < config_.top_p * total) {
      sum += candidates_[kept].weight;
      ++kept;
    }
    candidates_.resize(std::max<size_t>(kept, 1));
  }
}

double Sampler::UniformRandom() {
  // The 53 high bits: exactly the doubles k * 2^-53.
  return static_cast<double>(generator_() >> 11) * 0x1.0p-53;
}

}  // namespace mvlm

// Chooses the next token from logits. Knows nothing about models, text or stopping.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "mvlm/result.h"

namespace mvlm {

// The position of the largest of `logits[0..size)`, the first one if several are equal. Nothing
// if `size` is 0 or any logit is not finite.
std::optional<size_t> ArgMax(const float* logits, size_t size);

struct SamplerConfig {
  double temperature = 0.2;  // >= 0; 0 always takes the likeliest token
  int64_t top_k = 0;         // >= 0; only the k likeliest tokens may be drawn; 0 = all
  double top_p = 1.0;        // in (0, 1]; only the fewest likeliest tokens that together reach
                             // this probability may be drawn; 1 = all
  uint64_t seed = 0;
};

// Applies temperature, then top_k, then top_p (the order of Hugging Face's generate), and draws.
//
// The same seed and the same logits give the same tokens on every platform: the generator is
// std::mt19937_64, whose output the C++ standard fixes, and the draw uses no std:: distribution,
// whose output it does not. Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplerConfig& config);

  // Returns a token id in [0, size). Failure if size is 0 or any logit is NaN or infinite.
  Result<int64_t> Sample(const float* logits, size_t size);

 private:
  struct Candidate {
    double weight;  // unnormalized probability, the likeliest token's is 1
    size_t token;
  };

  // Leaves in candidates_ what top_k and top_p allow.
  void Restrict();
  // In [0, 1), with 53 random bits.
  double UniformRandom();

  SamplerConfig config_;
  std::mt19937_64 generator_;
  std::vector<Candidate> candidates_;  // kept between calls to save the allocation
};

}  // namespace mvlm

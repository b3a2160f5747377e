// Logits of tokens that are given, not chosen: how likely a text is under the model. Knows nothing
// about files, pictures or flags.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "mvlm/result.h"
#include "runner/model.h"

namespace mvlm {

// Gets the logits [vocab_size] after the first `count` of the tokens; they hold until it returns.
using LogitsCallback = std::function<Status(int64_t count, const float* logits)>;

// Runs the model over `ids` at positions start_pos and up, as many in a call as it gives logits of,
// and calls `on_logits` for 1, 2, ... ids.size() of them. Each must be below the vocabulary's size.
//
// Failure if the model fails or it was interrupted; what on_logits() returned if that is no OK.
Status ScoreTokens(Model& model, const std::vector<int64_t>& ids, int64_t start_pos,
                   const std::atomic<bool>& interrupted, const LogitsCallback& on_logits);

// The natural logarithm of a token's probability: log softmax(logits[0..vocab_size))[id]. Failure
// if the logits are not finite.
Result<double> LogProbability(const float* logits, int64_t vocab_size, int64_t id);

// What an interrupted ScoreTokens() fails with.
Error ScoreInterrupted();

}  // namespace mvlm

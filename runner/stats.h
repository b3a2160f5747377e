// What a run took, as JSON.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runner/memory.h"

namespace mvlm {

// Versions that were fixed when this program was built.
std::string MvlmVersion();
std::string ExecuTorchVersion();

struct ImageStats {
  std::string path;
  int64_t width = 0;  // of the picture in the file
  int64_t height = 0;
  int64_t tokens = 0;    // positions it takes in the prompt
  double decode_ms = 0;  // from the file to RGB
  double preprocess_ms = 0;
  double encode_ms = 0;  // the vision encoder alone
};

// All times are wall-clock times in milliseconds.
struct RunStats {
  std::string model_path;
  std::string model_name;
  std::string checkpoint_id;
  std::string exporter_version;  // of the mvlm that made the .pte
  uint64_t model_bytes = 0;
  double load_ms = 0;  // .pte and tokenizer, until the first computation can start
  std::optional<ImageStats> image;
  int64_t prompt_tokens = 0;  // positions, the picture's included
  double prefill_ms = 0;
  // From when everything is loaded until the first token is known: picture and prompt.
  double time_to_first_token_ms = 0;
  int64_t decode_tokens = 0;    // tokens after the first, the end token included
  double decode_ms = 0;         // for them
  std::vector<int64_t> tokens;  // of the answer, without the end token
  std::string stop_reason;
  int64_t seq_len = 0;
  int64_t max_new_tokens = 0;
  double temperature = 0;
  double top_p = 0;
  int64_t top_k = 0;
  uint64_t seed = 0;
  int64_t threads = 0;
  MemoryUse memory;
};

// Tokens per second, 0 if there is nothing to divide.
double TokensPerSecond(int64_t tokens, double ms);

// The JSON object, indented, with a newline at the end. image_encode_ms is null without a picture.
std::string ToJson(const RunStats& stats);

}  // namespace mvlm

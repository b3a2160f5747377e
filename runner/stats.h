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

// How long a part of loading took, and what is in memory at the end of a stage of the run.
struct LoadStats {
  std::string part;
  double ms = 0;
};

struct MemoryStats {
  std::string stage;
  MemoryNow use;
};

// A method's packed weights, see model.h.
struct PackedWeightsStats {
  std::string method;
  std::string state;
  std::string path;
  uint64_t bytes = 0;
  double build_ms = 0;
};

struct WeightCacheStats {
  std::string mode;    // as it was asked for: "auto", "off" or a folder
  std::string folder;  // empty without one
  std::string state;   // the least welcome of the methods'
  std::vector<PackedWeightsStats> methods;
};

// A question and its answer. All times are wall-clock times in milliseconds.
struct TurnStats {
  std::vector<ImageStats> images;
  int64_t start_pos = 0;      // positions that the model had read before
  int64_t prompt_tokens = 0;  // positions, the pictures' included
  double prefill_ms = 0;
  std::vector<int64_t> prefill_steps;  // positions in each call of the decoder for the prompt
  // Pictures and prompt until the first token is known, without loading.
  double time_to_first_token_ms = 0;
  int64_t decode_tokens = 0;    // tokens after the first, the end token included
  double decode_ms = 0;         // for them
  std::vector<int64_t> tokens;  // of the answer, without the end token
  std::string stop_reason;
  int64_t max_new_tokens = 0;
  double temperature = 0;
  double top_p = 0;
  int64_t top_k = 0;
  uint64_t seed = 0;

  // Of all pictures.
  double image_encode_ms() const;
};

// All that is not of one question.
struct RunStats {
  std::string model_path;
  std::string model_name;
  std::string checkpoint_id;
  std::string exporter_version;  // of the mvlm that made the .pte
  uint64_t model_bytes = 0;
  double load_ms = 0;  // .pte, tokenizer and methods, whenever they were loaded
  std::vector<LoadStats> load_parts;
  WeightCacheStats weight_cache;
  bool low_memory = false;
  std::string linear_kernels;  // whose: "mvlm" or "xnnpack"
  int64_t seq_len = 0;
  int64_t threads = 0;
  MemoryUse memory;
  std::vector<MemoryStats> memory_stages;
};

// Tokens per second, 0 if there is nothing to divide.
double TokensPerSecond(int64_t tokens, double ms);

// The JSON object, indented, with a newline at the end. image_encode_ms is null without a picture.
// Of one question all stands side by side; of a conversation the questions are a list, "turns".
std::string ToJson(const RunStats& stats, const TurnStats& turn);
std::string ToJson(const RunStats& stats, const std::vector<TurnStats>& turns);

}  // namespace mvlm

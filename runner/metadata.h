// What a .pte says about itself. Pure: the values come from Model, which executes the .pte's
// constant methods.

#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "mvlm/result.h"
#include "runner/preprocess.h"
#include "runner/prompt.h"

namespace mvlm {

// One output of a constant method. A uint8 tensor comes as a string of its bytes.
using Constant = std::variant<bool, int64_t, double, std::string>;

// By method name, the outputs of every constant method that a .pte has. A list comes as several
// outputs; a single value is a list of one.
using Constants = std::map<std::string, std::vector<Constant>>;

// The names of all constant methods that the contract knows, whether a .pte must have them or not.
const std::vector<std::string>& ContractConstants();

// Those of them that a .pte has if, and only if, it has a vision encoder.
const std::vector<std::string>& ImageConstants();

// How pictures go into the prompt. Only of a .pte that has a vision encoder.
struct VisionMetadata {
  ImageFormat format;
  int64_t tokens = 0;  // positions that one picture takes
};

struct Metadata {
  std::string mvlm_version;  // of the exporter
  std::string model_name;
  std::string program_id;       // tells this program from every other
  std::string checkpoint_id;    // "sha256:" and the checkpoint's hash
  std::string recipe;           // JSON
  // Whose attention it has: "mvlm", or "llama" for ExecuTorch's, as its own programs have it.
  std::string attention_op;
  int64_t max_seq_len = 0;      // the most tokens in one call of the decoder or the embedding
  int64_t max_context_len = 0;  // positions in the KV cache
  int64_t logit_positions = 0;  // the most positions whose logits one call of the decoder gives
  int64_t vocab_size = 0;
  int64_t bos_id = 0;
  std::vector<int64_t> eos_ids;
  PromptFormat prompt;
  std::vector<std::string> stop_strings;
  std::string tokenizer;                 // bytes of a SentencePiece model
  std::optional<VisionMetadata> vision;  // empty for a language model alone
};

// Reads and checks everything. InvalidInput names the first constant that is missing, of the wrong
// type or out of range; a .pte that has none of mvlm's own is said to be another program's.
// `has_vision`: whether the .pte has a vision encoder, and so must have all of ImageConstants();
// otherwise it must have none of them.
Result<Metadata> ParseMetadata(const Constants& constants, bool has_vision);

}  // namespace mvlm

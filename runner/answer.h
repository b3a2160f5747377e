// One question, answered: what llava_main does once its flags are parsed.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "runner/model.h"
#include "runner/prompt.h"
#include "runner/result.h"

namespace mvlm {

inline constexpr char kWeightCacheAuto[] = "auto";
inline constexpr char kWeightCacheOff[] = "off";

// What the user asked for, one field for every flag. An empty optional is a flag that was not
// given, and a default that depends on the .pte or the machine.
struct Options {
  std::string model_path;
  std::optional<std::string> tokenizer_path;
  std::optional<std::string> image_path;
  std::optional<std::string> prompt;  // has to be there, unless `prepare`
  bool raw_prompt = false;
  std::optional<int64_t> seq_len;
  std::optional<int64_t> max_new_tokens;
  double temperature = 0.2;
  double top_p = 1.0;
  int64_t top_k = 0;
  std::optional<uint64_t> seed;
  std::optional<int64_t> cpu_threads;
  bool ignore_eos = false;
  std::optional<WorkspaceSharing> workspace_sharing;
  LinearKernels linear_kernels = LinearKernels::kAuto;
  std::string weight_cache = kWeightCacheAuto;  // or kWeightCacheOff, or a folder
  bool prepare = false;
  bool low_memory = false;
  std::optional<std::string> stats_path;
  std::optional<std::string> etdump_path;
  bool quiet = false;
};

// Checks what can be checked without opening a file; the message names the flag, what was given
// and what is allowed.
Status CheckOptions(const Options& options);

// Answers the question and writes the answer to stdout and how it went to stderr; or, with
// `prepare`, fills the weight cache. Returns the exit code: 0, 2 if the flags or files are at
// fault, 1 for a failure, 130 if interrupted. Errors have been reported by then. Statistics and a
// profile are written if an answer was begun and did not fail.
//
// Everything that can be found wrong is found before the work starts, the cheapest first. To be
// called once in a process, after HandleSignals().
int AnswerQuestion(const Options& options);

}  // namespace mvlm

// What llava_main does once its flags are parsed: answers a question, or holds a conversation.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mvlm/result.h"
#include "runner/session.h"

namespace mvlm {

// What the user asked for, one field for every flag. An empty optional is a flag that was not
// given, and a default that depends on the .pte or the machine.
struct Options : SessionOptions {
  std::vector<std::string> image_paths;
  std::optional<std::string> prompt;  // has to be there, unless `prepare` or `interactive`
  bool raw_prompt = false;
  std::optional<int64_t> max_new_tokens;
  double temperature = 0.2;
  double top_p = 1.0;
  int64_t top_k = 0;
  std::optional<uint64_t> seed;
  bool ignore_eos = false;
  bool interactive = false;
  bool prepare = false;
  std::optional<std::string> stats_path;
  std::optional<std::string> etdump_path;
  bool quiet = false;
};

// Checks what can be checked without opening a file; the message names the flag, what was given
// and what is allowed.
Status CheckOptions(const Options& options);

// Answers the question and writes the answer to stdout and how it went to stderr; or, with
// `interactive`, goes on with what comes from stdin, a line each, until that ends; or, with
// `prepare`, fills the weight cache. Returns the exit code: 0, 2 if the flags or files are at
// fault, 1 for a failure, 130 if interrupted. Errors have been reported by then. Statistics and a
// profile are written if an answer was begun and did not fail.
//
// Everything that can be found wrong is found before the work starts, the cheapest first. To be
// called once in a process, after HandleSignals().
int AnswerQuestion(const Options& options);

}  // namespace mvlm

// The library for apps: a .pte made by mvlm.export, pictures and text in, an answer out.
//
//   auto runner = mvlm::Runner::Load("mobilevlm.pte");           // seconds at first, then less
//   (*runner)->AddPicture("cat.jpg");
//   (*runner)->AddText("What is in the image?");
//   auto answer = (*runner)->Generate({}, [](std::string_view text) { Show(text); return true; });
//
// What follows goes on with the same conversation, whose positions are kept: AddPicture(),
// AddText(), Generate() again. Errors come by value (see result.h); exceptions are none of this
// library, but the standard library's, when memory runs out. For other languages there is
// runner_c.h.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"

#define MVLM_API __attribute__((visibility("default")))

namespace mvlm {

struct RunnerOptions {
  // Threads to compute with, 1 to 1024; 0: as many as there are fast cores. They are one pool for
  // the whole process: load when no other Runner generates.
  int64_t cpu_threads = 0;
  // Positions of a conversation; 0: as many as the .pte has.
  int64_t seq_len = 0;
  // Where to keep weights laid out for this processor, in files as large as the weights: "auto"
  // ($XDG_CACHE_HOME/mvlm or $HOME/.cache/mvlm), "off", or a folder. An app gives its own.
  std::string weight_cache = "auto";
  // Loads nothing before it is needed, and keeps the vision encoder only while it works.
  bool low_memory = false;
  // A SentencePiece tokenizer.model in place of the one in the .pte.
  std::string tokenizer_path;
  // Told, a line at a time, what a log should have; may be empty.
  std::function<void(std::string_view)> on_notice;
};

struct GenerateOptions {
  // Stop after so many tokens; 0: after 512, or what fits.
  int64_t max_new_tokens = 0;
  // 0 always takes the likeliest token; the higher, the more varied.
  double temperature = 0.2;
  // Draw only from the fewest likeliest tokens that together have this probability, above 0 and up
  // to 1.
  double top_p = 1.0;
  // Draw only from so many likeliest tokens; 0: from all.
  int64_t top_k = 0;
  // The same seed gives the same answer; without one it is random.
  std::optional<uint64_t> seed;
  // The text is the whole prompt and is put into no template.
  bool raw_prompt = false;
};

struct ScoreOptions {
  // The text is the whole prompt and is put into no template.
  bool raw_prompt = false;
};

enum class StopReason {
  kEndOfText,     // the model gave one of its end tokens
  kStopString,    // the text contains a stop string
  kMaxNewTokens,  // as many tokens as allowed
  kInterrupted,   // Stop() was called
  kNotWanted,     // on_text() said so
};

// "end of text" and so on.
MVLM_API std::string_view ToString(StopReason reason);

struct Answer {
  std::string text;
  std::vector<int64_t> tokens;  // without the end token
  StopReason reason = StopReason::kEndOfText;
};

// Times are wall-clock times in milliseconds; those of an answer are the last one's.
struct RunnerStats {
  double load_ms = 0;            // so far
  int64_t images = 0;            // of the last question
  double image_encode_ms = 0;    // of all of them
  int64_t prompt_tokens = 0;     // positions, the pictures' included
  double prefill_ms = 0;         // reading the prompt
  double first_token_ms = 0;     // pictures and prompt until the first token was known
  int64_t generated_tokens = 0;  // of the answer
  double decode_ms = 0;          // all tokens after the first
  int64_t decode_tokens = 0;     // them, the end token included
  int64_t positions_used = 0;    // by the conversation
  int64_t positions_total = 0;
};

enum class PixelFormat {
  kRgb,   // 3 bytes a pixel
  kRgba,  // 4, the last is ignored; Android's ARGB_8888 bitmaps are this in memory
};

// One model and one conversation with it. One call at a time, but for Stop(), stats() and
// vocab_size(): any other while one runs, also from its callback, is refused with a Failure.
class MVLM_API Runner {
 public:
  // InvalidInput: there is no such file, it is none of mvlm's, or an option is out of range.
  // Failure: it cannot be loaded.
  static Result<std::unique_ptr<Runner>> Load(const std::string& model_path,
                                              const RunnerOptions& options = {});
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  // Add a picture to the next question, after what was added before, and encode it, which is the
  // larger part of the work. InvalidInput: it cannot be read, is no JPEG or PNG, or the model takes
  // no pictures; then nothing was added.
  Status AddPicture(const std::string& path);
  // The bytes of a JPEG or PNG file.
  Status AddPictureData(const void* data, size_t size);
  // `height` rows of `width` pixels; a row begins `row_bytes` after the one before it.
  Status AddPicturePixels(const uint8_t* pixels, int64_t width, int64_t height, int64_t row_bytes,
                          PixelFormat format);

  // Adds text to the next question. UTF-8. InvalidInput if it contains the .pte's mark for a
  // picture, "<image>".
  Status AddText(std::string_view text);

  // Answers what was added. `on_text` gets the answer as it grows, in whole UTF-8 characters, from
  // the thread that called this, and returns whether more is wanted; it may be empty.
  //
  // InvalidInput if nothing was added or it does not fit into what is left of the conversation:
  // Reset() begins a new one. What was added is gone afterwards, also after an error, and the
  // conversation is then as it was before it.
  Result<Answer> Generate(const GenerateOptions& options = {},
                          const std::function<bool(std::string_view)>& on_text = {});

  // Token ids of a text, as Score() takes them; a word at its beginning is taken for a word of its
  // own, as in an answer. InvalidInput if it is not UTF-8.
  Result<std::vector<int64_t>> Tokenize(std::string_view text);

  // How likely `ids` are after what was added, pictures included, and the conversation before it:
  // of each the natural logarithm of its probability, log softmax of the logits at its place. After
  // nothing at all (no picture, no text, a new conversation) they begin a text: the prompt is BOS.
  //
  // `on_logits` may be empty. It gets the logits themselves, float32 [vocab_size()], for i = 0, 1,
  // ... ids.size(), from the thread that called this: those after the prompt and the first i ids,
  // which say what ids[i] is. They hold until it returns. Without ids there is i = 0 alone: the
  // logits of the next token.
  //
  // What was added stays, and so does the conversation: score one answer after another, or
  // Generate() one. The prompt is read again only if something was added or another prompt came
  // between.
  //
  // InvalidInput if an id is not in 0 .. vocab_size() - 1, or all does not fit into what is left of
  // the conversation. Failure if Stop() was called. stats() says nothing of it.
  Result<std::vector<double>> Score(
      const std::vector<int64_t>& ids, const ScoreOptions& options = {},
      const std::function<void(int64_t i, const float* logits)>& on_logits = {});

  // How many tokens the model can choose from. From any thread.
  int64_t vocab_size() const;

  // Ends the answer that is being generated after the present token, or in the middle of a prompt
  // that is read in several steps, and Score() after the present step. From any thread; without
  // effect if nothing is generated or scored.
  void Stop();

  // Begins a new conversation and forgets what was added.
  Status Reset();

  // As of the end of the last call. From any thread.
  RunnerStats stats() const;

 private:
  class Impl;
  explicit Runner(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace mvlm

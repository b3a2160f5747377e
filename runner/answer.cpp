#include "runner/answer.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "runner/chat_line.h"
#include "runner/console.h"
#include "runner/file.h"
#include "runner/image.h"
#include "runner/interrupt.h"
#include "runner/memory.h"
#include "runner/stopwatch.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

// Count(1, "thread") == "1 thread", Count(2, "thread") == "2 threads".
std::string Count(int64_t count, std::string_view noun) {
  return StrCat(count, " ", noun, count == 1 ? "" : "s");
}

struct Picture {
  Image image;
  ImageStats stats;
};

Result<Picture> ReadPicture(const std::string& path) {
  const Stopwatch stopwatch;
  Result<Image> image = LoadImage(path);
  if (!image.ok()) {
    return image.error();
  }
  Picture picture;
  picture.image = std::move(*image);
  picture.stats.path = path;
  picture.stats.decode_ms = stopwatch.ms();
  return picture;
}

int ExitCode(const Error& error) { return error.kind == ErrorKind::kInvalidInput ? 2 : 1; }

// A line of stdin without its end; nothing at the end of the input, or if a signal came. Failure if
// it cannot be read.
Result<std::optional<std::string>> ReadLine() {
  char* line = nullptr;
  size_t capacity = 0;
  errno = 0;
  const ssize_t length = getline(&line, &capacity, stdin);
  const int error = errno;
  std::optional<std::string> text;
  if (length >= 0) {
    text.emplace(line, static_cast<size_t>(length));
  }
  std::free(line);
  if (length < 0 && std::ferror(stdin) != 0 && error != EINTR) {
    return Failure(StrCat("cannot read from stdin: ", std::strerror(error)));
  }
  return text;
}

// One run from checked options to the exit code. A class only so that its steps, which read like
// the story, need not pass all of it on to each other.
class Run {
 public:
  explicit Run(const Options& options)
      : options_(options),
        progress_(options.quiet),
        session_(options, [this](std::string_view line) { progress_.Say(line); }) {}

  Result<int> Execute() {
    using Step = Status (Run::*)();
    const std::vector<Step> prepare = {&Run::OpenOutputFiles, &Run::OpenModel, &Run::Prepare};
    const std::vector<Step> answer = {
        &Run::OpenOutputFiles, &Run::ReadPictures,   &Run::OpenModel, &Run::Ask,
        &Run::LoadModel,       &Run::EncodePictures, &Run::LoadRest,  &Run::Answer};
    const std::vector<Step> converse = {
        &Run::OpenOutputFiles, &Run::ReadPictures, &Run::OpenModel, &Run::LoadModel,
        &Run::EncodePictures,  &Run::LoadRest,     &Run::Converse};
    for (const Step step : options_.prepare ? prepare : options_.interactive ? converse : answer) {
      // Before the answer has begun there is nothing to tell or to measure.
      if (Interrupted()) {
        progress_.Say("interrupted");
        return kInterruptedExitCode;
      }
      if (Status status = (this->*step)(); !status.ok()) {
        return status.error();
      }
    }
    if (Status status = WriteFiles(); !status.ok()) {
      return status.error();
    }
    return exit_code_;
  }

 private:
  // Where to write is known to be good before the work starts.
  Status OpenOutputFiles() {
    for (const auto& [path, file] : {std::pair(&options_.stats_path, &stats_file_),
                                     std::pair(&options_.etdump_path, &etdump_file_)}) {
      if (!path->has_value()) {
        continue;
      }
      Result<PendingFile> pending = PendingFile::Create(**path);
      if (!pending.ok()) {
        return pending.error();
      }
      file->emplace(std::move(*pending));
    }
    return {};
  }

  Status ReadPictures() {
    for (const std::string& path : options_.image_paths) {
      Result<Picture> picture = ReadPicture(path);
      if (!picture.ok()) {
        return picture.error();
      }
      pictures_.push_back(std::move(*picture));
    }
    return {};
  }

  Status OpenModel() {
    if (Status status = session_.Open(/*need_weight_cache=*/options_.prepare); !status.ok()) {
      return status;
    }
    if (etdump_file_.has_value()) {
      session_.model().StartProfile();
    }
    return pictures_.empty() ? Status() : session_.CheckTakesPictures();
  }

  Status Prepare() {
    if (Status status = session_.Prepare(); !status.ok()) {
      return status;
    }
    const Model& model = session_.model();
    for (const PackedWeightsUse& use : model.packed_weights()) {
      if (use.state == PackedWeights::kFallback) {
        return Failure(StrCat("cannot keep the packed weights of ", use.method, ": ", use.notice));
      }
      if (use.state == PackedWeights::kHit) {
        progress_.Say("the weights of ", use.method, " are there already: ", use.path, " (",
                      FormatBytes(static_cast<int64_t>(use.bytes)), ")");
      }
    }
    if (model.has_own_linears()) {
      progress_.Say(
          "on this processor the weights are read as the .pte has them: there is nothing "
          "to prepare (--linear_kernels xnnpack would want it)");
    } else {
      progress_.Say("prepared ", options_.model_path, " in ", FormatMs(session_.stats().load_ms));
    }
    return {};
  }

  // Tokenizes the question, which finds out whether it can be asked.
  Status Ask() { return Ask(*options_.prompt); }

  Status Ask(const std::string& text) {
    const auto images = static_cast<int64_t>(pictures_.size() + embeddings_.size());
    Result<Turn> turn = session_.Ask({text, images, options_.raw_prompt}, options_.max_new_tokens);
    if (!turn.ok()) {
      return turn.error();
    }
    turn_ = std::move(*turn);
    return {};
  }

  bool has_pictures() const { return !options_.image_paths.empty(); }
  // With little memory the language model waits until the pictures are done.
  bool text_waits() const { return options_.low_memory && has_pictures(); }

  Status LoadModel() {
    if (has_pictures()) {
      if (Status status = session_.LoadVision(); !status.ok()) {
        return status;
      }
    }
    return text_waits() ? Status() : FinishLoading();
  }

  // What LoadModel() left for after the pictures.
  Status LoadRest() { return text_waits() ? FinishLoading() : Status(); }

  Status FinishLoading() {
    if (Status status = session_.LoadText(); !status.ok()) {
      return status;
    }
    session_.RecordMemory("loaded");
    const RunStats& stats = session_.stats();
    progress_.Say("loaded ", options_.model_path, " (", stats.model_name, ", ",
                  FormatBytes(static_cast<int64_t>(stats.model_bytes)), ") in ",
                  FormatMs(stats.load_ms), ", ", Count(stats.threads, "thread"));
    return {};
  }

  Status EncodePictures() {
    if (pictures_.empty()) {
      return {};
    }
    for (Picture& picture : pictures_) {
      if (Interrupted()) {
        return {};
      }
      ImageStats& stats = picture.stats;
      Result<std::vector<float>> embeddings = session_.Encode(picture.image, &stats);
      if (!embeddings.ok()) {
        return embeddings.error();
      }
      progress_.Say("picture ", stats.path, " (", stats.width, " x ", stats.height, ") read in ",
                    FormatMs(stats.decode_ms + stats.preprocess_ms), ", encoded into ",
                    stats.tokens, " tokens in ", FormatMs(stats.encode_ms));
      embeddings_.push_back(std::move(*embeddings));
      image_stats_.push_back(std::move(stats));
    }
    pictures_.clear();
    session_.RecordMemory("encoded");
    // In a conversation there may be more to come.
    if (!options_.interactive || options_.low_memory) {
      session_.UnloadVision();
      session_.RecordMemory("vision unloaded");
    }
    return {};
  }

  // Answers what Ask() asked about the pictures encoded so far.
  Status Answer() {
    TurnStats stats;
    stats.images = std::exchange(image_stats_, {});
    const std::vector<std::vector<float>> embeddings = std::exchange(embeddings_, {});
    stats.start_pos = turn_.start_pos;
    stats.prompt_tokens = turn_.prompt.positions();
    stats.max_new_tokens = turn_.max_new_tokens;
    stats.temperature = options_.temperature;
    stats.top_p = options_.top_p;
    stats.top_k = options_.top_k;
    stats.seed = options_.seed.has_value() ? *options_.seed : RandomSeed();
    if (options_.temperature > 0.0 && !options_.seed.has_value()) {
      progress_.Say("drawing tokens at random; for the same answer again add --seed ", stats.seed,
                    ", for the likeliest --temperature 0");
    }
    AnswerStream out;
    Result<Generation> generation = session_.Generate(
        turn_, embeddings, {stats.temperature, stats.top_k, stats.top_p, stats.seed},
        options_.ignore_eos, [&out](std::string_view text) { return out.Write(text); },
        Interrupted());
    // An answer may be empty; a failure should leave no half a line.
    if (generation.ok() || out.begun()) {
      out.End();
    }
    if (!generation.ok()) {
      return generation.error();
    }
    if (out.failed() && !out.closed()) {
      return Failure(StrCat("cannot write the answer: ", out.error()));
    }
    // A reader that went away early, like head(1), has what it wants, but not the whole answer.
    output_closed_ = out.closed();
    exit_code_ = out.closed()                                     ? 1
                 : generation->reason == StopReason::kInterrupted ? kInterruptedExitCode
                                                                  : 0;
    session_.RecordMemory("answered");
    stats.prefill_ms = generation->prefill_ms;
    stats.prefill_steps = std::move(generation->prefill_steps);
    stats.time_to_first_token_ms = generation->first_token_ms + stats.image_encode_ms();
    for (const ImageStats& image : stats.images) {
      stats.time_to_first_token_ms += image.decode_ms + image.preprocess_ms;
    }
    stats.decode_tokens = generation->decode_tokens;
    stats.decode_ms = generation->decode_ms;
    stats.tokens = std::move(generation->tokens);
    stats.stop_reason = ToString(generation->reason);
    turns_.push_back(std::move(stats));
    if (!options_.interactive) {
      TellStats();
    }
    return {};
  }

  // Of the last answer.
  void TellStats() {
    const TurnStats& turn = turns_.back();
    progress_.Say("prompt of ", turn.prompt_tokens, " tokens read in ", FormatMs(turn.prefill_ms),
                  " (", FormatRate(TokensPerSecond(turn.prompt_tokens, turn.prefill_ms)),
                  " tok/s); first token after ", FormatMs(turn.time_to_first_token_ms));
    progress_.Say(Count(static_cast<int64_t>(turn.tokens.size()), "token"), " of answer; ",
                  turn.decode_tokens, " after the first in ", FormatMs(turn.decode_ms), " (",
                  FormatRate(TokensPerSecond(turn.decode_tokens, turn.decode_ms)),
                  " tok/s); ended by: ", turn.stop_reason, "; peak memory ",
                  FormatBytes(memory_.Sample().peak_rss_bytes));
  }

  // -- a conversation -----------------------------------------------------------------------

  // What is wrong with a line is said, and the conversation goes on. Whoever types sees it; a
  // script learns of it by the exit code.
  Status Converse() {
    const bool is_terminal = isatty(STDIN_FILENO) != 0;
    if (is_terminal) {
      progress_.Say("ask a question, or /help");
    }
    int refused = 0;
    Result<ChatLine> line = ChatLine();
    if (options_.prompt.has_value()) {
      line = ChatLine{ChatLine::Kind::kQuestion, *options_.prompt};
    }
    for (;;) {
      Status status = line.ok() ? Take(*line) : line.error();
      if (!status.ok() && status.error().kind == ErrorKind::kFailure) {
        return status;
      }
      if (!status.ok()) {
        ReportError(status.error().message);
        refused = ExitCode(status.error());
      }
      if (output_closed_) {
        exit_code_ = 1;
        return {};
      }
      const Result<std::optional<std::string>> text = PromptForLine(is_terminal);
      if (!text.ok()) {
        return text.error();
      }
      // At the prompt Ctrl-C ends the conversation.
      if (Interrupted()) {
        exit_code_ = kInterruptedExitCode;
        return {};
      }
      line = text->has_value() ? ParseChatLine(**text)
                               : Result<ChatLine>(ChatLine{ChatLine::Kind::kQuit, ""});
      if (line.ok() && line->kind == ChatLine::Kind::kQuit) {
        exit_code_ = is_terminal ? 0 : refused;
        return {};
      }
    }
  }

  // A line of what is typed; nothing at the end of the input, or if a signal came.
  Result<std::optional<std::string>> PromptForLine(bool is_terminal) {
    if (is_terminal && !options_.quiet) {
      std::fputs("> ", stderr);
    }
    HandleSignals(SignalsDuring::kReading);
    Result<std::optional<std::string>> line = ReadLine();
    HandleSignals(SignalsDuring::kWork);
    if (is_terminal && line.ok() && !line->has_value()) {
      std::fputs("\n", stderr);
    }
    return line;
  }

  Status Take(const ChatLine& line) {
    switch (line.kind) {
      case ChatLine::Kind::kQuestion:
        return TakeQuestion(line.text);
      case ChatLine::Kind::kImage:
        return TakePicture(line.text);
      case ChatLine::Kind::kReset:
        session_.Reset();
        ForgetPictures();
        progress_.Say("a new conversation");
        break;
      case ChatLine::Kind::kStats:
        TellConversation();
        break;
      case ChatLine::Kind::kHelp:
        std::fprintf(stderr, "%s\n", std::string(ChatHelp()).c_str());
        break;
      case ChatLine::Kind::kNothing:
      case ChatLine::Kind::kQuit:
        break;
    }
    return {};
  }

  Status TakePicture(const std::string& path) {
    if (Status status = session_.CheckTakesPictures(); !status.ok()) {
      return status;
    }
    Result<Picture> picture = ReadPicture(path);
    if (!picture.ok()) {
      return picture.error();
    }
    pictures_.push_back(std::move(*picture));
    return EncodePictures();
  }

  // Ctrl-C in the middle of an answer ends the answer alone.
  Status TakeQuestion(const std::string& text) {
    Status status = Ask(text);
    if (status.ok()) {
      status = EncodePictures();
    }
    if (status.ok() && !Interrupted()) {
      status = Answer();
    }
    if (!status.ok() && status.error().kind == ErrorKind::kInvalidInput) {
      return InvalidInput(StrCat(status.error().message, pictures_.empty() && embeddings_.empty()
                                                             ? ""
                                                             : " (the pictures stay)"));
    }
    if (Interrupted()) {
      progress_.Say("interrupted");
      ClearInterrupted();
    }
    return status;
  }

  void ForgetPictures() {
    pictures_.clear();
    embeddings_.clear();
    image_stats_.clear();
  }

  void TellConversation() {
    if (!turns_.empty()) {
      TellStats();
    }
    progress_.Say(session_.position(), " of ", session_.seq_len(), " positions used in ",
                  Count(static_cast<int64_t>(turns_.size()), "answer"), "; ",
                  Count(static_cast<int64_t>(embeddings_.size()), "picture"),
                  " for the next question");
  }


  Status WriteFiles() {
    if (etdump_file_.has_value()) {
      const Result<std::string> profile = session_.model().FinishProfile();
      if (!profile.ok()) {
        return profile.error();
      }
      if (Status status = etdump_file_->Commit(*profile); !status.ok()) {
        return status;
      }
    }
    if (!stats_file_.has_value()) {
      return {};
    }
    RunStats stats = session_.stats();
    stats.memory = memory_.Sample();
    // Of a run that only prepares there is no question.
    return stats_file_->Commit(options_.interactive ? ToJson(stats, turns_)
                               : turns_.empty()     ? ToJson(stats, TurnStats())
                                                    : ToJson(stats, turns_[0]));
  }

  const Options& options_;
  const Progress progress_;
  MemoryMeter memory_;
  std::optional<PendingFile> stats_file_;
  std::optional<PendingFile> etdump_file_;
  Session session_;
  // Of the next question: pictures that were read, and those that were encoded already.
  std::vector<Picture> pictures_;
  std::vector<std::vector<float>> embeddings_;  // [image tokens, hidden]
  std::vector<ImageStats> image_stats_;
  Turn turn_;
  std::vector<TurnStats> turns_;
  bool output_closed_ = false;
  int exit_code_ = 0;
};

// Flags that would be ignored are mistakes.
Status CheckPrepare(const Options& options) {
  if (options.weight_cache == kWeightCacheOff) {
    return InvalidInput(
        "--prepare fills the weight cache, but there is none with --weight_cache off; leave out "
        "one of the two");
  }
  const std::pair<bool, const char*> useless[] = {
      {options.prompt.has_value(), "--prompt"},
      {!options.image_paths.empty(), "--image_path"},
      {options.interactive, "--interactive"},
      {options.etdump_path.has_value(), "--etdump"},
  };
  for (const auto& [given, flag] : useless) {
    if (given) {
      return InvalidInput(
          StrCat("--prepare only fills the weight cache and answers nothing; leave "
                 "out ",
                 flag));
    }
  }
  return {};
}

}  // namespace

Status CheckOptions(const Options& options) {
  const Status checks[] = {
      CheckSamplerConfig({options.temperature, options.top_k, options.top_p, /*seed=*/0}),
      CheckMaxNewTokens(options.max_new_tokens),
      CheckSessionOptions(options),
  };
  for (const Status& status : checks) {
    if (!status.ok()) {
      return status;
    }
  }
  if (options.prepare) {
    return CheckPrepare(options);
  }
  if (options.interactive && options.etdump_path.has_value()) {
    return InvalidInput("--etdump is about one answer; leave it out, or --interactive");
  }
  if (!options.prompt.has_value()) {
    return options.interactive ? Status()
                               : InvalidInput("--prompt is required; see llava_main --help");
  }
  // The rest of what can be wrong with a prompt depends on the .pte; this much does not, and
  // is worth finding before anything is read.
  const Result<std::vector<std::string>> pieces =
      PromptPieces({"{prompt}", "{prompt}", "", ""}, {*options.prompt, 0, /*raw=*/true});
  return pieces.ok() ? Status() : Status(pieces.error());
}

int AnswerQuestion(const Options& options) {
  const Result<int> exit_code = [&options]() -> Result<int> {
    if (Status status = CheckOptions(options); !status.ok()) {
      return status.error();
    }
    return Run(options).Execute();
  }();
  if (exit_code.ok()) {
    return *exit_code;
  }
  ReportError(exit_code.error().message);
  return ExitCode(exit_code.error());
}

}  // namespace mvlm

#include "runner/answer.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "runner/console.h"
#include "runner/file.h"
#include "runner/generator.h"
#include "runner/image.h"
#include "runner/interrupt.h"
#include "runner/memory.h"
#include "runner/preprocess.h"
#include "runner/sampler.h"
#include "runner/stats.h"
#include "runner/stopwatch.h"
#include "runner/str_cat.h"
#include "runner/threads.h"
#include "runner/tokenizer.h"

namespace mvlm {
namespace {

uint64_t RandomSeed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

// Count(1, "thread") == "1 thread", Count(2, "thread") == "2 threads".
std::string Count(int64_t count, std::string_view noun) {
  return StrCat(count, " ", noun, count == 1 ? "" : "s");
}

struct DecodedPicture {
  Image image;
  ImageStats stats;
};

Result<DecodedPicture> ReadPicture(const std::string& path) {
  const Stopwatch stopwatch;
  Result<Image> image = LoadImage(path);
  if (!image.ok()) {
    return image.error();
  }
  DecodedPicture picture;
  picture.image = std::move(*image);
  picture.stats.path = path;
  picture.stats.width = picture.image.width;
  picture.stats.height = picture.image.height;
  picture.stats.decode_ms = stopwatch.ms();
  return picture;
}

Result<Tokenizer> LoadTokenizer(const Options& options, const Metadata& metadata) {
  Result<Tokenizer> tokenizer =
      options.tokenizer_path.has_value()
          ? Tokenizer::FromFile(*options.tokenizer_path)
          : Tokenizer::FromBytes(metadata.tokenizer, "the tokenizer in the .pte");
  if (!tokenizer.ok()) {
    return tokenizer;
  }
  // Its ids would be no rows of the embedding table. Fewer pieces are normal: tables get padded.
  if (tokenizer->size() > metadata.vocab_size) {
    return InvalidInput(StrCat("the tokenizer has ", tokenizer->size(),
                               " pieces, but the model's vocabulary only ", metadata.vocab_size,
                               ": it belongs to another model; leave out --tokenizer_path to use "
                               "the one in the .pte"));
  }
  return tokenizer;
}

Result<TokenizedPrompt> TokenizePrompt(const Options& options, const Metadata& metadata,
                                       const Tokenizer& tokenizer) {
  const Question question = {*options.prompt, options.image_path.has_value(), options.raw_prompt};
  const Result<std::vector<std::string>> pieces = PromptPieces(metadata.prompt, question);
  if (!pieces.ok()) {
    return pieces.error();
  }
  TokenizedPrompt prompt;
  for (const std::string& piece : *pieces) {
    Result<std::vector<int64_t>> ids = tokenizer.Encode(piece);
    if (!ids.ok()) {
      return ids.error();
    }
    prompt.pieces.push_back(std::move(*ids));
  }
  prompt.pieces[0].insert(prompt.pieces[0].begin(), metadata.bos_id);
  prompt.image_tokens = question.has_image ? metadata.vision->tokens : 0;
  return prompt;
}

// One run from checked options to the exit code. A class only so that its steps, which read like
// the story, need not pass all of it on to each other.
class Run {
 public:
  explicit Run(const Options& options) : options_(options), progress_(options.quiet) {}

  Result<int> Execute() {
    using Step = Status (Run::*)();
    const std::vector<Step> answer = {&Run::OpenOutputFiles, &Run::ReadImage, &Run::OpenModel,
                                      &Run::PreparePrompt,   &Run::LoadModel, &Run::EncodeImage,
                                      &Run::LoadRest,        &Run::Generate,  &Run::Report};
    const std::vector<Step> prepare = {&Run::OpenOutputFiles, &Run::OpenModel, &Run::Prepare};
    for (const Step step : options_.prepare ? prepare : answer) {
      // Before the answer has begun there is nothing to tell or to measure.
      if (Interrupted() && stats_.stop_reason.empty()) {
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

  Status ReadImage() {
    if (!options_.image_path.has_value()) {
      return {};
    }
    Result<DecodedPicture> picture = ReadPicture(*options_.image_path);
    if (!picture.ok()) {
      return picture.error();
    }
    image_ = std::move(picture->image);
    stats_.image = std::move(picture->stats);
    return {};
  }

  Status OpenModel() {
    const Stopwatch stopwatch;
    const Result<int64_t> threads = SetThreads(options_.cpu_threads);
    if (!threads.ok()) {
      return threads.error();
    }
    stats_.threads = *threads;
    // What is shared by all methods stays when one of them goes.
    const WorkspaceSharing sharing = options_.workspace_sharing.value_or(
        options_.low_memory ? WorkspaceSharing::kModel : WorkspaceSharing::kGlobal);
    Result<std::unique_ptr<Model>> model = Model::Open(options_.model_path, {sharing, options_.linear_kernels});
    if (!model.ok()) {
      return model.error();
    }
    model_ = std::move(*model);
    if (Status status = OpenWeightCache(); !status.ok()) {
      return status;
    }
    if (etdump_file_.has_value()) {
      model_->StartProfile();
    }
    const Metadata& metadata = model_->metadata();
    if (options_.image_path.has_value() && !metadata.vision.has_value()) {
      return InvalidInput(StrCat(options_.model_path, " (", metadata.model_name,
                                 ") is a language model without a vision encoder and takes no "
                                 "picture; leave out --image_path or use a .pte with a vision "
                                 "encoder"));
    }
    Result<Tokenizer> tokenizer = LoadTokenizer(options_, metadata);
    if (!tokenizer.ok()) {
      return tokenizer.error();
    }
    tokenizer_.emplace(std::move(*tokenizer));
    RecordLoad("open", stopwatch.ms());
    return {};
  }

  // A cache that there cannot be is a reason not to prepare one, but none not to answer.
  Status OpenWeightCache() {
    WeightCacheStats& stats = stats_.weight_cache;
    stats.mode = options_.weight_cache;
    stats.state = ToString(PackedWeights::kOff);
    if (options_.weight_cache == kWeightCacheOff) {
      return {};
    }
    const std::optional<std::string> folder =
        options_.weight_cache == kWeightCacheAuto
            ? UserCacheFolder(std::getenv("XDG_CACHE_HOME"), std::getenv("HOME"))
            : options_.weight_cache;
    Status status = folder.has_value()
                        ? model_->UseWeightCache(*folder)
                        : Failure(
                              "neither XDG_CACHE_HOME nor HOME says where; name a folder with "
                              "--weight_cache");
    if (status.ok()) {
      stats.folder = *folder;
      return {};
    }
    if (status.error().kind == ErrorKind::kInvalidInput) {
      return InvalidInput(StrCat("--weight_cache: ", status.error().message, "; name a folder"));
    }
    const std::string complaint = StrCat("no weight cache: ", status.error().message);
    if (options_.prepare) {
      return Failure(complaint);
    }
    if (folder.has_value()) {
      stats.state = ToString(PackedWeights::kFallback);
    }
    progress_.Say(complaint);
    return {};
  }

  void RecordLoad(std::string part, double ms) {
    stats_.load_ms += ms;
    stats_.load_parts.push_back({std::move(part), ms});
  }

  void RecordMemory(std::string stage) {
    stats_.memory_stages.push_back({std::move(stage), ReadMemory()});
  }

  // What became of the packed weights of the methods that were loaded since the last call.
  void RecordPackedWeights() {
    WeightCacheStats& stats = stats_.weight_cache;
    const std::vector<PackedWeightsUse>& uses = model_->packed_weights();
    std::optional<PackedWeights> worst;
    for (size_t i = 0; i < uses.size(); ++i) {
      const PackedWeightsUse& use = uses[i];
      if (use.state != PackedWeights::kNone) {
        worst = std::max(worst.value_or(use.state), use.state);
      }
      if (i < stats.methods.size()) {
        continue;
      }
      stats.methods.push_back(
          {use.method, std::string(ToString(use.state)), use.path, use.bytes, use.build_ms});
      if (use.state == PackedWeights::kFallback) {
        progress_.Say("weights of ", use.method, " stay in memory: ", use.notice);
      } else if (use.state == PackedWeights::kBuilt) {
        progress_.Say("packed the weights of ", use.method, " into ", use.path, " (",
                      FormatBytes(static_cast<int64_t>(use.bytes)), ") in ", FormatMs(use.build_ms),
                      use.notice.empty() ? "" : StrCat(", because ", use.notice));
      }
    }
    if (!stats.folder.empty()) {
      stats.state = ToString(worst.value_or(PackedWeights::kNone));
    }
  }

  Status PreparePrompt() {
    const Metadata& metadata = model_->metadata();
    Result<TokenizedPrompt> prompt = TokenizePrompt(options_, metadata, *tokenizer_);
    if (!prompt.ok()) {
      return prompt.error();
    }
    prompt_ = std::move(*prompt);
    const Result<int64_t> seq_len = ResolveSeqLen(options_.seq_len, metadata.max_context_len);
    if (!seq_len.ok()) {
      return seq_len.error();
    }
    const Result<int64_t> max_new_tokens =
        ResolveMaxNewTokens(options_.max_new_tokens, prompt_.positions(), *seq_len);
    if (!max_new_tokens.ok()) {
      return max_new_tokens.error();
    }
    if (options_.max_new_tokens.value_or(*max_new_tokens) > *max_new_tokens) {
      progress_.Say("--max_new_tokens ", *options_.max_new_tokens, " becomes ", *max_new_tokens,
                    ": more do not fit after ", prompt_.positions(), " prompt tokens into ",
                    *seq_len, " positions");
    }
    stats_.prompt_tokens = prompt_.positions();
    stats_.seq_len = *seq_len;
    stats_.max_new_tokens = *max_new_tokens;
    return {};
  }

  Status LoadVision() {
    const Stopwatch stopwatch;
    Status status = model_->LoadVision();
    if (status.ok()) {
      RecordLoad("vision", stopwatch.ms());
      RecordPackedWeights();
    }
    return status;
  }

  Status LoadText() {
    const Stopwatch stopwatch;
    Status status = model_->LoadText();
    if (status.ok()) {
      RecordLoad("text", stopwatch.ms());
      RecordPackedWeights();
    }
    return status;
  }

  bool has_image() const { return options_.image_path.has_value(); }
  // With little memory the language model waits until the picture is done.
  bool text_waits() const { return options_.low_memory && has_image(); }

  Status LoadModel() {
    if (has_image()) {
      if (Status status = LoadVision(); !status.ok()) {
        return status;
      }
    }
    return text_waits() ? Status() : FinishLoading();
  }

  // What LoadModel() left for after the picture.
  Status LoadRest() { return text_waits() ? FinishLoading() : Status(); }

  Status FinishLoading() {
    if (Status status = LoadText(); !status.ok()) {
      return status;
    }
    RecordMemory("loaded");
    progress_.Say("loaded ", options_.model_path, " (", model_->metadata().model_name, ", ",
                  FormatBytes(static_cast<int64_t>(model_->file_bytes())), ") in ",
                  FormatMs(stats_.load_ms), ", ", Count(stats_.threads, "thread"));
    return {};
  }

  Status Prepare() {
    const Stopwatch stopwatch;
    if (Status status = model_->Prepare(); !status.ok()) {
      return status;
    }
    RecordLoad("prepare", stopwatch.ms());
    RecordPackedWeights();
    for (const PackedWeightsUse& use : model_->packed_weights()) {
      if (use.state == PackedWeights::kFallback) {
        return Failure(StrCat("cannot keep the packed weights of ", use.method, ": ", use.notice));
      }
      if (use.state == PackedWeights::kHit) {
        progress_.Say("the weights of ", use.method, " are there already: ", use.path, " (",
                      FormatBytes(static_cast<int64_t>(use.bytes)), ")");
      }
    }
    if (model_->has_own_linears()) {
      progress_.Say("on this processor the weights are read as the .pte has them: there is nothing "
                    "to prepare (--linear_kernels xnnpack would want it)");
    } else {
      progress_.Say("prepared ", options_.model_path, " in ", FormatMs(stats_.load_ms));
    }
    FillStats();
    return {};
  }

  Status EncodeImage() {
    if (!image_.has_value()) {
      return {};
    }
    const VisionMetadata& vision = *model_->metadata().vision;
    ImageStats& stats = *stats_.image;
    const Stopwatch preprocess;
    const std::vector<float> pixels = Preprocess(*image_, vision.format);
    image_.reset();
    stats.preprocess_ms = preprocess.ms();
    const Stopwatch encode;
    Result<std::vector<float>> embeddings = model_->EncodeImage(pixels);
    if (!embeddings.ok()) {
      return embeddings.error();
    }
    image_embeddings_ = std::move(*embeddings);
    stats.encode_ms = encode.ms();
    stats.tokens = vision.tokens;
    RecordMemory("encoded");
    model_->UnloadVision();
    RecordMemory("vision unloaded");
    progress_.Say("picture ", stats.path, " (", stats.width, " x ", stats.height, ") read in ",
                  FormatMs(stats.decode_ms + stats.preprocess_ms), ", encoded into ", stats.tokens,
                  " tokens in ", FormatMs(stats.encode_ms));
    return {};
  }

  Status Generate() {
    stats_.temperature = options_.temperature;
    stats_.top_p = options_.top_p;
    stats_.top_k = options_.top_k;
    stats_.seed = options_.seed.has_value() ? *options_.seed : RandomSeed();
    if (options_.temperature > 0.0 && !options_.seed.has_value()) {
      progress_.Say("drawing tokens at random; for the same answer again add --seed ", stats_.seed,
                    ", for the likeliest --temperature 0");
    }
    Sampler sampler({options_.temperature, options_.top_k, options_.top_p, stats_.seed});

    AnswerStream out;
    const GenerationRequest request = {prompt_,
                                       image_embeddings_,
                                       stats_.max_new_tokens,
                                       options_.ignore_eos,
                                       [&out](std::string_view text) { return out.Write(text); },
                                       Interrupted()};
    Result<Generation> generation = mvlm::Generate(*model_, *tokenizer_, sampler, request);
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
    exit_code_ = out.closed()                                     ? 1
                 : generation->reason == StopReason::kInterrupted ? kInterruptedExitCode
                                                                  : 0;
    RecordMemory("answered");
    Record(std::move(*generation));
    return {};
  }

  void Record(Generation generation) {
    stats_.prefill_ms = generation.prefill_ms;
    stats_.prefill_steps = std::move(generation.prefill_steps);
    stats_.time_to_first_token_ms = generation.first_token_ms;
    if (stats_.image.has_value()) {
      stats_.time_to_first_token_ms +=
          stats_.image->decode_ms + stats_.image->preprocess_ms + stats_.image->encode_ms;
    }
    stats_.decode_tokens = generation.decode_tokens;
    stats_.decode_ms = generation.decode_ms;
    stats_.tokens = std::move(generation.tokens);
    stats_.stop_reason = ToString(generation.reason);
  }

  void FillStats() {
    stats_.memory = memory_.Sample();
    stats_.low_memory = options_.low_memory;
    stats_.linear_kernels = model_->has_own_linears() ? "mvlm" : "xnnpack";
    stats_.model_path = options_.model_path;
    stats_.model_name = model_->metadata().model_name;
    stats_.checkpoint_id = model_->metadata().checkpoint_id;
    stats_.exporter_version = model_->metadata().mvlm_version;
    stats_.model_bytes = model_->file_bytes();
  }

  Status Report() {
    FillStats();
    progress_.Say("prompt of ", stats_.prompt_tokens, " tokens read in ",
                  FormatMs(stats_.prefill_ms), " (",
                  FormatRate(TokensPerSecond(stats_.prompt_tokens, stats_.prefill_ms)),
                  " tok/s); first token after ", FormatMs(stats_.time_to_first_token_ms));
    progress_.Say(Count(static_cast<int64_t>(stats_.tokens.size()), "token"), " of answer; ",
                  stats_.decode_tokens, " after the first in ", FormatMs(stats_.decode_ms), " (",
                  FormatRate(TokensPerSecond(stats_.decode_tokens, stats_.decode_ms)),
                  " tok/s); ended by: ", stats_.stop_reason, "; peak memory ",
                  FormatBytes(stats_.memory.peak_rss_bytes));
    return {};
  }

  Status WriteFiles() {
    if (etdump_file_.has_value()) {
      const Result<std::string> profile = model_->FinishProfile();
      if (!profile.ok()) {
        return profile.error();
      }
      if (Status status = etdump_file_->Commit(*profile); !status.ok()) {
        return status;
      }
    }
    return stats_file_.has_value() ? stats_file_->Commit(ToJson(stats_)) : Status();
  }

  const Options& options_;
  const Progress progress_;
  MemoryMeter memory_;
  std::optional<PendingFile> stats_file_;
  std::optional<PendingFile> etdump_file_;
  std::optional<Image> image_;
  std::unique_ptr<Model> model_;
  std::optional<Tokenizer> tokenizer_;
  TokenizedPrompt prompt_;
  std::vector<float> image_embeddings_;  // [image tokens, hidden]
  RunStats stats_;
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
      {options.image_path.has_value(), "--image_path"},
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
  // Written so that NaN fails every check.
  if (!(options.temperature >= 0.0) || std::isinf(options.temperature)) {
    return InvalidInput(StrCat("--temperature ", options.temperature,
                               " is out of range: 0 (always the likeliest token) or more"));
  }
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    return InvalidInput(StrCat("--top_p ", options.top_p,
                               " is out of range: above 0 and up to 1 (1 allows every token)"));
  }
  if (options.top_k < 0) {
    return InvalidInput(
        StrCat("--top_k ", options.top_k, " is out of range: 0 (every token) or more"));
  }
  if (options.max_new_tokens.value_or(1) < 1) {
    return InvalidInput(
        StrCat("--max_new_tokens ", *options.max_new_tokens, " is out of range: 1 or more"));
  }
  const int64_t threads = options.cpu_threads.value_or(1);
  if (threads < 1 || threads > kMaxThreads) {
    return InvalidInput(StrCat("--cpu_threads ", threads, " is out of range: 1 to ", kMaxThreads));
  }
  if (options.weight_cache.empty()) {
    return InvalidInput("--weight_cache is empty; give auto, off or a folder");
  }
  if (options.prepare) {
    return CheckPrepare(options);
  }
  if (!options.prompt.has_value()) {
    return InvalidInput("--prompt is required; see llava_main --help");
  }
  // The rest of what can be wrong with a prompt depends on the .pte; this much does not, and
  // is worth finding before anything is read.
  const Result<std::vector<std::string>> pieces =
      PromptPieces({"{prompt}", "{prompt}", "", ""}, {*options.prompt, false, true});
  return pieces.ok() ? Status() : Status(pieces.error());
}

int AnswerQuestion(const Options& options) {
  Result<int> exit_code = [&options]() -> Result<int> {
    if (Status status = CheckOptions(options); !status.ok()) {
      return status.error();
    }
    return Run(options).Execute();
  }();
  if (exit_code.ok()) {
    return *exit_code;
  }
  ReportError(exit_code.error().message);
  return exit_code.error().kind == ErrorKind::kInvalidInput ? 2 : 1;
}

}  // namespace mvlm

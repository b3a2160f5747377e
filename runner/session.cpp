#include "runner/session.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <utility>

#include "runner/console.h"
#include "runner/preprocess.h"
#include "runner/stopwatch.h"
#include "runner/str_cat.h"
#include "runner/threads.h"
#include "runner/utf8.h"
#include "runner/weight_cache.h"

namespace mvlm {
namespace {

Result<Tokenizer> LoadTokenizer(const SessionOptions& options, const Metadata& metadata) {
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

}  // namespace

uint64_t RandomSeed() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

Status CheckSessionOptions(const SessionOptions& options) {
  const int64_t threads = options.cpu_threads.value_or(1);
  if (threads < 1 || threads > kMaxThreads) {
    return InvalidInput(StrCat("--cpu_threads ", threads, " is out of range: 1 to ", kMaxThreads));
  }
  if (options.weight_cache.empty()) {
    return InvalidInput("--weight_cache is empty; give auto, off or a folder");
  }
  return {};
}

Status CheckSamplerConfig(const SamplerConfig& config) {
  // Written so that NaN fails every check.
  if (!(config.temperature >= 0.0) || std::isinf(config.temperature)) {
    return InvalidInput(StrCat("--temperature ", config.temperature,
                               " is out of range: 0 (always the likeliest token) or more"));
  }
  if (!(config.top_p > 0.0 && config.top_p <= 1.0)) {
    return InvalidInput(StrCat("--top_p ", config.top_p,
                               " is out of range: above 0 and up to 1 (1 allows every token)"));
  }
  if (config.top_k < 0) {
    return InvalidInput(
        StrCat("--top_k ", config.top_k, " is out of range: 0 (every token) or more"));
  }
  return {};
}

Status CheckMaxNewTokens(std::optional<int64_t> max_new_tokens) {
  if (max_new_tokens.value_or(1) < 1) {
    return InvalidInput(
        StrCat("--max_new_tokens ", *max_new_tokens, " is out of range: 1 or more"));
  }
  return {};
}

Session::Session(SessionOptions options, std::function<void(std::string_view)> say)
    : options_(std::move(options)), say_(std::move(say)) {}

void Session::Say(const std::string& line) const {
  if (say_) {
    say_(line);
  }
}

Status Session::Open(bool need_weight_cache) {
  const Stopwatch stopwatch;
  const Result<int64_t> threads = SetThreads(options_.cpu_threads);
  if (!threads.ok()) {
    return threads.error();
  }
  // What is shared by all methods stays when one of them goes.
  const WorkspaceSharing sharing = options_.workspace_sharing.value_or(
      options_.low_memory ? WorkspaceSharing::kModel : WorkspaceSharing::kGlobal);
  Result<std::unique_ptr<Model>> model =
      Model::Open(options_.model_path, {sharing, options_.linear_kernels});
  if (!model.ok()) {
    return model.error();
  }
  model_ = std::move(*model);
  const Result<int64_t> seq_len = ResolveSeqLen(options_.seq_len, metadata().max_context_len);
  if (!seq_len.ok()) {
    return seq_len.error();
  }
  if (Status status = OpenWeightCache(need_weight_cache); !status.ok()) {
    return status;
  }
  Result<Tokenizer> tokenizer = LoadTokenizer(options_, metadata());
  if (!tokenizer.ok()) {
    return tokenizer.error();
  }
  tokenizer_.emplace(std::move(*tokenizer));
  stats_.threads = *threads;
  stats_.seq_len = *seq_len;
  stats_.low_memory = options_.low_memory;
  stats_.linear_kernels = model_->has_own_linears() ? "mvlm" : "xnnpack";
  stats_.model_path = options_.model_path;
  stats_.model_name = metadata().model_name;
  stats_.checkpoint_id = metadata().checkpoint_id;
  stats_.exporter_version = metadata().mvlm_version;
  stats_.model_bytes = model_->file_bytes();
  RecordLoad("open", stopwatch.ms());
  return {};
}

Status Session::CheckTakesPictures() const {
  if (metadata().vision.has_value()) {
    return {};
  }
  return InvalidInput(StrCat(options_.model_path, " (", metadata().model_name,
                             ") is a language model without a vision encoder and takes no "
                             "picture; leave out --image_path or use a .pte with a vision "
                             "encoder"));
}

// A cache that there cannot be is a reason not to prepare one, but none not to answer.
Status Session::OpenWeightCache(bool needed) {
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
  if (needed) {
    return Failure(complaint);
  }
  if (folder.has_value()) {
    stats.state = ToString(PackedWeights::kFallback);
  }
  Say(complaint);
  return {};
}

void Session::RecordLoad(std::string part, double ms) {
  stats_.load_ms += ms;
  stats_.load_parts.push_back({std::move(part), ms});
}

void Session::RecordMemory(std::string stage) {
  stats_.memory_stages.push_back({std::move(stage), ReadMemory()});
}

// What became of the packed weights of the methods that were loaded since the last call.
void Session::RecordPackedWeights() {
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
      Say(StrCat("weights of ", use.method, " stay in memory: ", use.notice));
    } else if (use.state == PackedWeights::kBuilt) {
      Say(StrCat("packed the weights of ", use.method, " into ", use.path, " (",
                 FormatBytes(static_cast<int64_t>(use.bytes)), ") in ", FormatMs(use.build_ms),
                 use.notice.empty() ? "" : StrCat(", because ", use.notice)));
    }
  }
  if (!stats.folder.empty()) {
    stats.state = ToString(worst.value_or(PackedWeights::kNone));
  }
}

Status Session::LoadVision() {
  if (has_vision_) {
    return {};
  }
  const Stopwatch stopwatch;
  Status status = model_->LoadVision();
  if (status.ok()) {
    has_vision_ = true;
    RecordLoad("vision", stopwatch.ms());
    RecordPackedWeights();
  }
  return status;
}

Status Session::LoadText() {
  if (has_text_) {
    return {};
  }
  const Stopwatch stopwatch;
  Status status = model_->LoadText();
  if (status.ok()) {
    has_text_ = true;
    RecordLoad("text", stopwatch.ms());
    RecordPackedWeights();
  }
  return status;
}

Status Session::Prepare() {
  const Stopwatch stopwatch;
  Status status = model_->Prepare();
  if (status.ok()) {
    RecordLoad("prepare", stopwatch.ms());
    RecordPackedWeights();
  }
  return status;
}

Result<TokenizedPrompt> Session::TokenizePieces(const Question& question,
                                                const std::vector<std::string>& pieces) const {
  TokenizedPrompt prompt;
  for (const std::string& piece : pieces) {
    Result<std::vector<int64_t>> ids = tokenizer_->Encode(piece);
    if (!ids.ok()) {
      return ids.error();
    }
    prompt.pieces.push_back(std::move(*ids));
  }
  const std::vector<int64_t> before =
      position() > 0 ? unread_ : std::vector<int64_t>{metadata().bos_id};
  std::vector<int64_t>& first = prompt.pieces[0];
  first.insert(first.begin(), before.begin(), before.end());
  prompt.image_tokens = question.images > 0 ? metadata().vision->tokens : 0;
  return prompt;
}

Result<Turn> Session::Ask(const Question& question, std::optional<int64_t> max_new_tokens) const {
  Question asked = question;
  asked.follows = position() > 0;
  const Result<std::vector<std::string>> pieces = PromptPieces(metadata().prompt, asked);
  if (!pieces.ok()) {
    return pieces.error();
  }
  Result<TokenizedPrompt> prompt = TokenizePieces(asked, *pieces);
  if (!prompt.ok()) {
    return prompt.error();
  }
  Turn turn;
  turn.prompt = std::move(*prompt);
  turn.start_pos = position_;
  const Result<int64_t> room =
      ResolveMaxNewTokens(max_new_tokens, turn.prompt.positions(), seq_len(), position_);
  if (!room.ok()) {
    return room.error();
  }
  turn.max_new_tokens = *room;
  if (max_new_tokens.value_or(*room) > *room) {
    Say(StrCat("--max_new_tokens ", *max_new_tokens, " becomes ", *room, ": more do not fit after ",
               position_ + turn.prompt.positions(), " prompt tokens into ", seq_len(),
               " positions"));
  }
  return turn;
}

Result<TokenizedPrompt> Session::AskToScore(const Question& question, int64_t num_ids) const {
  Question asked = question;
  asked.follows = position() > 0;
  std::vector<std::string> pieces = {""};
  if (!asked.text.empty() || asked.images > 0) {
    Result<std::vector<std::string>> given = PromptPieces(metadata().prompt, asked);
    if (!given.ok()) {
      return given.error();
    }
    pieces = std::move(*given);
  }
  Result<TokenizedPrompt> prompt = TokenizePieces(asked, pieces);
  if (prompt.ok() && prompt->positions() + num_ids > seq_len() - position_) {
    return InvalidInput(StrCat("the prompt takes ", prompt->positions(),
                               " positions and what is to be scored ", num_ids, ", but of ",
                               seq_len(), " only ", seq_len() - position_, " are left"));
  }
  return prompt;
}

Result<std::vector<int64_t>> Session::Tokenize(std::string_view text) const {
  const size_t valid = ValidUtf8PrefixLength(text);
  if (valid != text.size()) {
    return InvalidInput(StrCat("the text is not valid UTF-8: byte ", valid,
                               " begins no character; give the text in UTF-8"));
  }
  return tokenizer_->Encode(text);
}

Result<std::vector<float>> Session::Encode(const Image& image, ImageStats* stats) {
  if (Status status = LoadVision(); !status.ok()) {
    return status.error();
  }
  const VisionMetadata& vision = *metadata().vision;
  const Stopwatch preprocess;
  const std::vector<float> pixels = Preprocess(image, vision.format);
  stats->preprocess_ms = preprocess.ms();
  const Stopwatch encode;
  Result<std::vector<float>> embeddings = model_->EncodeImage(pixels);
  stats->encode_ms = encode.ms();
  stats->width = image.width;
  stats->height = image.height;
  stats->tokens = vision.tokens;
  return embeddings;
}

void Session::UnloadVision() {
  model_->UnloadVision();
  has_vision_ = false;
}

Result<Generation> Session::Generate(const Turn& turn,
                                     const std::vector<std::vector<float>>& images,
                                     const SamplerConfig& sampling, bool ignore_eos,
                                     const std::function<bool(std::string_view)>& on_text,
                                     const std::atomic<bool>& interrupted) {
  if (Status status = LoadText(); !status.ok()) {
    return status.error();
  }
  Sampler sampler(sampling);
  Result<Generation> generation = mvlm::Generate(
      *model_, *tokenizer_, sampler,
      {turn.prompt, images, turn.start_pos, turn.max_new_tokens, ignore_eos, on_text, interrupted});
  // What was run beyond position_ is run over: the KV cache is read no further than it is written.
  if (generation.ok() && generation->end_pos > turn.start_pos) {
    position_ = generation->end_pos;
    unread_ = generation->unread;
  }
  return generation;
}

Status Session::Score(const TokenizedPrompt& prompt, const std::vector<std::vector<float>>& images,
                      std::vector<float>* prompt_logits, const std::vector<int64_t>& ids,
                      const LogitsCallback& on_logits, const std::atomic<bool>& interrupted) {
  if (Status status = LoadText(); !status.ok()) {
    return status;
  }
  if (prompt_logits->empty()) {
    std::vector<int64_t> steps;
    const Result<std::optional<Logits>> read =
        Prefill(*model_, prompt, images, position_, interrupted, &steps);
    if (!read.ok()) {
      return read.error();
    }
    if (!read->has_value()) {
      return ScoreInterrupted();
    }
    const Logits& logits = **read;
    prompt_logits->assign(logits.last(), logits.last() + logits.vocab_size);
  }
  if (Status status = on_logits(0, prompt_logits->data()); !status.ok()) {
    return status;
  }
  return ScoreTokens(*model_, ids, position_ + prompt.positions(), interrupted, on_logits);
}

void Session::Reset() {
  position_ = 0;
  unread_.clear();
}

}  // namespace mvlm

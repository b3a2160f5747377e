#include "mvlm/runner.h"

#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

#include "runner/image.h"
#include "runner/session.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

SessionOptions ToSessionOptions(const std::string& model_path, const RunnerOptions& options) {
  SessionOptions session;
  session.model_path = model_path;
  if (!options.tokenizer_path.empty()) {
    session.tokenizer_path = options.tokenizer_path;
  }
  if (options.seq_len != 0) {
    session.seq_len = options.seq_len;
  }
  if (options.cpu_threads != 0) {
    session.cpu_threads = options.cpu_threads;
  }
  session.weight_cache = options.weight_cache;
  session.low_memory = options.low_memory;
  return session;
}

}  // namespace

class Runner::Impl {
 public:
  Impl(const std::string& model_path, const RunnerOptions& options)
      : low_memory_(options.low_memory),
        session_(ToSessionOptions(model_path, options), options.on_notice) {}

  Status Load() {
    const Call call(*this);
    if (Status status = session_.Open(); !status.ok() || low_memory_) {
      return status;
    }
    if (session_.metadata().vision.has_value()) {
      if (Status status = session_.LoadVision(); !status.ok()) {
        return status;
      }
    }
    return session_.LoadText();
  }

  Status AddPicture(const Result<Image>& image) {
    if (!image.ok()) {
      return image.error();
    }
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    if (Status status = session_.CheckTakesPictures(); !status.ok()) {
      return status;
    }
    ImageStats stats;
    Result<std::vector<float>> embeddings = session_.Encode(*image, &stats);
    if (low_memory_) {
      session_.UnloadVision();
    }
    if (!embeddings.ok()) {
      return embeddings.error();
    }
    read_prompt_.reset();
    embeddings_.push_back(std::move(*embeddings));
    encode_ms_ += stats.encode_ms;
    // As llava_main asks about a picture, if that comes first.
    const PromptFormat& prompt = session_.metadata().prompt;
    text_ += has_text_ ? prompt.image_marker : prompt.image_prefix;
    return {};
  }

  Status AddText(std::string_view text) {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    const std::string& marker = session_.metadata().prompt.image_marker;
    if (!marker.empty() && text.find(marker) != std::string_view::npos) {
      return InvalidInput(StrCat("the text contains ", marker,
                                 ", which stands for a picture; add the text before it, the "
                                 "picture, and the text after it one by one"));
    }
    read_prompt_.reset();
    text_ += text;
    has_text_ = has_text_ || !text.empty();
    return {};
  }

  Result<Answer> Generate(const GenerateOptions& options,
                          const std::function<bool(std::string_view)>& on_text) {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    stop_ = false;
    read_prompt_.reset();
    const std::string text = std::exchange(text_, {});
    const std::vector<std::vector<float>> embeddings = std::exchange(embeddings_, {});
    const double encode_ms = std::exchange(encode_ms_, 0);
    has_text_ = false;

    const SamplerConfig sampling = {options.temperature, options.top_k, options.top_p,
                                    options.seed.has_value() ? *options.seed : RandomSeed()};
    if (Status status = CheckSamplerConfig(sampling); !status.ok()) {
      return status.error();
    }
    std::optional<int64_t> max_new_tokens;
    if (options.max_new_tokens != 0) {
      max_new_tokens = options.max_new_tokens;
    }
    if (Status status = CheckMaxNewTokens(max_new_tokens); !status.ok()) {
      return status.error();
    }
    const Result<Turn> turn = session_.Ask(
        {text, static_cast<int64_t>(embeddings.size()), options.raw_prompt}, max_new_tokens);
    if (!turn.ok()) {
      return turn.error();
    }
    Answer answer;
    const Result<Generation> generation = session_.Generate(
        *turn, embeddings, sampling, /*ignore_eos=*/false,
        [&](std::string_view part) {
          answer.text += part;
          return on_text ? on_text(part) : true;
        },
        stop_);
    if (!generation.ok()) {
      return generation.error();
    }
    answer.tokens = generation->tokens;
    answer.reason = generation->reason;

    stats_.images = static_cast<int64_t>(embeddings.size());
    stats_.image_encode_ms = encode_ms;
    stats_.prompt_tokens = turn->prompt.positions();
    stats_.prefill_ms = generation->prefill_ms;
    stats_.first_token_ms = encode_ms + generation->first_token_ms;
    stats_.generated_tokens = static_cast<int64_t>(generation->tokens.size());
    stats_.decode_ms = generation->decode_ms;
    stats_.decode_tokens = generation->decode_tokens;
    return answer;
  }

  Result<std::vector<int64_t>> Tokenize(std::string_view text) {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    return session_.Tokenize(text);
  }

  Result<std::vector<double>> Score(const std::vector<int64_t>& ids, const ScoreOptions& options,
                                    const std::function<void(int64_t, const float*)>& on_logits) {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    stop_ = false;
    const auto count = static_cast<int64_t>(ids.size());
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] < 0 || ids[i] >= vocab_size()) {
        return InvalidInput(
            StrCat("id ", i, " is ", ids[i], ", which is not in 0 .. ", vocab_size() - 1));
      }
    }
    const Result<TokenizedPrompt> prompt = session_.AskToScore(
        {text_, static_cast<int64_t>(embeddings_.size()), options.raw_prompt}, count);
    if (!prompt.ok()) {
      return prompt.error();
    }
    // Until all went well nothing is known to be read.
    ReadPrompt read;
    if (read_prompt_.has_value() && read_prompt_->raw == options.raw_prompt) {
      read = std::move(*read_prompt_);
    }
    read_prompt_.reset();
    read.raw = options.raw_prompt;
    std::vector<double> log_probabilities;
    const Status status = session_.Score(
        *prompt, embeddings_, &read.logits, ids,
        [&](int64_t i, const float* logits) -> Status {
          if (on_logits) {
            on_logits(i, logits);
          }
          if (i < count) {
            const Result<double> value = LogProbability(logits, vocab_size(), ids[i]);
            if (!value.ok()) {
              return value.error();
            }
            log_probabilities.push_back(*value);
          }
          return {};
        },
        stop_);
    if (!status.ok()) {
      return status.error();
    }
    read_prompt_ = std::move(read);
    return log_probabilities;
  }

  int64_t vocab_size() const { return session_.metadata().vocab_size; }

  void Stop() { stop_ = true; }

  Status Reset() {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    session_.Reset();
    read_prompt_.reset();
    text_.clear();
    embeddings_.clear();
    encode_ms_ = 0;
    has_text_ = false;
    return {};
  }

  RunnerStats stats() const {
    const std::lock_guard<std::mutex> lock(published_mutex_);
    return published_;
  }

 private:
  // The one call that may run. Not a mutex: a callback may call, too, from the same thread.
  class Call {
   public:
    explicit Call(Impl& impl) : impl_(impl), ok_(!impl.in_call_.exchange(true)) {}
    ~Call() {
      if (ok_) {
        impl_.PublishStats();
        impl_.in_call_ = false;
      }
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    bool ok() const { return ok_; }

   private:
    Impl& impl_;
    const bool ok_;
  };

  static Error Busy() {
    return Failure("this Runner is in another call; wait for it, or Stop() it and wait");
  }

  // So that stats() needs nothing that a call may be changing.
  void PublishStats() {
    stats_.load_ms = session_.stats().load_ms;
    stats_.positions_used = session_.position();
    stats_.positions_total = session_.seq_len();
    const std::lock_guard<std::mutex> lock(published_mutex_);
    published_ = stats_;
  }

  const bool low_memory_;
  std::atomic<bool> in_call_{false};
  std::atomic<bool> stop_{false};
  Session session_;
  RunnerStats stats_;
  mutable std::mutex published_mutex_;
  RunnerStats published_;
  // Of the next question: its text with marks for its pictures, and their embeddings.
  std::string text_;
  bool has_text_ = false;  // other than those marks
  std::vector<std::vector<float>> embeddings_;
  double encode_ms_ = 0;
  // What was added, as Score() has read it: the KV cache holds it behind the conversation.
  struct ReadPrompt {
    bool raw = false;
    std::vector<float> logits;  // after its last position
  };
  std::optional<ReadPrompt> read_prompt_;
};

Runner::Runner(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Runner::~Runner() = default;

Result<std::unique_ptr<Runner>> Runner::Load(const std::string& model_path,
                                             const RunnerOptions& options) {
  if (Status status = CheckSessionOptions(ToSessionOptions(model_path, options)); !status.ok()) {
    return status.error();
  }
  auto impl = std::make_unique<Impl>(model_path, options);
  if (Status status = impl->Load(); !status.ok()) {
    return status.error();
  }
  return std::unique_ptr<Runner>(new Runner(std::move(impl)));
}

Status Runner::AddPicture(const std::string& path) { return impl_->AddPicture(LoadImage(path)); }

Status Runner::AddPictureData(const void* data, size_t size) {
  return impl_->AddPicture(
      DecodeImage({static_cast<const char*>(data), size}, "the picture in memory"));
}

Status Runner::AddPicturePixels(const uint8_t* pixels, int64_t width, int64_t height,
                                int64_t row_bytes, PixelFormat format) {
  const int64_t channels = format == PixelFormat::kRgba ? 4 : 3;
  if (width < 1 || height < 1 || width > kMaxImagePixels / height) {
    return InvalidInput(StrCat("a picture of ", width, " x ", height,
                               " pixels is not possible: 1 x ", "1 to ", kMaxImagePixels,
                               " pixels in all"));
  }
  if (row_bytes < width * channels) {
    return InvalidInput(StrCat("rows of ", row_bytes, " bytes are too short for ", width,
                               " pixels of ", channels, " bytes"));
  }
  Image image;
  image.width = width;
  image.height = height;
  image.rgb.reserve(static_cast<size_t>(3 * width * height));
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const uint8_t* pixel = pixels + y * row_bytes + x * channels;
      image.rgb.insert(image.rgb.end(), pixel, pixel + 3);
    }
  }
  return impl_->AddPicture(std::move(image));
}

Status Runner::AddText(std::string_view text) { return impl_->AddText(text); }

Result<Answer> Runner::Generate(const GenerateOptions& options,
                                const std::function<bool(std::string_view)>& on_text) {
  return impl_->Generate(options, on_text);
}

Result<std::vector<int64_t>> Runner::Tokenize(std::string_view text) {
  return impl_->Tokenize(text);
}

Result<std::vector<double>> Runner::Score(
    const std::vector<int64_t>& ids, const ScoreOptions& options,
    const std::function<void(int64_t i, const float* logits)>& on_logits) {
  return impl_->Score(ids, options, on_logits);
}

int64_t Runner::vocab_size() const { return impl_->vocab_size(); }

void Runner::Stop() { impl_->Stop(); }

Status Runner::Reset() { return impl_->Reset(); }

RunnerStats Runner::stats() const { return impl_->stats(); }

}  // namespace mvlm

#include "mvlm/runner.h"

#include <atomic>
#include <mutex>
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

  void Stop() { stop_ = true; }

  Status Reset() {
    const Call call(*this);
    if (!call.ok()) {
      return Busy();
    }
    session_.Reset();
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

void Runner::Stop() { impl_->Stop(); }

Status Runner::Reset() { return impl_->Reset(); }

RunnerStats Runner::stats() const { return impl_->stats(); }

}  // namespace mvlm

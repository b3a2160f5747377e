#include "mvlm/runner_c.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mvlm/runner.h"
#include "runner/stats.h"

struct mvlm_runner {
  std::unique_ptr<mvlm::Runner> runner;
};

namespace {

using mvlm::StopReason;
static_assert(static_cast<int>(StopReason::kEndOfText) == MVLM_STOP_END_OF_TEXT &&
              static_cast<int>(StopReason::kStopString) == MVLM_STOP_STOP_STRING &&
              static_cast<int>(StopReason::kMaxNewTokens) == MVLM_STOP_MAX_NEW_TOKENS &&
              static_cast<int>(StopReason::kInterrupted) == MVLM_STOP_INTERRUPTED &&
              static_cast<int>(StopReason::kNotWanted) == MVLM_STOP_NOT_WANTED);

std::string& LastError() {
  thread_local std::string error;
  return error;
}

mvlm_status Fail(mvlm_status status, const char* message) noexcept {
  try {
    LastError() = message;
  } catch (const std::exception&) {
    LastError().clear();
  }
  return status;
}

mvlm_status ToStatus(const mvlm::Status& status) {
  if (status.ok()) {
    return MVLM_OK;
  }
  return Fail(
      status.error().kind == mvlm::ErrorKind::kInvalidInput ? MVLM_INVALID_INPUT : MVLM_FAILURE,
      status.error().message.c_str());
}

// Runs `body`; what it throws becomes a failure.
template <typename Body>
mvlm_status Guarded(Body body) noexcept {
  try {
    return ToStatus(body());
  } catch (const std::exception& error) {
    return Fail(MVLM_FAILURE, error.what());
  }
}

// What the caller has of a struct, over the defaults of the rest.
template <typename Struct>
Struct Read(const Struct* given, void (*init)(Struct*)) {
  Struct value;
  init(&value);
  if (given != nullptr) {
    std::memcpy(&value, given, std::min(given->size, sizeof(Struct)));
  }
  return value;
}

mvlm::Error MissingArgument(const char* name) {
  return mvlm::InvalidInput(std::string(name) + " is NULL");
}

}  // namespace

void mvlm_runner_options_init(mvlm_runner_options* options) {
  *options = {};
  options->size = sizeof(*options);
  options->weight_cache = "auto";
}

void mvlm_generate_options_init(mvlm_generate_options* options) {
  const mvlm::GenerateOptions defaults;
  *options = {};
  options->size = sizeof(*options);
  options->temperature = defaults.temperature;
  options->top_p = defaults.top_p;
}

void mvlm_score_options_init(mvlm_score_options* options) {
  *options = {};
  options->size = sizeof(*options);
}

mvlm_status mvlm_runner_load(const char* model_path, const mvlm_runner_options* options,
                             mvlm_runner** runner) {
  return Guarded([&]() -> mvlm::Status {
    if (runner == nullptr) {
      return MissingArgument("runner");
    }
    *runner = nullptr;
    if (model_path == nullptr) {
      return MissingArgument("model_path");
    }
    const mvlm_runner_options given = Read(options, mvlm_runner_options_init);
    mvlm::RunnerOptions wanted;
    wanted.cpu_threads = given.cpu_threads;
    wanted.seq_len = given.seq_len;
    if (given.weight_cache != nullptr) {
      wanted.weight_cache = given.weight_cache;
    }
    if (given.tokenizer_path != nullptr) {
      wanted.tokenizer_path = given.tokenizer_path;
    }
    wanted.low_memory = given.low_memory != 0;
    mvlm::Result<std::unique_ptr<mvlm::Runner>> loaded = mvlm::Runner::Load(model_path, wanted);
    if (!loaded.ok()) {
      return loaded.error();
    }
    *runner = new mvlm_runner{std::move(*loaded)};
    return {};
  });
}

void mvlm_runner_free(mvlm_runner* runner) { delete runner; }

mvlm_status mvlm_runner_add_picture(mvlm_runner* runner, const char* path) {
  return Guarded([&]() -> mvlm::Status {
    return path == nullptr ? MissingArgument("path") : runner->runner->AddPicture(path);
  });
}

mvlm_status mvlm_runner_add_picture_data(mvlm_runner* runner, const void* data, size_t size) {
  return Guarded([&]() -> mvlm::Status {
    return data == nullptr ? MissingArgument("data") : runner->runner->AddPictureData(data, size);
  });
}

mvlm_status mvlm_runner_add_picture_pixels(mvlm_runner* runner, const uint8_t* pixels,
                                           int64_t width, int64_t height, int64_t row_bytes,
                                           mvlm_pixel_format format) {
  return Guarded([&]() -> mvlm::Status {
    if (pixels == nullptr) {
      return MissingArgument("pixels");
    }
    return runner->runner->AddPicturePixels(
        pixels, width, height, row_bytes,
        format == MVLM_PIXELS_RGBA ? mvlm::PixelFormat::kRgba : mvlm::PixelFormat::kRgb);
  });
}

mvlm_status mvlm_runner_add_text(mvlm_runner* runner, const char* text) {
  return Guarded([&]() -> mvlm::Status {
    return text == nullptr ? MissingArgument("text") : runner->runner->AddText(text);
  });
}

mvlm_status mvlm_runner_generate(mvlm_runner* runner, const mvlm_generate_options* options,
                                 mvlm_text_callback on_text, void* user_data,
                                 mvlm_stop_reason* reason) {
  return Guarded([&]() -> mvlm::Status {
    const mvlm_generate_options given = Read(options, mvlm_generate_options_init);
    mvlm::GenerateOptions wanted;
    wanted.max_new_tokens = given.max_new_tokens;
    wanted.temperature = given.temperature;
    wanted.top_p = given.top_p;
    wanted.top_k = given.top_k;
    if (given.has_seed != 0) {
      wanted.seed = given.seed;
    }
    wanted.raw_prompt = given.raw_prompt != 0;
    const mvlm::Result<mvlm::Answer> answer =
        runner->runner->Generate(wanted, [&](std::string_view text) {
          return on_text == nullptr || on_text(std::string(text).c_str(), user_data) != 0;
        });
    if (!answer.ok()) {
      return answer.error();
    }
    if (reason != nullptr) {
      *reason = static_cast<mvlm_stop_reason>(answer->reason);
    }
    return {};
  });
}

mvlm_status mvlm_runner_tokenize(mvlm_runner* runner, const char* text, int64_t* ids,
                                 int64_t capacity, int64_t* count) {
  return Guarded([&]() -> mvlm::Status {
    if (text == nullptr) {
      return MissingArgument("text");
    }
    if (count == nullptr) {
      return MissingArgument("count");
    }
    if (ids == nullptr && capacity > 0) {
      return MissingArgument("ids");
    }
    const mvlm::Result<std::vector<int64_t>> found = runner->runner->Tokenize(text);
    if (!found.ok()) {
      return found.error();
    }
    *count = static_cast<int64_t>(found->size());
    std::copy_n(found->begin(), std::clamp<int64_t>(capacity, 0, *count), ids);
    return {};
  });
}

mvlm_status mvlm_runner_score(mvlm_runner* runner, const int64_t* ids, int64_t count,
                              const mvlm_score_options* options, mvlm_logits_callback on_logits,
                              void* user_data, double* log_probabilities) {
  return Guarded([&]() -> mvlm::Status {
    if (count < 0) {
      return mvlm::InvalidInput("count is negative");
    }
    if (ids == nullptr && count > 0) {
      return MissingArgument("ids");
    }
    mvlm::ScoreOptions wanted;
    wanted.raw_prompt = Read(options, mvlm_score_options_init).raw_prompt != 0;
    const std::vector<int64_t> given(ids, ids + count);
    const mvlm::Result<std::vector<double>> scored =
        runner->runner->Score(given, wanted, [&](int64_t i, const float* logits) {
          if (on_logits != nullptr) {
            on_logits(i, logits, user_data);
          }
        });
    if (!scored.ok()) {
      return scored.error();
    }
    if (log_probabilities != nullptr) {
      std::copy(scored->begin(), scored->end(), log_probabilities);
    }
    return {};
  });
}

int64_t mvlm_runner_vocab_size(const mvlm_runner* runner) { return runner->runner->vocab_size(); }

void mvlm_runner_stop(mvlm_runner* runner) { runner->runner->Stop(); }

mvlm_status mvlm_runner_reset(mvlm_runner* runner) {
  return Guarded([&] { return runner->runner->Reset(); });
}

void mvlm_runner_get_stats(const mvlm_runner* runner, mvlm_stats* stats) {
  const mvlm::RunnerStats now = runner->runner->stats();
  const mvlm_stats all = {stats->size,         now.load_ms,          now.images,
                          now.image_encode_ms, now.prompt_tokens,    now.prefill_ms,
                          now.first_token_ms,  now.generated_tokens, now.decode_ms,
                          now.decode_tokens,   now.positions_used,   now.positions_total};
  std::memcpy(stats, &all, std::min(stats->size, sizeof(all)));
}

const char* mvlm_last_error(void) { return LastError().c_str(); }

const char* mvlm_version(void) {
  static const std::string version = mvlm::MvlmVersion();
  return version.c_str();
}

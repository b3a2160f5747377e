#include "runner/stats.h"

#include <nlohmann/json.hpp>

#include "runner/contract.h"

namespace mvlm {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

}  // namespace

std::string MvlmVersion() { return MVLM_VERSION; }

std::string ExecuTorchVersion() { return MVLM_EXECUTORCH_VERSION; }

double TokensPerSecond(int64_t tokens, double ms) {
  return tokens > 0 && ms > 0 ? 1000.0 * static_cast<double>(tokens) / ms : 0.0;
}

std::string ToJson(const RunStats& stats) {
  Json json;
  json["model"] = {
      {"path", stats.model_path},
      {"name", stats.model_name},
      {"checkpoint_id", stats.checkpoint_id},
      {"exported_by", stats.exporter_version},
      {"bytes", stats.model_bytes},
  };
  if (stats.image.has_value()) {
    json["image"] = {
        {"path", stats.image->path},           {"width", stats.image->width},
        {"height", stats.image->height},       {"tokens", stats.image->tokens},
        {"decode_ms", stats.image->decode_ms}, {"preprocess_ms", stats.image->preprocess_ms},
    };
  } else {
    json["image"] = nullptr;
  }
  json["load_ms"] = stats.load_ms;
  Json load = Json::object();
  for (const LoadStats& part : stats.load_parts) {
    load[part.part] = part.ms;
  }
  json["load"] = std::move(load);
  Json methods = Json::array();
  for (const PackedWeightsStats& method : stats.weight_cache.methods) {
    methods.push_back({{"method", method.method},
                       {"state", method.state},
                       {"path", OrNull(method.path)},
                       {"bytes", method.bytes},
                       {"build_ms", method.build_ms}});
  }
  json["weight_cache"] = {{"mode", stats.weight_cache.mode},
                          {"path", OrNull(stats.weight_cache.folder)},
                          {"state", stats.weight_cache.state},
                          {"methods", std::move(methods)}};
  json["low_memory"] = stats.low_memory;
  json["linear_kernels"] = stats.linear_kernels;
  json["image_encode_ms"] = stats.image.has_value() ? Json(stats.image->encode_ms) : Json(nullptr);
  json["prompt_tokens"] = stats.prompt_tokens;
  json["prefill_ms"] = stats.prefill_ms;
  json["prefill_steps"] = stats.prefill_steps;
  json["prefill_tokens_per_second"] = TokensPerSecond(stats.prompt_tokens, stats.prefill_ms);
  json["time_to_first_token_ms"] = stats.time_to_first_token_ms;
  json["decode_tokens"] = stats.decode_tokens;
  json["decode_ms"] = stats.decode_ms;
  json["decode_tokens_per_second"] = TokensPerSecond(stats.decode_tokens, stats.decode_ms);
  json["tokens"] = stats.tokens;
  json["stop_reason"] = stats.stop_reason;
  json["seq_len"] = stats.seq_len;
  json["max_new_tokens"] = stats.max_new_tokens;
  json["sampling"] = {
      {"temperature", stats.temperature},
      {"top_p", stats.top_p},
      {"top_k", stats.top_k},
      {"seed", stats.seed},
  };
  json["peak_rss_bytes"] = stats.memory.peak_rss_bytes;
  json["peak_anonymous_bytes"] = stats.memory.peak_anonymous_bytes;
  Json stages = Json::array();
  for (const MemoryStats& stage : stats.memory_stages) {
    stages.push_back({{"stage", stage.stage},
                      {"rss_bytes", stage.use.rss_bytes},
                      {"anonymous_bytes", stage.use.anonymous_bytes},
                      {"file_bytes", stage.use.file_bytes}});
  }
  json["memory"] = std::move(stages);
  json["threads"] = stats.threads;
  json["versions"] = {
      {"mvlm", MvlmVersion()},
      {"executorch", ExecuTorchVersion()},
      {"contract", contract::kFormatVersion},
  };
  // Paths need not be UTF-8; JSON must be.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace mvlm

#include "runner/stats.h"

#include <nlohmann/json.hpp>

#include "runner/contract.h"

namespace mvlm {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

Json RunJson(const RunStats& stats) {
  Json json;
  json["model"] = {
      {"path", stats.model_path},
      {"name", stats.model_name},
      {"checkpoint_id", stats.checkpoint_id},
      {"exported_by", stats.exporter_version},
      {"bytes", stats.model_bytes},
  };
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
  json["seq_len"] = stats.seq_len;
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
  return json;
}

Json TurnJson(const TurnStats& turn) {
  Json json;
  Json images = Json::array();
  for (const ImageStats& image : turn.images) {
    images.push_back({{"path", OrNull(image.path)},
                      {"width", image.width},
                      {"height", image.height},
                      {"tokens", image.tokens},
                      {"decode_ms", image.decode_ms},
                      {"preprocess_ms", image.preprocess_ms},
                      {"encode_ms", image.encode_ms}});
  }
  json["image_encode_ms"] = images.empty() ? Json(nullptr) : Json(turn.image_encode_ms());
  json["images"] = std::move(images);
  json["start_pos"] = turn.start_pos;
  json["prompt_tokens"] = turn.prompt_tokens;
  json["prefill_ms"] = turn.prefill_ms;
  json["prefill_steps"] = turn.prefill_steps;
  json["prefill_tokens_per_second"] = TokensPerSecond(turn.prompt_tokens, turn.prefill_ms);
  json["time_to_first_token_ms"] = turn.time_to_first_token_ms;
  json["decode_tokens"] = turn.decode_tokens;
  json["decode_ms"] = turn.decode_ms;
  json["decode_tokens_per_second"] = TokensPerSecond(turn.decode_tokens, turn.decode_ms);
  json["tokens"] = turn.tokens;
  json["stop_reason"] = turn.stop_reason;
  json["max_new_tokens"] = turn.max_new_tokens;
  json["sampling"] = {
      {"temperature", turn.temperature},
      {"top_p", turn.top_p},
      {"top_k", turn.top_k},
      {"seed", turn.seed},
  };
  return json;
}

// Paths need not be UTF-8; JSON must be.
std::string Dump(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string MvlmVersion() { return MVLM_VERSION; }

std::string ExecuTorchVersion() { return MVLM_EXECUTORCH_VERSION; }

double TokensPerSecond(int64_t tokens, double ms) {
  return tokens > 0 && ms > 0 ? 1000.0 * static_cast<double>(tokens) / ms : 0.0;
}

double TurnStats::image_encode_ms() const {
  double ms = 0;
  for (const ImageStats& image : images) {
    ms += image.encode_ms;
  }
  return ms;
}

std::string ToJson(const RunStats& stats, const TurnStats& turn) {
  Json json = RunJson(stats);
  json.update(TurnJson(turn));
  return Dump(json);
}

std::string ToJson(const RunStats& stats, const std::vector<TurnStats>& turns) {
  Json json = RunJson(stats);
  json["turns"] = Json::array();
  for (const TurnStats& turn : turns) {
    json["turns"].push_back(TurnJson(turn));
  }
  return Dump(json);
}

}  // namespace mvlm

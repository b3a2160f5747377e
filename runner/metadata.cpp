#include "runner/metadata.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <utility>

#include "runner/contract.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

// Far above what any model has; below what makes sizes overflow.
constexpr int64_t kMaxPositions = int64_t{1} << 24;
constexpr int64_t kMaxImageSize = 8192;

// Reads constants one after the other and remembers the first complaint, so that the list of
// fields below reads as a list.
class Reader {
 public:
  explicit Reader(const Constants& constants) : constants_(constants) {}

  const std::optional<std::string>& complaint() const { return complaint_; }

  int64_t Int(const char* name, int64_t low, int64_t high) {
    const std::vector<int64_t> values = Ints(name, low, high, 1, 1);
    return values.empty() ? low : values[0];
  }

  std::vector<int64_t> Ints(const char* name, int64_t low, int64_t high, size_t min_count,
                            size_t max_count) {
    std::vector<int64_t> values = List<int64_t>(name, "integer", min_count, max_count);
    for (const int64_t value : values) {
      if (value < low || value > high) {
        Complain(
            StrCat("constant method ", name, " gives ", value, ", expected ", low, " to ", high));
        return {};
      }
    }
    return values;
  }

  bool Bool(const char* name) {
    const std::vector<bool> values = List<bool>(name, "bool", 1, 1);
    return !values.empty() && values[0];
  }

  std::string String(const char* name) {
    std::vector<std::string> values = List<std::string>(name, "string", 1, 1);
    return values.empty() ? "" : std::move(values[0]);
  }

  std::vector<std::string> Strings(const char* name) {
    return List<std::string>(name, "string", 0, SIZE_MAX);
  }

  std::array<double, 3> Channels(const char* name) {
    const std::vector<double> values = List<double>(name, "float", 3, 3);
    std::array<double, 3> channels = {1.0, 1.0, 1.0};
    for (size_t i = 0; i < values.size(); ++i) {
      channels[i] = values[i];
      if (!std::isfinite(values[i])) {
        Complain(StrCat("constant method ", name, " gives a value that is not finite"));
      }
    }
    return channels;
  }

  void Complain(std::string complaint) {
    if (!complaint_.has_value()) {
      complaint_ = std::move(complaint);
    }
  }

 private:
  template <typename T>
  std::vector<T> List(const char* name, const char* type, size_t min_count, size_t max_count) {
    const auto found = constants_.find(name);
    if (found == constants_.end()) {
      Complain(StrCat("constant method ", name, " is missing"));
      return {};
    }
    const std::vector<Constant>& outputs = found->second;
    if (outputs.size() < min_count || outputs.size() > max_count) {
      Complain(StrCat("constant method ", name, " gives ", outputs.size(), " values, expected ",
                      min_count));
      return {};
    }
    std::vector<T> values;
    for (const Constant& output : outputs) {
      const std::optional<T> value = As<T>(output);
      if (!value.has_value()) {
        Complain(StrCat("constant method ", name, " gives a value that is no ", type));
        return {};
      }
      values.push_back(*value);
    }
    return values;
  }

  // Exporters write True as a bool or as 1, and 0.0 as a float or as 0.
  template <typename T>
  static std::optional<T> As(const Constant& constant) {
    if (const T* value = std::get_if<T>(&constant)) {
      return *value;
    }
    if constexpr (!std::is_same_v<T, std::string>) {
      if (const auto* integer = std::get_if<int64_t>(&constant)) {
        return static_cast<T>(*integer);
      }
    }
    return std::nullopt;
  }

  const Constants& constants_;
  std::optional<std::string> complaint_;
};

bool HasAnyOfMvlm(const Constants& constants) {
  for (const auto& [name, outputs] : constants) {
    if (name.rfind("mvlm_", 0) == 0) {
      return true;
    }
  }
  return false;
}

std::string Join(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) {
    joined += (joined.empty() ? "" : ", ") + name;
  }
  return joined;
}

// All image constants or none, as there is a vision encoder or not.
void CheckImageConstants(Reader& reader, const Constants& constants, bool has_vision) {
  std::vector<std::string> present;
  std::vector<std::string> missing;
  for (const std::string& name : ImageConstants()) {
    (constants.count(name) != 0 ? present : missing).push_back(name);
  }
  if (!missing.empty() && (has_vision || !present.empty())) {
    reader.Complain(StrCat(missing.size() == 1 ? "constant method " : "constant methods ",
                           Join(missing), missing.size() == 1 ? " is" : " are",
                           " missing, though it has ",
                           has_vision ? contract::kVisionEncoder : Join(present)));
  } else if (!present.empty() && !has_vision) {
    reader.Complain(
        StrCat("method ", contract::kVisionEncoder, " is missing, though it has ", Join(present)));
  }
}

size_t CountOccurrences(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

// The recipe's; "mvlm" if it says nothing, for it is told to people and need not be ours.
std::string AttentionOp(const std::string& recipe) {
  const auto json = nlohmann::json::parse(recipe, nullptr, /*allow_exceptions=*/false);
  const auto found = json.find("attention_op");
  return found != json.end() && found->is_string() ? found->get<std::string>() : "mvlm";
}

VisionMetadata ReadVision(Reader& reader) {
  VisionMetadata vision;
  vision.format.size = reader.Int(contract::kImageSize, 1, kMaxImageSize);
  vision.format.mean = reader.Channels(contract::kImageMean);
  vision.format.std = reader.Channels(contract::kImageStd);
  for (const double std : vision.format.std) {
    if (std == 0.0) {
      reader.Complain(StrCat("constant method ", contract::kImageStd, " gives 0"));
    }
  }
  const std::vector<int64_t> color = reader.Ints(contract::kImagePadColor, 0, 255, 3, 3);
  for (size_t i = 0; i < color.size(); ++i) {
    vision.format.pad_color[i] = static_cast<uint8_t>(color[i]);
  }
  vision.tokens = reader.Int(contract::kImageTokens, 1, kMaxPositions);
  return vision;
}

Metadata ReadAll(Reader& reader, bool has_vision) {
  Metadata metadata;
  metadata.mvlm_version = reader.String(contract::kVersion);
  metadata.program_id = reader.String(contract::kProgramId);
  if (metadata.program_id.empty()) {
    reader.Complain(StrCat("constant method ", contract::kProgramId, " gives nothing"));
  }
  metadata.model_name = reader.String(contract::kModelName);
  metadata.checkpoint_id = reader.String(contract::kCheckpointId);
  metadata.recipe = reader.String(contract::kRecipe);
  metadata.attention_op = AttentionOp(metadata.recipe);
  metadata.max_seq_len = reader.Int(contract::kMaxSeqLen, 1, kMaxPositions);
  metadata.max_context_len = reader.Int(contract::kMaxContextLen, 2, kMaxPositions);
  if (metadata.max_seq_len > metadata.max_context_len) {
    reader.Complain(StrCat("constant method ", contract::kMaxSeqLen, " gives ",
                           metadata.max_seq_len, ", but there are only ", metadata.max_context_len,
                           " positions"));
  }
  metadata.logit_positions = reader.Int(contract::kLogitPositions, 1, metadata.max_seq_len);
  metadata.vocab_size = reader.Int(contract::kVocabSize, 1, kMaxPositions);
  metadata.bos_id = reader.Int(contract::kBosId, 0, metadata.vocab_size - 1);
  metadata.eos_ids = reader.Ints(contract::kEosIds, 0, metadata.vocab_size - 1, 1, SIZE_MAX);
  metadata.prompt.prompt_template = reader.String(contract::kPromptTemplate);
  metadata.prompt.next_turn_template = reader.String(contract::kNextTurnTemplate);
  metadata.stop_strings = reader.Strings(contract::kStopStrings);
  metadata.tokenizer = reader.String(contract::kTokenizer);
  for (const auto& [name, value] :
       {std::pair(contract::kPromptTemplate, &metadata.prompt.prompt_template),
        std::pair(contract::kNextTurnTemplate, &metadata.prompt.next_turn_template)}) {
    if (CountOccurrences(*value, contract::kPromptPlaceholder) != 1) {
      reader.Complain(StrCat("constant method ", name, " gives a template that does not contain ",
                             contract::kPromptPlaceholder, " exactly once"));
    }
  }
  if (has_vision) {
    metadata.prompt.image_marker = reader.String(contract::kImageMarker);
    metadata.prompt.image_prefix = reader.String(contract::kImagePrefix);
    if (metadata.prompt.image_marker.empty() ||
        CountOccurrences(metadata.prompt.image_prefix, metadata.prompt.image_marker) != 1) {
      reader.Complain(
          StrCat("constant method ", contract::kImagePrefix,
                 " gives a prefix that does not contain the image marker exactly once"));
    }
    metadata.vision = ReadVision(reader);
  }
  // The loop feeds one token after another at growing positions, which only such a decoder takes.
  if (!reader.Bool(contract::kUseKvCache) || !reader.Bool(contract::kEnableDynamicShape)) {
    reader.Complain(StrCat("constant methods ", contract::kUseKvCache, " and ",
                           contract::kEnableDynamicShape, " must both be true"));
  }
  return metadata;
}

}  // namespace

const std::vector<std::string>& ContractConstants() {
  static const std::vector<std::string> names = {
      contract::kMaxSeqLen,
      contract::kMaxContextLen,
      contract::kBosId,
      contract::kEosIds,
      contract::kVocabSize,
      contract::kUseKvCache,
      contract::kUseSdpaWithKvCache,
      contract::kEnableDynamicShape,
      contract::kFormat,
      contract::kVersion,
      contract::kProgramId,
      contract::kModelName,
      contract::kCheckpointId,
      contract::kRecipe,
      contract::kPromptTemplate,
      contract::kNextTurnTemplate,
      contract::kLogitPositions,
      contract::kStopStrings,
      contract::kImageMarker,
      contract::kImagePrefix,
      contract::kImageSize,
      contract::kImageMean,
      contract::kImageStd,
      contract::kImagePadColor,
      contract::kImageTokens,
      contract::kTokenizer,
  };
  return names;
}

const std::vector<std::string>& ImageConstants() {
  static const std::vector<std::string> names = {
      contract::kImageMarker, contract::kImagePrefix, contract::kImageSize,
      contract::kImageMean,   contract::kImageStd,    contract::kImagePadColor,
      contract::kImageTokens,
  };
  return names;
}

Result<Metadata> ParseMetadata(const Constants& constants, bool has_vision) {
  if (!HasAnyOfMvlm(constants)) {
    return InvalidInput(
        StrCat("not an mvlm .pte: constant method ", contract::kFormat, " is missing"));
  }
  Reader reader(constants);
  const int64_t format = reader.Int(contract::kFormat, 1, INT64_MAX);
  if (!reader.complaint().has_value() && format != contract::kFormatVersion) {
    return InvalidInput(
        StrCat("it is of format ", format, ", but this llava_main reads format ",
               contract::kFormatVersion, " alone; ",
               format < contract::kFormatVersion
                   ? "it was made by an older mvlm: export it again with `python -m mvlm.export`"
                   : "it was made by a newer mvlm: install that here too"));
  }
  CheckImageConstants(reader, constants, has_vision);
  Metadata metadata = ReadAll(reader, has_vision);
  if (reader.complaint().has_value()) {
    return InvalidInput(
        StrCat("not a proper mvlm .pte: ", *reader.complaint(), "; export it again"));
  }
  return metadata;
}

}  // namespace mvlm

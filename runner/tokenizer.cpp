#include "runner/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "runner/file.h"
#include "runner/str_cat.h"
#include "runner/utf8.h"

namespace mvlm {
namespace {

// LLaMA's is 0.5 MB, the largest known a few MB.
constexpr uint64_t kMaxTokenizerBytes = uint64_t{64} << 20;

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<sentencepiece::SentencePieceProcessor> processor)
    : processor_(std::move(processor)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::FromBytes(std::string_view model, const std::string& name) {
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  // An empty model parses (protobuf has no required fields) and fails only later.
  const auto status = processor->LoadFromSerializedProto(model);
  if (model.empty() || !status.ok() || processor->GetPieceSize() == 0) {
    return InvalidInput(
        StrCat(name, " is not a SentencePiece model (", model.size(),
               " bytes that are something else); a tokenizer.model file is expected"));
  }
  return Tokenizer(std::move(processor));
}

Result<Tokenizer> Tokenizer::FromFile(const std::string& path) {
  const Result<std::string> bytes = ReadFile(path, kMaxTokenizerBytes);
  if (!bytes.ok()) {
    return bytes.error();
  }
  return FromBytes(*bytes, path);
}

int64_t Tokenizer::size() const { return processor_->GetPieceSize(); }

Result<std::vector<int64_t>> Tokenizer::Encode(std::string_view text) const {
  std::vector<int> ids;
  const auto status = processor_->Encode(text, &ids);
  if (!status.ok()) {
    return Failure(StrCat("SentencePiece cannot encode the text: ", status.ToString()));
  }
  return std::vector<int64_t>(ids.begin(), ids.end());
}

Result<std::string> Tokenizer::Decode(const std::vector<int64_t>& ids) const {
  std::vector<int> known;
  known.reserve(ids.size());
  for (const int64_t id : ids) {
    if (Has(id)) {
      known.push_back(static_cast<int>(id));
    }
  }
  std::string text;
  const auto status = processor_->Decode(known, &text);
  if (!status.ok()) {
    return Failure(StrCat("SentencePiece cannot decode the tokens: ", status.ToString()));
  }
  return text;
}

std::optional<uint8_t> Tokenizer::ByteOf(int64_t id) const {
  if (!Has(id) || !processor_->IsByte(static_cast<int>(id))) {
    return std::nullopt;
  }
  // Byte pieces are named "<0x00>" to "<0xFF>".
  const std::string& piece = processor_->IdToPiece(static_cast<int>(id));
  return static_cast<uint8_t>(std::strtoul(piece.c_str() + 3, nullptr, 16));
}

Result<std::string> Detokenizer::Push(int64_t id) {
  if (!tokenizer_.Has(id)) {
    return std::string();  // not even the end of an unfinished character: Decode() skips it too
  }
  window_.push_back(id);
  const size_t incomplete = IncompleteIds();
  Result<std::string> fresh = Release(window_.size() - incomplete);
  if (fresh.ok() && incomplete == 0) {
    if (Status status = Shorten(); !status.ok()) {
      return status.error();
    }
  }
  return fresh;
}

Result<std::string> Detokenizer::Finish() { return Release(window_.size()); }

Result<std::string> Detokenizer::Release(size_t count) {
  const std::vector<int64_t> certain(window_.begin(),
                                     window_.begin() + static_cast<ptrdiff_t>(count));
  Result<std::string> text = tokenizer_.Decode(certain);
  if (!text.ok()) {
    return text;
  }
  std::string fresh = text->substr(std::min(released_bytes_, text->size()));
  released_bytes_ = std::max(released_bytes_, text->size());
  return fresh;
}

Status Detokenizer::Shorten() {
  const int64_t last = window_.back();
  if (tokenizer_.ByteOf(last).has_value()) {
    return {};  // a byte that follows may belong to the same run
  }
  const Result<std::string> text = tokenizer_.Decode({last});
  if (!text.ok()) {
    return text.error();
  }
  if (!text->empty()) {
    window_ = {last};
    released_bytes_ = text->size();
  }
  return {};
}

size_t Detokenizer::IncompleteIds() const {
  // An incomplete character has at most 3 bytes.
  std::string bytes;
  for (size_t i = window_.size(); i > 0 && bytes.size() < 3; --i) {
    const std::optional<uint8_t> byte = tokenizer_.ByteOf(window_[i - 1]);
    if (!byte.has_value()) {
      break;
    }
    bytes.insert(bytes.begin(), static_cast<char>(*byte));
  }
  return IncompleteUtf8SuffixLength(bytes);
}

}  // namespace mvlm

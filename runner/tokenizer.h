// SentencePiece, with ids as the model takes them. Nothing here knows prompts or models.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace mvlm {

class Tokenizer {
 public:
  // `model` holds the bytes of a SentencePiece model file; it is not needed afterwards. `name`
  // stands for it in messages. InvalidInput if it is something else.
  static Result<Tokenizer> FromBytes(std::string_view model, const std::string& name);
  static Result<Tokenizer> FromFile(const std::string& path);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids are 0 .. size() - 1. A model may have more: its vocabulary is often padded.
  int64_t size() const;
  bool Has(int64_t id) const { return id >= 0 && id < size(); }

  // The ids of `text`, which must be valid UTF-8; no BOS, no EOS. All of them are ids that this
  // tokenizer has.
  Result<std::vector<int64_t>> Encode(std::string_view text) const;

  // The text of `ids`: valid UTF-8, in which byte pieces that make up no character become U+FFFD.
  // Control pieces and ids that this tokenizer does not have (a padded lm_head gives such) have no
  // text.
  Result<std::string> Decode(const std::vector<int64_t>& ids) const;

  // The byte that a byte-fallback piece stands for; nothing for every other id.
  std::optional<uint8_t> ByteOf(int64_t id) const;

 private:
  explicit Tokenizer(std::unique_ptr<sentencepiece::SentencePieceProcessor> processor);

  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
};

// Decodes an id at a time. What Push() and Finish() return, put together, is exactly what
// Tokenizer::Decode() gives for the whole sequence, and each part by itself is valid UTF-8: bytes
// of a character that is spelled by several byte pieces are kept back until it is complete.
//
// For each new id only the last few are decoded again. Those begin with an id that has a text
// of its own: what follows such an id decodes in the same way whatever came before, because all
// that SentencePiece carries from piece to piece is whether the text has begun (it drops the first
// space) and the bytes of an unfinished character.
class Detokenizer {
 public:
  // `tokenizer` must outlive this.
  explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // Appends `id` and returns the text that has become certain; often empty.
  Result<std::string> Push(int64_t id);

  // Returns the rest.
  Result<std::string> Finish();

 private:
  // Decodes the first `count` ids of the window and returns what was not returned before.
  Result<std::string> Release(size_t count);
  // Begins the window anew with its last id, if that is allowed.
  Status Shorten();
  // How many ids at the end of the window are bytes of an incomplete character.
  size_t IncompleteIds() const;

  const Tokenizer& tokenizer_;
  std::vector<int64_t> window_;  // the last ids
  size_t released_bytes_ = 0;    // how much of the window's text was returned
};

}  // namespace mvlm

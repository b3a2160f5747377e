// A .pte that is loaded and can be computed with. The only place, with threads and
// executorch_log, that knows ExecuTorch's API.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runner/metadata.h"
#include "runner/result.h"

namespace executorch::extension::module {
class Module;
}

namespace mvlm {

// Whether the parts of a program that XNNPACK runs share one scratch memory. The values are those
// of its option `workspace_sharing_mode`.
enum class WorkspaceSharing {
  kOff = 0,     // every part has its own
  kModel = 1,   // those of one method share
  kGlobal = 2,  // all share
};

// The last position's logits. They lie in the model's memory and hold until its next call.
struct Logits {
  const float* data;
  size_t size;
};

// Not thread-safe: one call at a time. (ExecuTorch itself uses several threads within a call.)
//
// The KV cache lives inside the model. DecodeText() fills it from `start_pos` on; a new prompt
// just starts at 0 again.
class Model {
 public:
  // Opens the file, checks that it is whole and keeps the contract, and reads its metadata. Loads
  // no weights yet: the file is mapped, and the methods are loaded by LoadMethods().
  //
  // InvalidInput if it is missing, no program, cut off, of another model, or of a newer contract.
  static Result<std::unique_ptr<Model>> Open(const std::string& path, WorkspaceSharing sharing);

  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const Metadata& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_bytes_; }
  // Width of an embedding.
  int64_t hidden_size() const { return hidden_size_; }

  // Loads the methods that a prompt needs; `with_vision` only if metadata().vision. This is the
  // slow part of loading, because the delegates pack their weights.
  Status LoadMethods(bool with_vision);

  // `pixels` [3, size, size] -> embeddings [image_tokens, hidden]. Needs LoadMethods(true).
  Result<std::vector<float>> EncodeImage(const std::vector<float>& pixels);

  // Frees what only EncodeImage() needs; it cannot be called any more.
  void UnloadVision();

  // Appends the embeddings of `ids` [n], [n, hidden], to `embeddings`.
  Status EmbedTokens(const std::vector<int64_t>& ids, std::vector<float>* embeddings);

  // Runs the language model over `embeddings` [n, hidden] at positions start_pos .. start_pos + n
  // - 1, and returns the logits [vocab] of the last. 1 <= n <= max_seq_len, and the positions must
  // be below max_context_len.
  Result<Logits> DecodeText(const std::vector<float>& embeddings, int64_t start_pos);

 private:
  Model(std::string path, uint64_t file_bytes,
        std::unique_ptr<executorch::extension::module::Module> module);

  Status Load(WorkspaceSharing sharing);
  Status ReadMetadata();
  Status CheckMethods();

  std::string path_;
  uint64_t file_bytes_;
  std::unique_ptr<executorch::extension::module::Module> module_;
  Metadata metadata_;
  int64_t hidden_size_ = 0;
};

}  // namespace mvlm

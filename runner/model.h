// A .pte that is loaded and can be computed with. Together with method and profile, which are its
// parts, threads and executorch_log the only place that knows ExecuTorch's API.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mvlm/result.h"
#include "runner/metadata.h"
#include "runner/weight_cache.h"

namespace executorch::extension::module {
class Module;
}
namespace executorch::runtime {
class Program;
}

namespace mvlm {

class Method;
class Profile;

// Whether the parts of a program that XNNPACK runs share one scratch memory. The values are those
// of its option `workspace_sharing_mode`.
enum class WorkspaceSharing {
  kOff = 0,     // every part has its own
  kModel = 1,   // those of one method share
  kGlobal = 2,  // all share
};

// Whose kernels run the dynamically quantized linears, see ops/linear_backend.h.
enum class LinearKernels {
  kAuto,  // the faster ones on this CPU
  kXnnpack,
  kMvlm,
};

struct ModelSettings {
  WorkspaceSharing workspace_sharing = WorkspaceSharing::kGlobal;
  LinearKernels linear_kernels = LinearKernels::kAuto;
};

// Where a method's packed weights are, from the most to the least welcome.
enum class PackedWeights {
  kHit,       // mapped from a file that was there
  kBuilt,     // mapped from a file that was made just now
  kFallback,  // in memory, because there could be no file
  kOff,       // in memory, because nobody asked for a file
  kNone,      // nowhere: the method has no weights to pack
};

// "hit" and so on, for stats.
std::string_view ToString(PackedWeights state);

// What became of a method's packed weights.
struct PackedWeightsUse {
  std::string method;
  PackedWeights state = PackedWeights::kOff;
  std::string path;    // of the file, if there is one
  uint64_t bytes = 0;  // its size
  double build_ms = 0;
  // Why an older file was not used, or why there is none; for people, often empty.
  std::string notice;
};

// Logits of the last positions of a call, a row each. They lie in the model's memory and hold until
// its next call.
struct Logits {
  const float* data;  // [rows, vocab_size]
  int64_t rows;       // 1 or more
  int64_t vocab_size;

  const float* row(int64_t i) const { return data + i * vocab_size; }
  // Of the last position, from which the next token is chosen.
  const float* last() const { return row(rows - 1); }
};

// Not thread-safe: one call at a time. (ExecuTorch itself uses several threads within a call.)
//
// The KV cache lives inside the model. DecodeText() fills it from `start_pos` on; a new prompt
// just starts at 0 again.
class Model {
 public:
  // Opens the file, checks that it is whole and keeps the contract, and reads its metadata. Loads
  // no weights yet: the file is mapped, and the methods are loaded by the functions below.
  //
  // InvalidInput if it is missing, no program, cut off, of another model, or of another contract.
  static Result<std::unique_ptr<Model>> Open(const std::string& path,
                                             const ModelSettings& settings);

  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const Metadata& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_bytes_; }
  // Whether the quantized linears run in our kernels, or else in XNNPACK's.
  bool has_own_linears() const { return has_own_linears_; }
  // Width of an embedding.
  int64_t hidden_size() const { return hidden_size_; }

  // From now on packed weights are kept in `folder` (see weight_cache.h) and come from there.
  // InvalidInput or Failure if the folder is none or cannot be made.
  Status UseWeightCache(std::string folder);

  // From now on what runs in the methods is recorded.
  void StartProfile();
  // The record, an ETDump; after StartProfile(), once.
  Result<std::string> FinishProfile();

  // Load what EncodeImage(), and what EmbedTokens() and DecodeText() need. The slow part of
  // loading, unless packed weights come from a file. LoadVision() only if metadata().vision.
  Status LoadVision();
  Status LoadText();

  // Gives back all that LoadVision() took; EncodeImage() cannot be called any more.
  void UnloadVision();

  // Sees to it that the weight cache has the packed weights of all methods, and keeps none of them
  // loaded. After UseWeightCache(), in place of loading.
  Status Prepare();

  // Of the methods that were loaded or prepared so far, in this order.
  const std::vector<PackedWeightsUse>& packed_weights() const { return packed_weights_; }

  // `pixels` [3, size, size] -> embeddings [image_tokens, hidden].
  Result<std::vector<float>> EncodeImage(const std::vector<float>& pixels);

  // Appends the embeddings of `ids` [n], [n, hidden], to `embeddings`. Any n: the method is called
  // as often as max_seq_len makes it necessary.
  Status EmbedTokens(const std::vector<int64_t>& ids, std::vector<float>* embeddings);

  // Runs the language model over `embeddings` [n, hidden] at positions start_pos .. start_pos + n
  // - 1, and returns the logits of the last min(n, metadata().logit_positions) of them. 1 <= n <=
  // max_seq_len, and the positions must be below max_context_len.
  Result<Logits> DecodeText(const float* embeddings, int64_t n, int64_t start_pos);

 private:
  Model(std::string path, uint64_t file_bytes, const ModelSettings& settings);

  Status LoadProgram();
  Status CheckMethods();

  Result<std::unique_ptr<Method>> Load(const char* name, FileDescriptor packed_weights);
  // With weights from the cache, or in memory.
  Result<std::unique_ptr<Method>> LoadMethod(const char* name);
  // With weights from the cache, which is filled if need be. Null if `prepare_only` is set.
  Result<std::unique_ptr<Method>> LoadThroughCache(const char* name, bool prepare_only,
                                                   PackedWeightsUse* use);
  // Fills the cache. The method that had to be loaded for that, if its weights are now in memory.
  Result<std::unique_ptr<Method>> FillCache(const char* name, PackedWeightsUse* use);
  // With weights from the file in the cache; in memory if the backend does not take it.
  Result<std::unique_ptr<Method>> LoadMapped(const char* name, FileDescriptor packed_weights,
                                             PackedWeightsUse* use);

  std::string path_;
  uint64_t file_bytes_;
  WorkspaceSharing sharing_;
  bool has_own_linears_;
  // The open file, which the program and with it all methods read from. Runs nothing itself.
  std::unique_ptr<executorch::extension::module::Module> file_;
  std::shared_ptr<executorch::runtime::Program> program_;
  Metadata metadata_;
  int64_t hidden_size_ = 0;
  std::optional<WeightCache> weight_cache_;
  std::vector<PackedWeightsUse> packed_weights_;
  std::unique_ptr<Profile> profile_;  // outlives the methods that record into it
  std::unique_ptr<Method> vision_encoder_;
  std::unique_ptr<Method> token_embedding_;
  std::unique_ptr<Method> text_decoder_;
};

}  // namespace mvlm

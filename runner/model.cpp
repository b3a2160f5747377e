#include "runner/model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <sys/stat.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "ops/linear_backend.h"
#include "runner/contract.h"
#include "runner/executorch_log.h"
#include "runner/host.h"
#include "runner/method.h"
#include "runner/profile.h"
#include "runner/program_loader.h"
#include "runner/pte_file.h"
#include "runner/stats.h"
#include "runner/stopwatch.h"
#include "runner/str_cat.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace mvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::DataLoader;
using executorch::runtime::EValue;
using executorch::runtime::Program;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;
using EtError = executorch::runtime::Error;

template <typename T>
using EtResult = executorch::runtime::Result<T>;

using Shape = std::vector<int64_t>;

std::string ShapeToString(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += StrCat(i == 0 ? "" : ", ", shape[i]);
  }
  return text + "]";
}

std::string_view TypeName(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

std::optional<Constant> ToConstant(const EValue& value) {
  if (value.isBool()) {
    return value.toBool();
  }
  if (value.isInt()) {
    return value.toInt();
  }
  if (value.isDouble()) {
    return value.toDouble();
  }
  if (value.isString()) {
    const auto text = value.toString();
    return std::string(text.data(), text.size());
  }
  if (value.isTensor() && value.toTensor().scalar_type() == ScalarType::Byte) {
    const Tensor& tensor = value.toTensor();
    return std::string(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
  }
  return std::nullopt;
}

std::string Join(const std::unordered_set<std::string>& names) {
  std::string joined;
  for (const std::string& name : std::set<std::string>(names.begin(), names.end())) {
    joined += (joined.empty() ? "" : ", ") + name;
  }
  return joined;
}

// A method's declared input or output; a dynamic size is declared as its upper bound.
struct Declared {
  ScalarType type;
  Shape shape;
};

std::optional<Declared> ToDeclared(const EtResult<TensorInfo>& info) {
  if (!info.ok()) {
    return std::nullopt;
  }
  const auto sizes = info->sizes();
  return Declared{info->scalar_type(), Shape(sizes.begin(), sizes.end())};
}

// Puts what free() has kept for later back to the operating system: loading needs much for a while.
void TrimHeap() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void FallBack(std::string why, PackedWeightsUse* use) {
  use->state = PackedWeights::kFallback;
  use->notice = std::move(why);
  use->path.clear();
  use->bytes = 0;
}

// ExecuTorch aborts when it hands over an output that a damaged program does not have.
bool HasOutputs(const Program& program, const std::string& method) {
  const auto meta = program.method_meta(method.c_str());
  if (!meta.ok()) {
    return false;
  }
  for (size_t i = 0; i < meta->num_outputs(); ++i) {
    if (!meta->output_tag(i).ok()) {
      return false;
    }
  }
  return true;
}

// The constants of the contract that a program has. They are read through a module of their own,
// so that what that took is given back.
Result<Constants> ReadConstants(const std::shared_ptr<Program>& program,
                                const std::unordered_set<std::string>& names,
                                const std::string& path) {
  Module module(program);
  Constants constants;
  for (const std::string& name : ContractConstants()) {
    if (names.count(name) == 0) {
      continue;  // ParseMetadata() knows which may be missing
    }
    if (!HasOutputs(*program, name)) {
      return InvalidInput(StrCat("cannot read constant method ", name, " of ", path,
                                 ": it is damaged, its outputs are missing; export it again"));
    }
    const auto outputs = module.execute(name);
    if (!outputs.ok()) {
      return InvalidInput(StrCat("cannot read constant method ", name, " of ", path, ": ",
                                 ExplainExecuTorchError(outputs.error())));
    }
    std::vector<Constant>& values = constants[name];
    for (const EValue& output : *outputs) {
      std::optional<Constant> value = ToConstant(output);
      if (!value.has_value()) {
        return InvalidInput(StrCat("not a proper mvlm .pte: constant method ", name, " of ", path,
                                   " gives a value of an unknown type"));
      }
      values.push_back(std::move(*value));
    }
    module.unload_method(name);
  }
  return constants;
}

}  // namespace

std::string_view ToString(PackedWeights state) {
  switch (state) {
    case PackedWeights::kHit:
      return "hit";
    case PackedWeights::kBuilt:
      return "built";
    case PackedWeights::kFallback:
      return "fallback";
    case PackedWeights::kOff:
      return "off";
    case PackedWeights::kNone:
      return "none";
  }
  return "unknown";
}

Model::Model(std::string path, uint64_t file_bytes, const ModelSettings& settings)
    : path_(std::move(path)),
      file_bytes_(file_bytes),
      sharing_(settings.workspace_sharing),
      has_own_linears_(settings.linear_kernels == LinearKernels::kMvlm ||
                       (settings.linear_kernels == LinearKernels::kAuto && LinearBackendPays())) {}

Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::Open(const std::string& path, const ModelSettings& settings) {
  CatchExecuTorchLog();
  const Result<uint64_t> file_bytes = CheckPteFile(path);
  if (!file_bytes.ok()) {
    return file_bytes.error();
  }
  std::unique_ptr<Model> model(new Model(path, *file_bytes, settings));
  if (Status status = model->LoadProgram(); !status.ok()) {
    return status.error();
  }
  if (Status status = model->CheckMethods(); !status.ok()) {
    return status.error();
  }
  return model;
}

Status Model::LoadProgram() {
  Result<std::unique_ptr<DataLoader>> loader = MakeProgramLoader(path_, has_own_linears_);
  if (!loader.ok()) {
    return loader.error();
  }
  file_ = std::make_unique<Module>(std::move(*loader));
  // The full verification walks the program's tables (not its weights), so that a damaged file is
  // an error and not a crash.
  const EtError error = file_->load(Program::Verification::InternalConsistency);
  if (error != EtError::Ok) {
    return InvalidInput(StrCat("cannot load ", path_, ": ", ExplainExecuTorchError(error),
                               "; it is damaged or needs another version of ExecuTorch; export it "
                               "again"));
  }
  const auto names = file_->method_names();
  if (!names.ok()) {
    return InvalidInput(StrCat("cannot load ", path_, ": ", ExplainExecuTorchError(names.error())));
  }
  program_ = file_->program();

  const Result<Constants> constants = ReadConstants(program_, *names, path_);
  if (!constants.ok()) {
    return constants.error();
  }
  Result<Metadata> metadata =
      ParseMetadata(*constants, names->count(contract::kVisionEncoder) != 0);
  if (!metadata.ok()) {
    // The names tell what another program's file is; of one's own they are noise.
    const bool is_ours = constants->count(contract::kFormat) != 0;
    return InvalidInput(StrCat(path_, ": ", metadata.error().message,
                               is_ours ? ""
                                       : StrCat("; it has methods ", Join(*names),
                                                "; make one with `python -m mvlm.export`")));
  }
  metadata_ = std::move(*metadata);
  if (metadata_.attention_op != "mvlm") {
    return InvalidInput(
        StrCat(path_, ": was exported with --attention-op ", metadata_.attention_op,
               ", for ExecuTorch's own programs, whose operators llava_main does not have; export "
               "one for llava_main without that flag"));
  }
  return {};
}

Status Model::CheckMethods() {
  struct Expected {
    const char* method;
    ScalarType input_type;
    Shape input;
    std::optional<Shape> second_input;  // int64
    Shape output;
  };
  constexpr int64_t kHidden = -1;  // stands for the width of an embedding, taken where first seen
  const int64_t n = metadata_.max_seq_len;
  std::vector<Expected> all = {
      {contract::kTokenEmbedding, ScalarType::Long, {1, n}, std::nullopt, {1, n, kHidden}},
      {contract::kTextDecoder,
       ScalarType::Float,
       {1, n, kHidden},
       Shape{1},
       {1, metadata_.logit_positions, metadata_.vocab_size}},
  };
  if (metadata_.vision.has_value()) {
    const VisionMetadata& vision = *metadata_.vision;
    all.push_back({contract::kVisionEncoder,
                   ScalarType::Float,
                   {1, 3, vision.format.size, vision.format.size},
                   std::nullopt,
                   {1, vision.tokens, kHidden}});
  }

  for (const Expected& expected : all) {
    const auto meta = program_->method_meta(expected.method);
    if (!meta.ok()) {
      TakeExecuTorchErrors();
      return InvalidInput(
          StrCat(path_, ": not a proper mvlm .pte: method ", expected.method, " is missing"));
    }
    const auto check = [&](const char* what, const EtResult<TensorInfo>& info, ScalarType type,
                           Shape shape) -> Status {
      const std::optional<Declared> declared = ToDeclared(info);
      if (declared.has_value() && hidden_size_ == 0 && declared->shape.size() == shape.size() &&
          shape.back() == kHidden) {
        hidden_size_ = declared->shape.back();
      }
      std::replace(shape.begin(), shape.end(), kHidden, hidden_size_);
      if (!declared.has_value() || declared->type != type || declared->shape != shape ||
          shape.back() <= 0) {
        TakeExecuTorchErrors();
        return InvalidInput(StrCat(
            path_, ": not a proper mvlm .pte: ", what, " of method ", expected.method, " is ",
            declared.has_value()
                ? StrCat(TypeName(declared->type), " ", ShapeToString(declared->shape))
                : "missing or no tensor",
            ", but its metadata asks for ", TypeName(type), " ", ShapeToString(shape)));
      }
      return {};
    };
    std::vector<Status> checks;
    checks.push_back(
        check("the input", meta->input_tensor_meta(0), expected.input_type, expected.input));
    if (expected.second_input.has_value()) {
      checks.push_back(check("the second input", meta->input_tensor_meta(1), ScalarType::Long,
                             *expected.second_input));
    }
    checks.push_back(
        check("the output", meta->output_tensor_meta(0), ScalarType::Float, expected.output));
    for (Status& status : checks) {
      if (!status.ok()) {
        return std::move(status);
      }
    }
  }
  return {};
}

Status Model::UseWeightCache(std::string folder) {
  Result<WeightCache> cache =
      WeightCache::Create(std::move(folder), {metadata_.program_id, file_bytes_, /*method=*/"",
                                              ExecuTorchVersion(), XnnpackBuildId(), HostCpuId()});
  if (!cache.ok()) {
    return cache.error();
  }
  weight_cache_.emplace(std::move(*cache));
  return {};
}

void Model::StartProfile() { profile_ = std::make_unique<Profile>(); }

Result<std::string> Model::FinishProfile() { return profile_->Finish(); }

Result<std::unique_ptr<Method>> Model::Load(const char* name, FileDescriptor packed_weights) {
  Method::Settings settings;
  settings.workspace_sharing = static_cast<int>(sharing_);
  settings.packed_weights = std::move(packed_weights);
  if (profile_ != nullptr) {
    profile_->Enter(StrCat(name, "[load]"));
    settings.tracer = profile_.get();
  }
  return Method::Load(program_, name, std::move(settings));
}

Result<std::unique_ptr<Method>> Model::LoadMapped(const char* name, FileDescriptor packed_weights,
                                                  PackedWeightsUse* use) {
  const int64_t mapped = CountMappedWeightFiles();
  Result<std::unique_ptr<Method>> method = Load(name, std::move(packed_weights));
  if (method.ok() && CountMappedWeightFiles() > mapped) {
    return method;
  }
  FallBack(StrCat("XNNPACK does not take ", use->path), use);
  return method.ok() ? std::move(method) : Load(name, FileDescriptor());
}

// The backend only ever writes to a file in memory: of a full disk it would not get to know but by
// a SIGBUS. What it wrote is copied to the cache.
Result<std::unique_ptr<Method>> Model::FillCache(const char* name, PackedWeightsUse* use) {
  if (Status status = weight_cache_->CheckWritable(); !status.ok()) {
    FallBack(status.error().message, use);
    return std::unique_ptr<Method>();
  }
  Result<FileDescriptor> memory = MakeMemoryFile();
  if (!memory.ok()) {
    FallBack(memory.error().message, use);
    return std::unique_ptr<Method>();
  }
  const Stopwatch stopwatch;
  TakeExecuTorchErrors();
  Result<std::unique_ptr<Method>> method = Load(name, std::move(*memory));
  if (!method.ok()) {
    return method;
  }
  // When the file cannot grow, the backend puts weights elsewhere, one by one, and goes on: the
  // file would lack them for good.
  if (const std::string errors = TakeExecuTorchErrors(); !errors.empty()) {
    FallBack(StrCat("XNNPACK could not pack all of them into a file: ", errors), use);
    return method;
  }
  if (Status status = (*method)->SavePackedWeights(); !status.ok()) {
    FallBack(status.error().message, use);
    return method;
  }
  const int packed_weights = (*method)->packed_weights().get();
  const Result<bool> has_weights = HasPackedWeights(packed_weights);
  if (has_weights.ok() && !*has_weights) {
    use->state = PackedWeights::kNone;
    use->path.clear();
    return method;
  }
  if (Status status = weight_cache_->Store(name, packed_weights); !status.ok()) {
    FallBack(status.error().message, use);
    return method;
  }
  use->state = PackedWeights::kBuilt;
  use->build_ms = stopwatch.ms();
  return std::unique_ptr<Method>();
}

Result<std::unique_ptr<Method>> Model::LoadThroughCache(const char* name, bool prepare_only,
                                                        PackedWeightsUse* use) {
  if (has_own_linears_) {
    // They read their weights as the .pte has them. What else there is, is packed in no time.
    use->state = PackedWeights::kNone;
    return prepare_only ? std::unique_ptr<Method>() : Load(name, FileDescriptor());
  }
  use->path = weight_cache_->Path(name);
  const bool exists = weight_cache_->Exists(name);
  Result<FileDescriptor> file = weight_cache_->Open(name);
  if (file.ok()) {
    use->state = PackedWeights::kHit;
  } else {
    if (exists) {
      use->notice = file.error().message;
    }
    Result<std::unique_ptr<Method>> method = FillCache(name, use);
    if (!method.ok() || *method != nullptr) {
      return method;
    }
    TrimHeap();
    if (use->state == PackedWeights::kBuilt) {
      file = weight_cache_->Open(name);
      if (!file.ok()) {  // somebody took it away at once
        FallBack(file.error().message, use);
      }
    }
  }
  if (file.ok()) {
    struct stat info = {};
    fstat(file->get(), &info);
    use->bytes = static_cast<uint64_t>(info.st_size);
  }
  if (prepare_only) {
    return std::unique_ptr<Method>();
  }
  return file.ok() ? LoadMapped(name, std::move(*file), use) : Load(name, FileDescriptor());
}

Result<std::unique_ptr<Method>> Model::LoadMethod(const char* name) {
  PackedWeightsUse use;
  use.method = name;
  Result<std::unique_ptr<Method>> method =
      weight_cache_.has_value() ? LoadThroughCache(name, /*prepare_only=*/false, &use)
                                : Load(name, FileDescriptor());
  packed_weights_.push_back(std::move(use));
  if (!method.ok()) {
    return Failure(StrCat(path_, ": ", method.error().message));
  }
  TakeExecuTorchErrors();  // of a file that could not be used
  TrimHeap();
  return method;
}

Status Model::LoadVision() {
  Result<std::unique_ptr<Method>> method = LoadMethod(contract::kVisionEncoder);
  if (!method.ok()) {
    return method.error();
  }
  vision_encoder_ = std::move(*method);
  return {};
}

Status Model::LoadText() {
  // A table, of which rows are taken as they are: nothing to pack.
  Result<std::unique_ptr<Method>> embedding = Load(contract::kTokenEmbedding, FileDescriptor());
  if (!embedding.ok()) {
    return Failure(StrCat(path_, ": ", embedding.error().message));
  }
  token_embedding_ = std::move(*embedding);
  Result<std::unique_ptr<Method>> method = LoadMethod(contract::kTextDecoder);
  if (!method.ok()) {
    return method.error();
  }
  text_decoder_ = std::move(*method);
  return {};
}

void Model::UnloadVision() {
  vision_encoder_.reset();
  TrimHeap();
}

Status Model::Prepare() {
  for (const char* name : {contract::kVisionEncoder, contract::kTextDecoder}) {
    if (name == contract::kVisionEncoder && !metadata_.vision.has_value()) {
      continue;
    }
    PackedWeightsUse use;
    use.method = name;
    const Result<std::unique_ptr<Method>> method =
        LoadThroughCache(name, /*prepare_only=*/true, &use);
    packed_weights_.push_back(std::move(use));
    if (!method.ok()) {
      return Failure(StrCat(path_, ": ", method.error().message));
    }
  }
  return {};
}

Result<std::vector<float>> Model::EncodeImage(const std::vector<float>& pixels) {
  const auto size = static_cast<SizesType>(metadata_.vision->format.size);
  const TensorPtr input =
      from_blob(const_cast<float*>(pixels.data()), {1, 3, size, size}, ScalarType::Float);
  if (profile_ != nullptr) {
    profile_->Enter(contract::kVisionEncoder);
  }
  const auto outputs = vision_encoder_->Execute({*input});
  if (!outputs.ok()) {
    return outputs.error();
  }
  const Tensor& output = outputs->at(0).toTensor();
  const float* data = output.const_data_ptr<float>();
  return std::vector<float>(data, data + output.numel());
}

Status Model::EmbedTokens(const std::vector<int64_t>& ids, std::vector<float>* embeddings) {
  const auto count = static_cast<int64_t>(ids.size());
  for (int64_t at = 0; at < count; at += metadata_.max_seq_len) {
    const int64_t n = std::min(metadata_.max_seq_len, count - at);
    const TensorPtr input = from_blob(const_cast<int64_t*>(ids.data()) + at,
                                      {1, static_cast<SizesType>(n)}, ScalarType::Long);
    if (profile_ != nullptr) {
      profile_->Enter(contract::kTokenEmbedding);
    }
    const auto outputs = token_embedding_->Execute({*input});
    if (!outputs.ok()) {
      return outputs.error();
    }
    const Tensor& output = outputs->at(0).toTensor();
    const float* data = output.const_data_ptr<float>();
    embeddings->insert(embeddings->end(), data, data + output.numel());
  }
  return {};
}

Result<Logits> Model::DecodeText(const float* embeddings, int64_t n, int64_t start_pos) {
  const TensorPtr input = from_blob(
      const_cast<float*>(embeddings),
      {1, static_cast<SizesType>(n), static_cast<SizesType>(hidden_size_)}, ScalarType::Float);
  const TensorPtr position = from_blob(&start_pos, {1}, ScalarType::Long);
  if (profile_ != nullptr) {
    profile_->Enter(StrCat(contract::kTextDecoder, n > 1 ? "[prefill]" : "[decode]"));
  }
  const auto outputs = text_decoder_->Execute({*input, *position});
  if (!outputs.ok()) {
    return Failure(
        StrCat("at position ", start_pos, ", ", n, " tokens: ", outputs.error().message));
  }
  const Tensor& output = outputs->at(0).toTensor();
  const int64_t vocab_size = metadata_.vocab_size;
  const int64_t rows = std::min(n, metadata_.logit_positions);
  if (output.numel() != rows * vocab_size) {
    return Failure(StrCat("at position ", start_pos, ", ", n, " tokens: the model gave ",
                          output.numel(), " logits, expected ", rows, " x ", vocab_size));
  }
  return Logits{output.const_data_ptr<float>(), rows, vocab_size};
}

}  // namespace mvlm

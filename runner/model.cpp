#include "runner/model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "runner/contract.h"
#include "runner/executorch_log.h"
#include "runner/pte_file.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::BackendOptions;
using executorch::runtime::EValue;
using executorch::runtime::LoadBackendOptionsMap;
using executorch::runtime::Program;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;
using EtError = executorch::runtime::Error;

template <typename T>
using EtResult = executorch::runtime::Result<T>;

using Shape = std::vector<int64_t>;

// What ExecuTorch had to say about an error of its own.
std::string Explain(EtError error) {
  const std::string log = TakeExecuTorchErrors();
  return StrCat("ExecuTorch says ", executorch::runtime::to_string(error),
                log.empty() ? "" : StrCat(": ", log));
}

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

}  // namespace

Model::Model(std::string path, uint64_t file_bytes, std::unique_ptr<Module> module)
    : path_(std::move(path)), file_bytes_(file_bytes), module_(std::move(module)) {}

Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::Open(const std::string& path, WorkspaceSharing sharing) {
  CatchExecuTorchLog();
  const Result<uint64_t> file_bytes = CheckPteFile(path);
  if (!file_bytes.ok()) {
    return file_bytes.error();
  }
  std::unique_ptr<Model> model(
      new Model(path, *file_bytes, std::make_unique<Module>(path, Module::LoadMode::Mmap)));
  if (Status status = model->Load(sharing); !status.ok()) {
    return status.error();
  }
  if (Status status = model->ReadMetadata(); !status.ok()) {
    return status.error();
  }
  if (Status status = model->CheckMethods(); !status.ok()) {
    return status.error();
  }
  return model;
}

Status Model::Load(WorkspaceSharing sharing) {
  BackendOptions<1> xnnpack;
  LoadBackendOptionsMap options;
  if (xnnpack.set_option("workspace_sharing_mode", static_cast<int>(sharing)) != EtError::Ok ||
      options.set_options("XnnpackBackend", xnnpack.view()) != EtError::Ok) {
    return Failure("ExecuTorch takes no backend options");
  }
  // The module copies the options. The full verification walks the program's tables (not its
  // weights), so that a damaged file is an error and not a crash.
  const EtError error = module_->load(options, Program::Verification::InternalConsistency);
  if (error != EtError::Ok) {
    return InvalidInput(StrCat("cannot load ", path_, ": ", Explain(error),
                               "; it is damaged or needs another version of ExecuTorch; export it "
                               "again"));
  }
  return {};
}

Status Model::ReadMetadata() {
  const auto names = module_->method_names();
  if (!names.ok()) {
    return InvalidInput(StrCat("cannot load ", path_, ": ", Explain(names.error())));
  }
  Constants constants;
  for (const std::string& name : ContractConstants()) {
    if (names->count(name) == 0) {
      continue;  // ParseMetadata() knows which may be missing
    }
    const auto outputs = module_->execute(name);
    if (!outputs.ok()) {
      return InvalidInput(StrCat("cannot read constant method ", name, " of ", path_, ": ",
                                 Explain(outputs.error())));
    }
    std::vector<Constant>& values = constants[name];
    for (const EValue& output : *outputs) {
      std::optional<Constant> value = ToConstant(output);
      if (!value.has_value()) {
        return InvalidInput(StrCat("not a proper mvlm .pte: constant method ", name, " of ", path_,
                                   " gives a value of an unknown type"));
      }
      values.push_back(std::move(*value));
    }
    module_->unload_method(name);
  }

  Result<Metadata> metadata = ParseMetadata(constants, names->count(contract::kVisionEncoder) != 0);
  if (!metadata.ok()) {
    // The names tell what another program's file is; of one's own they are noise.
    const bool is_ours = constants.count(contract::kFormat) != 0;
    return InvalidInput(StrCat(path_, ": ", metadata.error().message,
                               is_ours ? ""
                                       : StrCat("; it has methods ", Join(*names),
                                                "; make one with `python -m mvlm.export`")));
  }
  metadata_ = std::move(*metadata);
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
       {1, 1, metadata_.vocab_size}},
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
    const auto meta = module_->method_meta(expected.method);
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

Status Model::LoadMethods(bool with_vision) {
  std::vector<const char*> methods = {contract::kTokenEmbedding, contract::kTextDecoder};
  if (with_vision) {
    methods.insert(methods.begin(), contract::kVisionEncoder);
  }
  for (const char* method : methods) {
    const EtError error = module_->load_method(method);
    if (error != EtError::Ok) {
      return Failure(StrCat("cannot load method ", method, " of ", path_, ": ", Explain(error)));
    }
  }
  return {};
}

Result<std::vector<float>> Model::EncodeImage(const std::vector<float>& pixels) {
  const auto size = static_cast<SizesType>(metadata_.vision->format.size);
  const TensorPtr input =
      from_blob(const_cast<float*>(pixels.data()), {1, 3, size, size}, ScalarType::Float);
  const auto outputs = module_->execute(contract::kVisionEncoder, *input);
  if (!outputs.ok()) {
    return Failure(StrCat("the vision encoder failed: ", Explain(outputs.error())));
  }
  const Tensor& output = outputs->at(0).toTensor();
  const float* data = output.const_data_ptr<float>();
  return std::vector<float>(data, data + output.numel());
}

void Model::UnloadVision() { module_->unload_method(contract::kVisionEncoder); }

Status Model::EmbedTokens(const std::vector<int64_t>& ids, std::vector<float>* embeddings) {
  if (ids.empty()) {
    return {};
  }
  const TensorPtr input = from_blob(const_cast<int64_t*>(ids.data()),
                                    {1, static_cast<SizesType>(ids.size())}, ScalarType::Long);
  const auto outputs = module_->execute(contract::kTokenEmbedding, *input);
  if (!outputs.ok()) {
    return Failure(StrCat("the token embedding failed: ", Explain(outputs.error())));
  }
  const Tensor& output = outputs->at(0).toTensor();
  const float* data = output.const_data_ptr<float>();
  embeddings->insert(embeddings->end(), data, data + output.numel());
  return {};
}

Result<Logits> Model::DecodeText(const std::vector<float>& embeddings, int64_t start_pos) {
  const auto n = static_cast<SizesType>(static_cast<int64_t>(embeddings.size()) / hidden_size_);
  const TensorPtr input =
      from_blob(const_cast<float*>(embeddings.data()), {1, n, static_cast<SizesType>(hidden_size_)},
                ScalarType::Float);
  const TensorPtr position = from_blob(&start_pos, {1}, ScalarType::Long);
  const auto outputs = module_->execute(contract::kTextDecoder, {*input, *position});
  if (!outputs.ok()) {
    return Failure(StrCat("the language model failed at position ", start_pos, " (", n,
                          " tokens): ", Explain(outputs.error())));
  }
  const Tensor& output = outputs->at(0).toTensor();
  return Logits{output.const_data_ptr<float>(), static_cast<size_t>(output.numel())};
}

}  // namespace mvlm

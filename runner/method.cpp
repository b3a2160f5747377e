#include "runner/method.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include <utility>

#include "ops/linear_backend.h"
#include "runner/executorch_log.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

using executorch::extension::Module;
using executorch::runtime::BackendOptions;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::LoadBackendOptionsMap;
using executorch::runtime::Program;
using executorch::runtime::Span;
using EtError = executorch::runtime::Error;

}  // namespace

Method::Method(std::string name, FileDescriptor packed_weights)
    : name_(std::move(name)), packed_weights_(std::move(packed_weights)) {}

Method::~Method() = default;

Result<std::unique_ptr<Method>> Method::Load(const std::shared_ptr<Program>& program,
                                             const std::string& name, Settings settings) {
  const auto failure = [&name](std::string_view why) {
    return Failure(StrCat("cannot load method ", name, ": ", why));
  };
  std::unique_ptr<Method> method(new Method(name, std::move(settings.packed_weights)));

  const auto meta = program->method_meta(name.c_str());
  if (!meta.ok()) {
    return failure(ExplainExecuTorchError(meta.error()));
  }
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto bytes = meta->memory_planned_buffer_size(i);
    if (!bytes.ok()) {
      return failure(ExplainExecuTorchError(bytes.error()));
    }
    method->arenas_.emplace_back(static_cast<size_t>(*bytes));
    if (method->arenas_.back().data() == nullptr) {
      return failure(StrCat("no memory for its tensors, ", *bytes, " bytes"));
    }
    method->spans_.emplace_back(method->arenas_.back().data(), method->arenas_.back().size());
  }
  method->planned_memory_ = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(method->spans_.data(), method->spans_.size()));

  BackendOptions<3> xnnpack;
  LoadBackendOptionsMap options;
  const bool is_cached = method->packed_weights_.get() >= 0;
  // The backend wants a name, of at most 255 bytes, and opens that itself. It takes two files of
  // the same name for one; that this one stays open makes its name unique.
  const std::string path = StrCat("/proc/self/fd/", method->packed_weights_.get());
  if (xnnpack.set_option("workspace_sharing_mode", settings.workspace_sharing) != EtError::Ok ||
      xnnpack.set_option("weight_cache_enabled", is_cached) != EtError::Ok ||
      (is_cached && xnnpack.set_option("packed_cache_path", path.c_str()) != EtError::Ok) ||
      // The second stands in front of the first, which sees the options of its own delegates.
      options.set_options(kXnnpackBackendId, xnnpack.view()) != EtError::Ok ||
      options.set_options(kLinearBackendId, xnnpack.view()) != EtError::Ok) {
    return Failure("ExecuTorch takes no backend options");
  }
  method->module_ = std::make_unique<Module>(program);
  const EtError error =
      method->module_->load_method(name, method->planned_memory_.get(), settings.tracer, &options);
  if (error != EtError::Ok) {
    return failure(ExplainExecuTorchError(error));
  }
  return method;
}

Result<std::vector<EValue>> Method::Execute(const std::vector<EValue>& inputs) {
  auto outputs = module_->execute(name_, inputs);
  if (!outputs.ok()) {
    return Failure(StrCat("method ", name_, " failed: ", ExplainExecuTorchError(outputs.error())));
  }
  return std::move(*outputs);
}

Status Method::SavePackedWeights() {
  BackendOptions<1> save;
  EtError error = save.set_option("save_weight_cache_on_disk", true);
  if (error == EtError::Ok) {
    error = executorch::runtime::set_option(kXnnpackBackendId, save.view());
  }
  if (error != EtError::Ok) {
    return Failure(StrCat("cannot save the packed weights of method ", name_, ": ",
                          ExplainExecuTorchError(error)));
  }
  return {};
}

}  // namespace mvlm

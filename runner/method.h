// One method of a program, loaded, with all that it holds. Part of what knows ExecuTorch's API;
// only model.cpp includes it.

#pragma once

#include <executorch/extension/module/module.h>

#include <memory>
#include <string>
#include <vector>

#include "mvlm/result.h"
#include "runner/arena.h"
#include "runner/file.h"

namespace mvlm {

class Method {
 public:
  struct Settings {
    int workspace_sharing = 0;  // the backend's option workspace_sharing_mode
    // In which the backend finds packed weights, or into which it packs them if the file is empty;
    // without a file it packs them into memory.
    FileDescriptor packed_weights;
    executorch::runtime::EventTracer* tracer = nullptr;  // outlives the method
  };

  // What `program` was read from has to outlive the method. Failure if ExecuTorch cannot load it.
  static Result<std::unique_ptr<Method>> Load(
      const std::shared_ptr<executorch::runtime::Program>& program, const std::string& name,
      Settings settings);

  // Gives back all memory and mappings: they are shared with no other method, but for the workspace
  // if that was asked for.
  ~Method();
  Method(const Method&) = delete;
  Method& operator=(const Method&) = delete;

  const std::string& name() const { return name_; }
  // The file that Load() was given.
  const FileDescriptor& packed_weights() const { return packed_weights_; }

  // The outputs lie in the method's memory and hold until its next call. Failure says which method
  // failed and why.
  Result<std::vector<executorch::runtime::EValue>> Execute(
      const std::vector<executorch::runtime::EValue>& inputs);

  // Completes the empty file of packed weights that the method was loaded with, so that it can be
  // loaded from.
  Status SavePackedWeights();

 private:
  Method(std::string name, FileDescriptor packed_weights);

  std::string name_;
  FileDescriptor packed_weights_;
  std::vector<Arena> arenas_;
  std::vector<executorch::runtime::Span<uint8_t>> spans_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_memory_;
  // Of its own, for what loading allocates is given back with the module only. Last, so that it
  // goes first.
  std::unique_ptr<executorch::extension::Module> module_;
};

}  // namespace mvlm

// A record of what ran inside the methods and for how long, in ExecuTorch's ETDump format. Part of
// what knows ExecuTorch's API.

#pragma once

#include <executorch/devtools/etdump/etdump_flatcc.h>

#include <string>
#include <utility>

#include "mvlm/result.h"

namespace mvlm {

// Given to a method when it is loaded, it notes the loading and every call: a block of events for
// each, named after the latest Enter(). (ExecuTorch's own names are the same for all methods.)
class Profile final : public executorch::etdump::ETDumpGen {
 public:
  void Enter(std::string block) { block_ = std::move(block); }

  // ExecuTorch calls this.
  void create_event_block(const char* name) override;

  // The record so far, as executorch.devtools.Inspector reads it. To be called once, at the end.
  Result<std::string> Finish();

 private:
  std::string block_;
};

}  // namespace mvlm

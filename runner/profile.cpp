#include "runner/profile.h"

#include <cstdlib>

namespace mvlm {

using executorch::etdump::ETDumpGen;
using executorch::etdump::ETDumpResult;

void Profile::create_event_block(const char* name) {
  ETDumpGen::create_event_block(block_.empty() ? name : block_.c_str());
}

Result<std::string> Profile::Finish() {
  const ETDumpResult record = get_etdump_data();
  if (record.buf == nullptr || record.size == 0) {
    return Failure("ExecuTorch gave no profile");
  }
  std::string bytes(static_cast<const char*>(record.buf), record.size);
  std::free(record.buf);
  return bytes;
}

}  // namespace mvlm

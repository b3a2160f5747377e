#include "runner/host.h"

#include <elf.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include "runner/hash.h"

namespace mvlm {
namespace {

constexpr std::string_view kXnnpackLibrary = "libexecutorch_backend_xnnpack";

// Those of x86, then those of Arm.
constexpr std::array<std::string_view, 11> kCpuFields = {
    "vendor_id", "cpu family", "model",           "stepping",         "flags",
    "Features",  "Processor",  "CPU implementer", "CPU architecture", "CPU variant",
    "CPU part"};

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) {
    return {};
  }
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// The GNU build id among the notes of a loaded object, in hexadecimal digits; empty without one.
std::string BuildId(const dl_phdr_info& object) {
  for (size_t i = 0; i < object.dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = object.dlpi_phdr[i];
    if (header.p_type != PT_NOTE) {
      continue;
    }
    const auto padded = [](size_t size) { return (size + 3) & ~size_t{3}; };
    const char* at = reinterpret_cast<const char*>(object.dlpi_addr + header.p_vaddr);
    const char* const end = at + header.p_memsz;
    while (at + sizeof(ElfW(Nhdr)) <= end) {
      ElfW(Nhdr) note;
      std::memcpy(&note, at, sizeof(note));
      const char* const name = at + sizeof(note);
      const char* const content = name + padded(note.n_namesz);
      if (content + note.n_descsz > end) {
        break;
      }
      if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 &&
          std::memcmp(name, "GNU", 4) == 0) {
        std::string digits;
        for (const unsigned char byte : std::string_view(content, note.n_descsz)) {
          digits += "0123456789abcdef"[byte >> 4];
          digits += "0123456789abcdef"[byte & 15];
        }
        return digits;
      }
      at = content + padded(note.n_descsz);
    }
  }
  return "";
}

struct BuildIds {
  std::string program;
  std::string library;
};

int Visit(dl_phdr_info* object, size_t, void* data) {
  auto* ids = static_cast<BuildIds*>(data);
  const std::string_view name = object->dlpi_name == nullptr ? "" : object->dlpi_name;
  if (name.empty() && ids->program.empty()) {  // the program itself comes first, without a name
    ids->program = BuildId(*object);
  } else if (name.find(kXnnpackLibrary) != std::string_view::npos) {
    ids->library = BuildId(*object);
  }
  return 0;
}

}  // namespace

std::string CpuIdentity(std::string_view cpuinfo) {
  std::set<std::string> facts;
  while (!cpuinfo.empty()) {
    const std::string_view line = cpuinfo.substr(0, cpuinfo.find('\n'));
    cpuinfo.remove_prefix(std::min(line.size() + 1, cpuinfo.size()));
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) {
      continue;
    }
    const std::string_view field = Trim(line.substr(0, colon));
    for (const std::string_view known : kCpuFields) {
      if (field == known) {
        facts.insert(std::string(field) + ": " + std::string(Trim(line.substr(colon + 1))));
      }
    }
  }
  std::string identity;
  for (const std::string& fact : facts) {
    identity += fact + "\n";
  }
  return identity;
}

std::string HostCpuId() {
  std::ifstream file("/proc/cpuinfo");
  const std::string cpuinfo{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return HashToHex(Hash(CpuIdentity(cpuinfo)));
}

std::string XnnpackBuildId() {
  BuildIds ids;
  dl_iterate_phdr(Visit, &ids);
  if (!ids.library.empty()) {
    return ids.library;
  }
  return ids.program.empty() ? "unknown" : ids.program;
}

}  // namespace mvlm

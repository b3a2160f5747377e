// A library for LD_PRELOAD that counts how often each of KleidiAI's matrix multiplications is
// called, and writes lines of "NAME COUNT" to the file that MVLM_KERNEL_COUNTS names.
//
// It defines the functions that libexecutorch_backend_xnnpack.so exports and calls through its
// global offset table. Each counts itself and jumps on with its arguments where they are, in
// registers and on the stack: what is used here, x9 to x11 and x16, is no argument's (AAPCS64).

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {
// Read by the code below: offsets 0 and 8.
struct Kernel {
  uint64_t count;
  void* function;
};

#define MVLM_KERNEL(name)                                                          \
  __attribute__((visibility("hidden"))) Kernel slot_of_##name;                     \
  __asm__(".text\n.balign 4\n.globl " #name "\n.type " #name ", %function\n" #name \
          ":\n"                                                                    \
          "adrp x9, slot_of_" #name                                                \
          "\n"                                                                     \
          "add x9, x9, :lo12:slot_of_" #name                                       \
          "\n"                                                                     \
          "1: ldxr x10, [x9]\nadd x10, x10, #1\n"                                  \
          "stxr w11, x10, [x9]\ncbnz w11, 1b\n"                                    \
          "ldr x16, [x9, #8]\nbr x16\n.size " #name ", . - " #name "\n");
#include "kernel_names.inc"
#undef MVLM_KERNEL
}

namespace {

struct Named {
  const char* name;
  Kernel* kernel;
};

const Named kKernels[] = {
#define MVLM_KERNEL(name) {#name, &slot_of_##name},
#include "kernel_names.inc"
#undef MVLM_KERNEL
};

__attribute__((constructor)) void Find() {
  for (const Named& named : kKernels) {
    named.kernel->function = dlsym(RTLD_NEXT, named.name);
    if (named.kernel->function == nullptr) {
      std::fprintf(stderr, "count_kernels: no %s after this library\n", named.name);
      std::abort();
    }
  }
}

__attribute__((destructor)) void Write() {
  const char* path = std::getenv("MVLM_KERNEL_COUNTS");
  std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "count_kernels: cannot write to MVLM_KERNEL_COUNTS\n");
    return;
  }
  for (const Named& named : kKernels) {
    std::fprintf(file, "%s %llu\n", named.name,
                 static_cast<unsigned long long>(named.kernel->count));
  }
  std::fclose(file);
}

}  // namespace

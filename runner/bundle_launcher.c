// The llava_main of the 64-bit Arm bundle (ci/build_aarch64.sh): starts lib/llava_main.bin beside
// it with the bundle's own dynamic loader and libraries, so that nothing of the system is needed.
// It is linked statically, because the system may have no loader, or as Android another one.
//
// The loader is mapped and entered here as the kernel would do it, instead of with exec(): that
// needs a second ELF file to be executable in its own right, which an emulator without binfmt_misc
// cannot do. ld.so then behaves as if it had been run by hand, see ld.so(8).

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef __aarch64__
#error "bundle_launcher.c is for 64-bit Arm; ci/build_aarch64.sh builds it"
#endif

enum { kMaxHeaders = 32, kBadUsage = 2 };

struct Loader {
  uintptr_t entry;
  uintptr_t headers;
  size_t header_count;
};

static _Noreturn void Die(const char* what, const char* path, const char* why) {
  fprintf(stderr, "llava_main: error: %s %s: %s; unpack mvlm-aarch64.tar.gz again\n", what, path,
          why);
  exit(kBadUsage);
}

// The folder of this program, without a slash at its end.
static void FindFolder(const char* name, char* folder) {
  char path[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (length >= 0) {
    path[length] = '\0';
  } else if (realpath(name, path) == NULL) {  // no /proc
    Die("cannot find the folder of", name, strerror(errno));
  }
  *strrchr(path, '/') = '\0';  // both are absolute
  strcpy(folder, path);
}

static char* Join(const char* folder, const char* name) {
  char* path = NULL;
  if (asprintf(&path, "%s/%s", folder, name) < 0) Die("cannot start", name, "out of memory");
  return path;
}

// Maps the position-independent program `path` somewhere.
static struct Loader Map(const char* path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) Die("cannot open", path, strerror(errno));
  Elf64_Ehdr elf;
  Elf64_Phdr headers[kMaxHeaders];
  if (pread(file, &elf, sizeof(elf), 0) != sizeof(elf) ||
      memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0 || elf.e_ident[EI_CLASS] != ELFCLASS64 ||
      elf.e_machine != EM_AARCH64 || elf.e_type != ET_DYN ||
      elf.e_phentsize != sizeof(Elf64_Phdr) || elf.e_phnum == 0 || elf.e_phnum > kMaxHeaders) {
    Die("cannot use", path, "not a dynamic loader for 64-bit Arm");
  }
  const ssize_t bytes = elf.e_phnum * sizeof(Elf64_Phdr);
  if (pread(file, headers, bytes, elf.e_phoff) != bytes) Die("cannot read", path, "cut off");

  const uintptr_t page = getauxval(AT_PAGESZ);
  uintptr_t begin = UINTPTR_MAX, end = 0, align = page;
  for (size_t i = 0; i < elf.e_phnum; ++i) {
    if (headers[i].p_type != PT_LOAD) continue;
    if (headers[i].p_vaddr < begin) begin = headers[i].p_vaddr;
    if (headers[i].p_vaddr + headers[i].p_memsz > end) {
      end = headers[i].p_vaddr + headers[i].p_memsz;
    }
    if (headers[i].p_align > align) align = headers[i].p_align;
  }
  if (begin >= end) Die("cannot use", path, "nothing in it to load");
  begin &= -page;
  // Room for the whole, from an address that is as aligned as the file wants it.
  char* room = mmap(NULL, end - begin + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) Die("cannot map", path, strerror(errno));
  const uintptr_t base = (((uintptr_t)room + align - 1) & -align) - begin;

  struct Loader loader = {base + elf.e_entry, 0, elf.e_phnum};
  for (size_t i = 0; i < elf.e_phnum; ++i) {
    const Elf64_Phdr* segment = &headers[i];
    if (segment->p_type != PT_LOAD) continue;
    const int protection = (segment->p_flags & PF_R ? PROT_READ : 0) |
                           (segment->p_flags & PF_W ? PROT_WRITE : 0) |
                           (segment->p_flags & PF_X ? PROT_EXEC : 0);
    const uintptr_t from = base + segment->p_vaddr, to = from + segment->p_filesz;
    const uintptr_t first = from & -page, mapped_end = (to + page - 1) & -page;
    if (mmap((void*)first, to - first, protection, MAP_PRIVATE | MAP_FIXED, file,
             segment->p_offset - (from - first)) == MAP_FAILED) {
      Die("cannot map", path, strerror(errno));
    }
    if (segment->p_memsz > segment->p_filesz) {
      const uintptr_t memory_end = from + segment->p_memsz;
      // To the end of the page, for the loader's first allocations come from there.
      memset((void*)to, 0, mapped_end - to);
      if (memory_end > mapped_end &&
          mmap((void*)mapped_end, memory_end - mapped_end, protection,
               MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) {
        Die("cannot map", path, strerror(errno));
      }
    }
    if (segment->p_offset <= elf.e_phoff &&
        elf.e_phoff + bytes <= segment->p_offset + segment->p_filesz) {
      loader.headers = from + (elf.e_phoff - segment->p_offset);
    }
  }
  if (loader.headers == 0) Die("cannot use", path, "its headers are not loaded");
  close(file);
  return loader;
}

// Enters the loader with the stack that a program finds at its start: argc, argv, environment,
// auxiliary vector (System V ABI, "Process Initialization"), each list with a null at its end.
static _Noreturn void Enter(const struct Loader* loader, char** argv, size_t argc, char** envp) {
  size_t env_count = 0;
  while (envp[env_count] != NULL) ++env_count;
  const Elf64_auxv_t* old = (const Elf64_auxv_t*)(envp + env_count + 1);
  size_t aux_count = 1;
  while (old[aux_count - 1].a_type != AT_NULL) ++aux_count;

  const size_t words = 1 + argc + 1 + env_count + 1 + 2 * aux_count;
  // One more for the alignment to 16 bytes that the processor wants of a stack pointer.
  uint64_t* stack = __builtin_alloca((words + 1) * sizeof(uint64_t));
  stack = (uint64_t*)(((uintptr_t)stack + 15) & ~(uintptr_t)15);
  uint64_t* to = stack;
  *to++ = argc;
  memcpy(to, argv, (argc + 1) * sizeof(*to));
  to += argc + 1;
  memcpy(to, envp, (env_count + 1) * sizeof(*to));
  to += env_count + 1;
  for (size_t i = 0; i < aux_count; ++i) {
    uint64_t value = old[i].a_un.a_val;
    switch (old[i].a_type) {
      case AT_PHDR:
        value = loader->headers;
        break;
      case AT_PHNUM:
        value = loader->header_count;
        break;
      case AT_ENTRY:
        value = loader->entry;
        break;
      case AT_BASE:
        value = 0;
        break;  // of a program that was started without a loader
      case AT_EXECFN:
        value = (uint64_t)argv[0];
        break;
      default:
        break;
    }
    *to++ = old[i].a_type;
    *to++ = value;
  }
  // x0 is a function for atexit() at a program's start: none.
  __asm__ volatile(
      "mov x1, %0\n\tmov x2, %1\n\tmov sp, x1\n\tmov x0, xzr\n\tmov x29, xzr\n\tmov x30, xzr\n\tbr "
      "x2"
      :
      : "r"(stack), "r"(loader->entry)
      : "x0", "x1", "x2", "memory");
  __builtin_unreachable();
}

int main(int argc, char** argv, char** envp) {
  char folder[PATH_MAX];
  FindFolder(argc > 0 ? argv[0] : "llava_main", folder);
  char* libraries = Join(folder, "lib");
  char* loader_path = Join(libraries, "ld-linux-aarch64.so.1");
  char* program = Join(libraries, "llava_main.bin");
  if (access(program, R_OK) != 0) Die("cannot open", program, strerror(errno));

  char* options[] = {loader_path, "--library-path", libraries, "--argv0", "llava_main", program};
  const size_t option_count = sizeof(options) / sizeof(options[0]);
  const size_t given = argc > 0 ? argc - 1 : 0;
  char** arguments = calloc(option_count + given + 1, sizeof(char*));
  if (arguments == NULL) Die("cannot start", program, "out of memory");
  memcpy(arguments, options, sizeof(options));
  for (size_t i = 0; i < given; ++i) arguments[option_count + i] = argv[i + 1];

  const struct Loader loader = Map(loader_path);
  Enter(&loader, arguments, option_count + given, envp);
}

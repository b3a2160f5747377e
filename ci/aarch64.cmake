# Toolchain file for 64-bit Arm Linux, with Debian's cross compiler and the libraries that ci/build_aarch64.sh has put
# into build/aarch64-sysroot. What is built runs under the emulator below, on a CPU with dotprod and i8mm.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

# The compiler's own libc, and everything else from the sysroot; nothing of the machine but programs.
get_filename_component(MVLM_SYSROOT "${CMAKE_CURRENT_LIST_DIR}/../build/aarch64-sysroot" ABSOLUTE)
set(CMAKE_FIND_ROOT_PATH "${MVLM_SYSROOT}")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

# Where Debian puts headers that differ between architectures.
set(CMAKE_C_FLAGS_INIT "-isystem ${MVLM_SYSROOT}/usr/include/aarch64-linux-gnu")
set(CMAKE_CXX_FLAGS_INIT "${CMAKE_C_FLAGS_INIT}")

# For libraries that libraries need.
set(MVLM_RPATH_LINK "-Wl,-rpath-link,${MVLM_SYSROOT}/usr/lib/aarch64-linux-gnu:${MVLM_SYSROOT}/lib/aarch64-linux-gnu")
# Kernels with pages of 64 KiB refuse files whose segments are aligned to less.
set(CMAKE_EXE_LINKER_FLAGS_INIT "${MVLM_RPATH_LINK} -Wl,-z,max-page-size=65536")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "${MVLM_RPATH_LINK} -Wl,-z,max-page-size=65536")

# Not plain "max": qemu 7.2 computes SME's outer products wrongly, and XNNPACK would use them.
set(CMAKE_CROSSCOMPILING_EMULATOR "qemu-aarch64-static;-L;${MVLM_SYSROOT};-cpu;max,sme=off")

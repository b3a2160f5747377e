#!/usr/bin/env bash
# Builds mvlm for 64-bit Arm Linux on a Debian machine of any kind, and makes build/mvlm-aarch64.tar.gz of it: llava_main
# with its own loader and libraries, which runs on any 64-bit Arm Linux and from an adb shell on Android (ci/adb_run.sh).
# A second call finds what is fetched and what is built, and is quick.
#
#   ci/build_aarch64.sh            everything, build/aarch64 and build/mvlm-aarch64.tar.gz
#   JOBS=4 ci/build_aarch64.sh     with so many compile jobs
#
# The native packages of the machine stay as they are: arm64 libraries are fetched from the machine's own sources with a
# private apt state and unpacked into build/aarch64-sysroot.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '== %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
case ${1:-} in
  '') ;;
  *) say "$1: ci/build_aarch64.sh takes no arguments"; exit 2 ;;
esac

sysroot=$PWD/build/aarch64-sysroot
jobs=${JOBS:-$(nproc)}
# What runner, operators and tests are linked with; apt adds what these depend on.
libraries=(libc6 libstdc++6 libhwy-dev libsentencepiece-dev libcli11-dev nlohmann-json3-dev libjpeg-dev libpng-dev
           libgtest-dev)
executorch=1.5.1

# ---- The machine: compiler, emulator, cmake --------------------------------------------------------------------------
. ci/apt.sh
install_packages g++-aarch64-linux-gnu qemu-user-static
[ -n "${MVLM_NO_SETUP:-}" ] || ci/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

# ---- The sysroot: Debian's libraries and executorch's wheel ----------------------------------------------------------
# Made beside its place and renamed, so that it is there whole or not at all.
wanted="$(cat ci/build_aarch64.sh | sha256sum)"
stamp=$sysroot/made-by
fetch_debian() {
  local apt=$1/apt deb list
  mkdir -p "$apt"/state/lists/partial "$apt"/cache/archives/partial "$apt"/log
  : > "$apt/status"
  # The machine's sources and keys, and nothing of what it has installed. Hooks of the machine's configuration (a
  # container's "delete what was downloaded") are not for this state.
  local options=(-o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State="$apt/state"
                 -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" -o Dir::Log="$apt/log"
                 -o APT::Sandbox::User= -o Debug::NoLocking=true -o APT::Install-Recommends=false
                 -o Acquire::Languages=none -o Acquire::Retries=3)
  printf '#clear APT::Architectures;\n#clear DPkg::Post-Invoke;\n#clear APT::Update::Post-Invoke;\n' > "$apt/apt.conf"
  APT_CONFIG="$apt/apt.conf" apt-get "${options[@]}" update -qq
  APT_CONFIG="$apt/apt.conf" apt-get "${options[@]}" install -qq -y --download-only "${libraries[@]}" >/dev/null
  mkdir -p "$2/var/lib/dpkg/info"
  for deb in "$apt"/cache/archives/*.deb; do
    list=$(dpkg-deb -f "$deb" Package)
    # libc's headers come with the cross compiler.
    case $list in libc6-dev | linux-libc-dev) continue ;; esac
    dpkg-deb -x "$deb" "$2"
    # As dpkg keeps them: which package a file is of.
    dpkg-deb --fsys-tarfile "$deb" | tar -t | sed 's,^\.,,' > "$2/var/lib/dpkg/info/$list.list"
  done
}
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  work=$(mktemp -d "$PWD/build/aarch64-fetch.XXXXXX" 2>/dev/null) ||
    { mkdir -p build; work=$(mktemp -d "$PWD/build/aarch64-fetch.XXXXXX"); }
  trap 'rm -rf "$work"' EXIT
  say "fetching arm64 libraries of this machine's Debian: ${libraries[*]}"
  fetch_debian "$work" "$work/root"
  say "fetching executorch $executorch for aarch64"
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --implementation cp --dest "$work/wheel" "executorch==$executorch"
  .venv/bin/python -m zipfile -e "$work"/wheel/executorch-*.whl "$work/root/opt"
  printf '%s' "$wanted" > "$work/root/made-by"
  # Paths of the sysroot are in the build folder's cache, so both are made anew.
  rm -rf "$sysroot" build/aarch64
  mv "$work/root" "$sysroot"
fi

# ---- Build -----------------------------------------------------------------------------------------------------------
say "building for aarch64"
cmake --preset aarch64 >build/aarch64-configure.log 2>&1 || { tail -n 30 build/aarch64-configure.log >&2; exit 1; }
cmake --build --preset aarch64 --parallel "$jobs" >&2

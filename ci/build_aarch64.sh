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
case ${1:-} in
  '') ;;
  *) say "$1: ci/build_aarch64.sh takes no arguments"; exit 2 ;;
esac

sysroot=$PWD/build/aarch64-sysroot
jobs=${JOBS:-$(nproc)}
mkdir -p build
work=
trap 'rm -rf "$work"' EXIT
# What runner, operators and tests are linked with; apt adds what these depend on.
libraries=(libc6 libstdc++6 libhwy-dev libsentencepiece-dev libcli11-dev nlohmann-json3-dev libjpeg-dev libpng-dev
           libgtest-dev)
executorch=1.5.1

# ---- The machine: compiler, emulator, cmake --------------------------------------------------------------------------
. ci/apt.sh
install_packages g++-aarch64-linux-gnu qemu-user-static
ci/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

# ---- The sysroot: Debian's libraries and executorch's wheel ----------------------------------------------------------
# Made beside its place and renamed, so that it is there whole or not at all.
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
# What was fetched is remembered by what was asked for and how.
wanted="executorch $executorch, ${libraries[*]}, $(declare -f fetch_debian | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  work=$(mktemp -d "$PWD/build/aarch64-fetch.XXXXXX")
  say "fetching arm64 libraries of this machine's Debian: ${libraries[*]}"
  fetch_debian "$work" "$work/sysroot"
  say "fetching executorch $executorch for aarch64"
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --implementation cp --dest "$work/wheel" "executorch==$executorch"
  .venv/bin/python -m zipfile -e "$work"/wheel/executorch-*.whl "$work/sysroot/opt"
  printf '%s' "$wanted" > "$work/sysroot/made-by"
  # Paths of the sysroot are in the build folder's cache, so both are made anew.
  rm -rf "$sysroot" build/aarch64
  mv "$work/sysroot" "$sysroot"
fi

# ---- Build -----------------------------------------------------------------------------------------------------------
say "building for aarch64"
cmake --preset aarch64 >build/aarch64-configure.log 2>&1 || { tail -n 30 build/aarch64-configure.log >&2; exit 1; }
cmake --build --preset aarch64 --parallel "$jobs" >&2

# ---- The bundle ------------------------------------------------------------------------------------------------------
readelf=aarch64-linux-gnu-readelf
bundle=build/aarch64-bundle/mvlm-aarch64
info=$sysroot/var/lib/dpkg/info
search=(build/aarch64/ops build/aarch64/runner "$sysroot/opt/executorch/lib" "$sysroot/usr/lib/aarch64-linux-gnu"
        "$sysroot/lib/aarch64-linux-gnu")
say "making build/mvlm-aarch64.tar.gz"
rm -rf build/aarch64-bundle
mkdir -p "$bundle/lib" "$bundle/licenses"
cp LICENSE "$bundle/licenses/mvlm"
cp "$(find "$sysroot/opt" -path '*dist-info*' -name 'LICENSE*' | head -n 1)" "$bundle/licenses/executorch"
cp build/aarch64/runner/mvlm_bundle_launcher "$bundle/llava_main"
cp build/aarch64/runner/llava_main "$bundle/lib/llava_main.bin"

# add_library NAME: puts the library, and the licence of the package that it is from, into the bundle.
add_library() {
  local folder file package
  for folder in "${search[@]}"; do
    [ -e "$folder/$1" ] || continue
    cp -L "$folder/$1" "$bundle/lib/$1"
    file=${folder#"$sysroot"}/$1
    package=$(cd "$info" && grep -lFx -- "$file" ./*.list | head -n 1) || true
    package=$(basename "${package:-}" .list)
    if [ -n "$package" ]; then
      cp -L "$sysroot/usr/share/doc/$package/copyright" "$bundle/licenses/$package"
    fi
    return
  done
  say "$1, which the bundle needs, is in none of: ${search[*]}"
  exit 1
}
# What is needed by what is there, until nothing is missing.
add_library ld-linux-aarch64.so.1
added=yes
while [ -n "$added" ]; do
  added=
  for needed in $("$readelf" -dW "$bundle"/lib/* 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u); do
    [ -e "$bundle/lib/$needed" ] && continue
    add_library "$needed"
    added=yes
  done
done
aarch64-linux-gnu-strip --strip-unneeded "$bundle/llava_main" "$bundle"/lib/*
chmod 755 "$bundle/llava_main" "$bundle/lib/ld-linux-aarch64.so.1" "$bundle/lib/llava_main.bin"
cat > "$bundle/README.txt" <<'TXT'
mvlm's llava_main for 64-bit Arm: any Linux, and Android from an adb shell. Nothing is to be installed.

  ./llava_main --model_path mobilevlm.pte --image_path photo.jpg --prompt "What is in the picture?"
  ./llava_main --help

It may be started from any folder. Keep llava_main and lib together. It reads /proc/cpuinfo and
/sys/devices/system/cpu to learn what the processor can do. licenses/ has the licences of what lib holds.
TXT
tar -C build/aarch64-bundle --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - mvlm-aarch64 |
  gzip -9n > build/mvlm-aarch64.tar.gz.part
mv build/mvlm-aarch64.tar.gz.part build/mvlm-aarch64.tar.gz
say "build/mvlm-aarch64.tar.gz: $(stat -c %s build/mvlm-aarch64.tar.gz) bytes, $(du -sb "$bundle" | cut -f1) unpacked"

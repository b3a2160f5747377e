#!/usr/bin/env bash
# Runs the operators' tests with their AVX-512 code (Highway's target AVX3) on a machine whose CPU need not have it: in
# Linux on a CPU that Bochs emulates, on a Debian machine with x86-64. It says whether results are right, nothing about
# speed. A second call finds what is fetched and what is built; the tests themselves take minutes.
#
#   ci/emulate_avx512.sh                                        on a Skylake-X: AVX-512 without VNNI
#   ci/emulate_avx512.sh corei7_icelake_u                       on an Ice Lake, which has VNNI
#   ci/emulate_avx512.sh corei7_skylake_x 'Targets/*Quant*AVX3' with another filter of GoogleTest
#   JOBS=4 ci/emulate_avx512.sh                                 with so many compile jobs
#   TIMEOUT=7200 ci/emulate_avx512.sh                           with so many seconds for the emulated machine
#
# It succeeds if all tests that the filter chooses passed there, and they are one at least. What the emulated machine
# wrote is in build/avx512/MODEL afterwards.
#
# The native packages of the machine stay as they are, but for a compiler: the rest is fetched from the machine's own
# sources with a private apt state and unpacked into build/emulator.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '== %s\n' "$*" >&2; }

model=${1:-corei7_skylake_x}
# What goes through targets, with this one, and what calls the operators, which use the best target there is.
# ThreadsGiveTheBitsOfOne needs two cores; the emulated machine has one.
filter='Targets/*/AVX3*:OperatorTest.*:StatelessOperatorsTest.*:LinearIsFasterHereTest.*'
filter=${2:-$filter:-StatelessOperatorsTest.ThreadsGiveTheBitsOfOne}
if [ $# -gt 2 ] || [[ ! $model =~ ^[a-z0-9_]+$ ]]; then
  say "$*: ci/emulate_avx512.sh takes a CPU model of Bochs and a filter of GoogleTest, or less"
  exit 2
fi
timeout=${TIMEOUT:-3600}
if [[ ! $timeout =~ ^[1-9][0-9]*$ ]]; then
  say "TIMEOUT=$timeout: a number of seconds is needed"
  exit 2
fi
if [ "$(uname -m)" != x86_64 ]; then
  say "$(uname -m): the tests that are emulated are those that this machine compiles, so x86-64 is needed"
  exit 2
fi

emulator=$PWD/build/emulator
jobs=${JOBS:-$(nproc)}
mkdir -p build
work=
bochs=
cleanup() {
  [ -z "$bochs" ] || kill -KILL "$bochs" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
# Whatever Debian is here, Bochs 3.0 is what these tests are known to run on; Debian 12 has 2.7, which was not tried.
bochs_release=trixie
# What boots in it, and what makes the medium that it boots from; apt adds what these depend on.
packages=(busybox-static isolinux syslinux-common xorriso bochsbios vgabios)

# ---- The machine: compiler, cmake ------------------------------------------------------------------------------------
. ci/apt.sh
install_packages g++ make xz-utils
ci/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"

# ---- The tests -------------------------------------------------------------------------------------------------------
# As ci/test.sh builds them, in the same folder.
say "building the operators' tests"
cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DMVLM_BUILD_TESTS=ON >/dev/null
cmake --build build/native --target mvlm_ops_test --parallel "$jobs" >&2

# ---- The emulator: Bochs, and a kernel ------------------------------------------------------------------------------
# Made beside its place and renamed, so that it is there whole or not at all.
stamp=$emulator/made-by
# fetch FOLDER: puts the packages and the kernel into FOLDER/debs, the source of Bochs into FOLDER.
fetch() {
  local apt=$1/apt sourcelist sourceparts codename mirror kernel uri name hash
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  mkdir -p "$apt"/state/lists/partial "$apt"/cache/archives/partial "$apt"/log "$apt"/sources "$1/debs"
  : > "$apt/status"
  # In a copy, for there are others below.
  eval "$(apt-config shell sourcelist Dir::Etc::sourcelist/f sourceparts Dir::Etc::sourceparts/d)"
  [ ! -e "$sourcelist" ] || cp "$sourcelist" "$apt/sources/machine.list"
  [ ! -d "$sourceparts" ] || find "$sourceparts" -maxdepth 1 -type f -exec cp {} "$apt/sources" \;
  # The machine's keys, and nothing of what it has installed. Hooks of the machine's configuration (a container's
  # "delete what was downloaded") are not for this state.
  local options=(-o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
                 -o Dir::Log="$apt/log" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt/sources"
                 -o APT::Sandbox::User= -o Debug::NoLocking=true -o APT::Install-Recommends=false
                 -o Acquire::Languages=none -o Acquire::Retries=3)
  printf '#clear DPkg::Post-Invoke;\n#clear APT::Update::Post-Invoke;\n' > "$apt/apt.conf"
  export APT_CONFIG=$apt/apt.conf
  apt-get "${options[@]}" update -qq
  codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
  # shellcheck disable=SC2016 # it is apt-get that expands this
  mirror=$(apt-get "${options[@]}" indextargets --format '$(REPO_URI)' \
    'Origin: Debian' "Codename: $codename" 'Component: main' 'Created-By: Packages' | head -n 1)
  if [ -z "$mirror" ]; then
    say "no mirror of Debian's among the machine's apt sources; Bochs and a kernel come from there"
    return 2
  fi
  apt-get "${options[@]}" install -qq -y --download-only "${packages[@]}" >/dev/null
  mv "$apt"/cache/archives/*.deb "$1/debs"
  # The newest kernel is what this package depends on. What a kernel depends on is for installing it.
  kernel=$(apt-cache "${options[@]}" show --no-all-versions linux-image-cloud-amd64 |
    sed -n 's/^Depends:.* \(linux-image-[^ ,]*\).*/\1/p')
  (cd "$1/debs" && apt-get "${options[@]}" download -qq "$kernel" >&2)
  # The same mirror's source packages of the release that Bochs is of, and of Bochs' what upstream released.
  rm "$apt"/sources/*
  [ ! -e "$keyring" ] || mirror="[signed-by=$keyring] $mirror"
  printf 'deb-src %s %s main\n' "$mirror" "$bochs_release" > "$apt/sources/bochs.list"
  apt-get "${options[@]}" update -qq
  read -r uri name _ hash < <(apt-get "${options[@]}" source -qq --print-uris --download-only bochs |
    grep '\.orig\.tar\.xz')
  uri=${uri#\'}
  /usr/lib/apt/apt-helper "${options[@]}" -qq download-file "${uri%\'}" "$1/$name" "$hash" >&2
}
# build_bochs FOLDER: compiles FOLDER/bochs_*.orig.tar.xz.
build_bochs() {
  local decoder=cpu/decoder/fetchdecode32.cc
  mkdir "$1/bochs"
  tar -xJf "$1"/bochs_*.orig.tar.xz -C "$1/bochs" --strip-components=1
  cd "$1/bochs"
  # Gathers and scatters of AVX-512 whose indices are in zmm16 or higher are no illegal instructions: the fifth bit of
  # the index register is taken for one of a mask that is not there.
  if ! grep -q 'vvv &= 0xf;' "$decoder"; then
    sed -i 's/^\( *\)i->setSibIndex(i->sibIndex() | (vvv & 0x10));/&\n\1vvv \&= 0xf;/' "$decoder"
    grep -q 'vvv &= 0xf;' "$decoder" || { say "Bochs' $decoder is not as known: its fix was not applied"; return 1; }
  fi
  # Without show-ips: it logs from a signal handler, and Bochs hangs if it was just logging something else.
  CFLAGS=-O2 CXXFLAGS=-O2 ./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-fpu \
    --enable-pci --disable-show-ips --enable-repeat-speedups --enable-fast-function-calls --enable-handlers-chaining \
    --enable-all-optimizations --disable-plugins --disable-docbook --disable-debugger --disable-svm --disable-vmx \
    --with-nogui
  make -j "$jobs" bochs
  strip bochs
}
# What was made is remembered by what was asked for and how.
wanted="$bochs_release, ${packages[*]}, $(declare -f fetch build_bochs | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  work=$(mktemp -d "$PWD/build/emulator-make.XXXXXX")
  made=$work/emulator
  say "fetching Bochs' source, a kernel, ${packages[*]}"
  # In shells of their own: set -e holds in them, which it would not within a condition.
  (fetch "$work")
  mkdir -p "$made"
  for deb in "$work"/debs/*.deb; do
    case $(dpkg-deb -f "$deb" Package) in
      libc6) ;;  # the machine's is the one that its loader is of
      linux-image-*) dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$made" --wildcards './boot/vmlinuz-*' ;;
      *) dpkg-deb -x "$deb" "$made" ;;
    esac
  done
  mv "$made"/boot/vmlinuz-* "$made/vmlinuz"
  say "building Bochs, with its log in build/emulator.log"
  code=0
  bash -c "$(declare -f say build_bochs); set -euo pipefail; jobs=$jobs; build_bochs \"\$1\"" -- "$work" \
    >build/emulator.log 2>&1 || code=$?
  [ $code = 0 ] || { tail -n 30 build/emulator.log >&2; exit 1; }
  mv "$work/bochs/bochs" "$made/bochs"
  printf '%s' "$wanted" > "$made/made-by"
  rm -rf "$emulator"
  mv "$made" "$emulator"
  rm -rf "$work"
fi
models=$("$emulator/bochs" -help cpu 2>&1) || true
if ! grep -qx -- "$model" <<<"$models"; then
  say "$model: no CPU model of Bochs; $emulator/bochs -help cpu names them"
  exit 2
fi

# ---- The medium: kernel, tests, and what runs them ------------------------------------------------------------------
work=$(mktemp -d "$PWD/build/avx512.XXXXXX")
root=$work/root
mkdir -p "$root"/{bin,lib,proc,sys,dev,tmp,tests} "$work/medium"
cp "$emulator/bin/busybox" "$root/bin/"
for name in sh cat cut dmesg grep mount poweroff sleep uname; do ln -s busybox "$root/bin/$name"; done
cp build/native/tests/ops/mvlm_ops_test "$root/tests/"
libraries=$(ldd build/native/tests/ops/mvlm_ops_test)
if grep -q 'not found' <<<"$libraries"; then
  say "libraries of build/native/tests/ops/mvlm_ops_test are missing:"
  grep 'not found' <<<"$libraries" >&2
  exit 1
fi
while read -r library; do
  cp -L "$library" "$root/lib/"
done < <(sed -n 's,.*=> \(/.*\) (0x.*,\1,p' <<<"$libraries")
loader=$(sed -n 's,^[[:space:]]*\(/[^ ]*\) (0x.*,\1,p' <<<"$libraries")
mkdir -p "$root$(dirname "$loader")"
cp -L "$loader" "$root$loader"
strip --strip-unneeded "$root"/tests/* "$root"/lib/*.so*
printf '%s' "$filter" > "$root/filter"
# The lines that begin with "guest:" are read below. Of a kernel that starts, only what is wrong is shown.
cat > "$root/init" <<'INIT'
#!/bin/sh
# glibc would copy with "rep movsb" otherwise, see the kernel's parameters.
export PATH=/bin LD_LIBRARY_PATH=/lib GLIBC_TUNABLES=glibc.cpu.hwcaps=-ERMS,-FSRM
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
# No message of the kernel may come within a line of the tests.
dmesg -n 1
cd /tests
filter=$(cat /filter)
echo "guest: Linux $(uname -r), $(grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2-)"
echo "guest: AVX3 tests $(./mvlm_ops_test --gtest_list_tests | grep -c '^  [^ ]*/AVX3')"
echo "guest: chosen tests $(./mvlm_ops_test --gtest_list_tests --gtest_filter="$filter" | grep -c '^  [^ ]')"
./mvlm_ops_test --gtest_color=no --gtest_filter="$filter" 2>&1
echo "guest: exit code $?"
# The serial port is slower than switching off.
sleep 1
poweroff -f
INIT
chmod 755 "$root/init"
(cd "$root" && find . | "$emulator/bin/busybox" cpio -o -H newc 2>/dev/null) > "$work/medium/initrd"
cp "$emulator/vmlinuz" "$emulator/usr/lib/ISOLINUX/isolinux.bin" \
  "$emulator/usr/lib/syslinux/modules/bios/ldlinux.c32" "$work/medium/"
# Bochs has one CPU and its own idea of time, so that the kernel is not to measure either. It has no fast "rep movsb",
# which its models with VNNI announce: kernel and glibc would copy with it, a byte at a time.
parameters='console=ttyS0,115200 quiet loglevel=4 rdinit=/init panic=-1 clearcpuid=fsrm,erms mitigations=off nokaslr'
parameters+=' nosmp norandmaps tsc=reliable clocksource=tsc lpj=1000000 no_timer_check noreplace-smp nowatchdog'
parameters+=' random.trust_cpu=on cryptomgr.notests audit=0 selinux=0 apparmor=0'
cat > "$work/medium/isolinux.cfg" <<CFG
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
 KERNEL vmlinuz
 INITRD initrd
 APPEND $parameters
CFG
LD_LIBRARY_PATH="$emulator/usr/lib/x86_64-linux-gnu:$emulator/lib/x86_64-linux-gnu" "$emulator/usr/bin/xorriso" \
  -as mkisofs -quiet -R -o "$work/medium.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/medium" >"$work/xorriso.log" 2>&1 || { cat "$work/xorriso.log" >&2; exit 1; }

# ---- The emulated machine --------------------------------------------------------------------------------------------
cp "$emulator/usr/share/bochs/BIOS-bochs-latest" "$work/bios"
cp "$emulator/usr/share/vgabios/vgabios.bin" "$work/vgabios"
cat > "$work/bochsrc" <<CFG
megs: 1024
cpu: model=$model, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
romimage: file=bios
vgaromimage: file=vgabios
vga: extension=vbe, update_freq=1
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=medium.iso, status=inserted
boot: cdrom
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=report
debug: action=ignore
com1: enabled=1, mode=file, dev=serial
clock: sync=none, time0=1790000000
display_library: nogui
CFG
say "booting an emulated $model, tests: $filter"
: > "$work/serial"
(cd "$work" && exec "$emulator/bochs" -q -f bochsrc </dev/null >stdout 2>&1) &
bochs=$!
tail -n +1 -f --pid="$bochs" "$work/serial" 2>/dev/null | sed -u 's/\r$//' >&2 &
shown=$!
# Bochs ends when the guest switches itself off, with whatever exit code: what counts is what the guest wrote.
ended=
begun=$SECONDS
while kill -0 "$bochs" 2>/dev/null; do
  if [ $((SECONDS - begun)) -ge "$timeout" ]; then
    ended="it was not done after $timeout seconds (TIMEOUT)"
  elif grep -qa 'Kernel panic' "$work/serial"; then
    ended="its kernel panicked"
  fi
  [ -z "$ended" ] || { kill -KILL "$bochs" 2>/dev/null || true; break; }
  sleep 1
done
wait "$bochs" 2>/dev/null || true
bochs=
wait "$shown" || true
result=build/avx512/$model
rm -rf "$result"
mkdir -p "$result"
sed 's/\r$//' "$work/serial" > "$result/serial"
mv "$work/stdout" "$result/stdout"
[ ! -e "$work/bochs.log" ] || mv "$work/bochs.log" "$result/bochs.log"

# ---- What became of the tests ----------------------------------------------------------------------------------------
fail() { say "FAILED on an emulated $model: $* (see $result)"; exit 1; }
# told WHAT: the number that the guest wrote of it.
told() { sed -n "s/^guest: $1 \([0-9]\+\)\$/\1/p" "$result/serial"; }
[ -z "$ended" ] || fail "$ended"
[ -n "$(told 'exit code')" ] || fail "it went off before the tests ended"
[ "$(told 'AVX3 tests')" -gt 0 ] || fail "Highway finds no AVX3 on this CPU"
[ "$(told 'chosen tests')" -gt 0 ] || fail "no test is called $filter"
[ "$(told 'exit code')" = 0 ] || fail "the tests ended with exit code $(told 'exit code')"
passed=$(sed -n 's/^\[  PASSED  \] \([0-9]\+\) tests\?\.$/\1/p' "$result/serial")
# Tests that were skipped have not passed.
[ "$passed" = "$(told 'chosen tests')" ] || fail "${passed:-0} of $(told 'chosen tests') tests passed"
say "$passed tests passed on an emulated $model (AVX3)"

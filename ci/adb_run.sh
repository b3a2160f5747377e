#!/usr/bin/env bash
# Runs a .pte on an Android phone: pushes the bundle of ci/build_aarch64.sh, the model and the picture, and asks.
#
#   ci/adb_run.sh mobilevlm.pte photo.jpg What is in the picture?
#   ci/adb_run.sh mobilevlm.pte Tell me a story.            without a picture
#   ci/adb_run.sh --dry-run mobilevlm.pte photo.jpg         prints the commands and does nothing
#
# What comes after the model is the picture if there is a file of that name, and else the prompt begins there. What the
# phone has already is not pushed again. The answer goes to stdout and the exit code is llava_main's; 2 also says that
# arguments, files or the phone are not as they must be, and 1 that adb failed.
#
# ADB is the adb to use, ANDROID_SERIAL the phone where several are connected, MVLM_BUNDLE the bundle's .tar.gz. Needs
# Android 7 or newer, for adb to hand exit codes on.
set -euo pipefail
tree=$(cd "$(dirname "$0")/.." && pwd)
bundle=${MVLM_BUNDLE:-$tree/build/mvlm-aarch64.tar.gz}
adb=${ADB:-adb}
remote=/data/local/tmp/mvlm
say() { printf 'adb_run: %s\n' "$*" >&2; }
refuse() { say "error: $*"; exit 2; }
usage() { sed -n '4,6s/^#//p' "${BASH_SOURCE[0]}" >&2; }

# ---- Arguments -------------------------------------------------------------------------------------------------------
dry_run=
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=yes; shift ;;
  -*) usage; refuse "$1 is no option of ci/adb_run.sh; it has --dry-run and --help" ;;
esac
[ $# -ge 1 ] || { usage; refuse "no model was given"; }
model=$1
shift
[ -f "$model" ] || refuse "$model is not a file; python -m mvlm.export makes a .pte"
picture=
if [ -n "${1:-}" ] && [ -f "$1" ]; then
  picture=$1
  shift
else
  # A misspelt name is not asked about as if it were a question.
  case ${1:-} in
    *.jpg | *.jpeg | *.png | *.JPG | *.JPEG | *.PNG) refuse "$1 is not a file; give a JPEG or PNG, or a prompt" ;;
  esac
fi
prompt=$*
if [ -z "$prompt" ]; then
  [ -n "$picture" ] || refuse "without a picture a prompt is needed: ci/adb_run.sh $model Tell me a story."
  prompt="What is in the picture?"
fi
[ -f "$bundle" ] || refuse "$bundle is not there; ci/build_aarch64.sh makes it"

# ---- The phone -------------------------------------------------------------------------------------------------------
if [ -z "$dry_run" ]; then
  command -v "$adb" >/dev/null ||
    refuse "$adb was not found; install it (Debian: apt-get install adb) or set ADB to the path of one"
  devices=$("$adb" devices </dev/null) || { say "error: '$adb devices' failed"; exit 1; }
  devices=$(printf '%s\n' "$devices" | tr -d '\r' | awk 'NR > 1 && NF >= 2 {print $1, $2}')
  serials=$(printf '%s\n' "$devices" | awk '$2 == "device" {print $1}')
  devices=${devices//$'\n'/, }
  if [ -n "${ANDROID_SERIAL:-}" ]; then
    printf '%s\n' "$serials" | grep -qFx -- "$ANDROID_SERIAL" ||
      refuse "ANDROID_SERIAL is $ANDROID_SERIAL, and adb sees: ${devices:-no phone}"
  elif [ -z "$serials" ]; then
    refuse "adb sees ${devices:-no phone}; connect one, turn USB debugging on, and allow this computer on its screen"
  elif [ "$(printf '%s\n' "$serials" | wc -l)" != 1 ]; then
    refuse "adb sees several phones; set ANDROID_SERIAL to one of: ${serials//$'\n'/, }"
  else
    export ANDROID_SERIAL=$serials
  fi
fi

# A word for the phone's shell.
quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# Runs adb, or prints the command.
run_adb() {
  if [ -n "$dry_run" ]; then
    printf '%q' "$adb"
    printf ' %q' "$@"
    printf '\n'
  else
    "$adb" "$@" </dev/null
  fi
}

# change COMMAND: on the phone, where failing ends everything.
change() { run_adb shell "$1" >&${stdout:-2} || { say "error: the phone could not: $1"; exit 1; }; }

# has NAME SHA256: whether what was pushed as NAME is still there and is that. The hash is written last.
has() {
  [ -z "$dry_run" ] || return 1
  [ "$(run_adb shell "[ -e $remote/$1 ] && cat $remote/$1.sha256" 2>/dev/null | tr -d '\r\n')" = "$2" ]
}

# push LOCAL NAME SHA256: LOCAL, a file or a folder, as NAME; under another name first, so that it is there whole or not.
push() {
  say "pushing $1"
  change "mkdir -p $remote && rm -rf $remote/$2.part $remote/$2.sha256"
  run_adb push "$1" "$remote/$2.part" >&${stdout:-2} ||
    { say "error: could not push $1; is there room in the phone's /data?"; exit 1; }
  change "rm -rf $remote/$2 && mv $remote/$2.part $remote/$2 && echo $3 > $remote/$2.sha256"
}
sum() { sha256sum < "$1" | cut -d ' ' -f 1; }
stdout=
[ -z "$dry_run" ] || stdout=1

if [ -z "$dry_run" ]; then
  abi=$(run_adb shell getprop ro.product.cpu.abi | tr -d '\r')
  [ "$abi" = arm64-v8a ] || refuse "the phone's processor is ${abi:-unknown}; the bundle is for arm64-v8a"
fi

# ---- Push ------------------------------------------------------------------------------------------------------------
bundle_sum=$(sum "$bundle")
if ! has bundle "$bundle_sum"; then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  tar -C "$unpacked" -xzf "$bundle" || refuse "$bundle is no .tar.gz; ci/build_aarch64.sh makes it anew"
  push "$unpacked/mvlm-aarch64" bundle "$bundle_sum"
  change "chmod 755 $remote/bundle/llava_main"
fi
model_sum=$(sum "$model")
has model.pte "$model_sum" || push "$model" model.pte "$model_sum"
if [ -n "$picture" ]; then
  picture_sum=$(sum "$picture")
  has picture "$picture_sum" || push "$picture" picture "$picture_sum"
fi

# ---- Run -------------------------------------------------------------------------------------------------------------
command="cd $remote && ./bundle/llava_main --model_path model.pte --weight_cache $remote/cache --temperature 0"
[ -z "$picture" ] || command+=" --image_path picture"
run_adb shell "$command --prompt=$(quoted "$prompt")"

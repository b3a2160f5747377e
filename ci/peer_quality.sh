#!/usr/bin/env bash
# What do llama.cpp's types cost? Quantizes R, the gauge's language model (tests/real), with llama.cpp's own programs, and
# has llama-perplexity compare each with F16 on the text and the windows that python -m mvlm.runtime.perplexity reads.
# "imatrix" is llama.cpp's calibration, here on the gauge's calibration text, all of it.
#
#   ci/peer_quality.sh                       a table, and build/quality/llama.json
#   ci/peer_quality.sh FILE.json
#   JOBS=1 nice ci/peer_quality.sh           on one core; PEER_HOME=DIR as for ci/peer_llama_cpp.sh
#
# What is there already is not made anew, unless what it is made of is newer. Needs a C++ compiler, and 1.4 GB in
# build/quality/llama and 0.6 GB in ~/.cache/mvlm-peer; 50 minutes with JOBS=1, 15 of them for building llama.cpp.
set -euo pipefail
case ${1:-} in
  -*) sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2 ;;
esac
ci=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:-$ci/../build/quality/llama.json}")
cd "$ci/.."
# Names of llama-quantize; with "-imatrix" behind it, each weight counts as much as its input does on that text.
types=(Q4_0 Q4_0-imatrix Q4_1 Q4_1-imatrix Q4_K_S Q4_K_S-imatrix Q4_K_M Q4_K_M-imatrix Q5_K_M Q5_K_M-imatrix Q8_0)

# shellcheck source=ci/peer_build.sh
. ci/peer_build.sh
.venv/bin/python -c 'import gguf, mvlm.runtime' 2>/dev/null || ci/setup.sh test
.venv/bin/python tests/real/make_gauge.py --gguf >&2
build_llama_cpp llama-quantize llama-imatrix llama-perplexity
bin=$home/build/bin
f16=build/real/R-f16.gguf
texts=build/real/texts
folder=build/quality/llama
mkdir -p "$folder" "$(dirname "$out")"

# made FILE INPUT...: FILE is there, and no input is newer.
made() {
  local input file=$1
  [ -f "$file" ] || return 1
  for input in "${@:2}"; do
    [ ! "$input" -nt "$file" ] || return 1
  done
}

# run LOG COMMAND...: what it says goes to LOG; its end is shown if it fails.
run() {
  local log=$1
  "${@:2}" >"$log.part" 2>&1 || { tail -n 30 "$log.part" >&2; exit 1; }
  mv "$log.part" "$log"
}

imatrix=$folder/imatrix.gguf
if ! made "$imatrix" "$f16" "$texts/calibration.txt"; then
  say "making $imatrix"
  run "$folder/imatrix.log" "$bin/llama-imatrix" -m "$f16" -f "$texts/calibration.txt" -o "$folder/imatrix.part.gguf" \
    -c 512 -t "$jobs" --no-ppl
  mv "$folder/imatrix.part.gguf" "$imatrix"
fi
base=$folder/f16.kld
if ! made "$base" "$f16" "$texts/evaluation.txt"; then
  say "reading $texts/evaluation.txt in F16"
  run "$folder/f16.log" "$bin/llama-perplexity" -m "$f16" -f "$texts/evaluation.txt" -c 512 -t "$jobs" \
    --kl-divergence-base "$base.part"
  mv "$base.part" "$base"
fi
for name in "${types[@]}"; do
  model=$folder/$name.gguf
  by=()
  [ "$name" = "${name%-imatrix}" ] || by=(--imatrix "$imatrix")
  if ! made "$model" "$f16" "${by[@]:1}"; then
    say "making $model"
    run "$folder/$name.quantize.log" "$bin/llama-quantize" "${by[@]}" "$f16" "$model.part" "${name%-imatrix}" "$jobs"
    mv "$model.part" "$model"
  fi
  if ! made "$folder/$name.log" "$model" "$base"; then
    say "comparing $name with F16"
    # Not repacked, since AMX, for which the weights would be, ends in "illegal instruction" on virtual machines that
    # report it without having it. Inputs are rounded to 8 bits either way.
    run "$folder/$name.log" "$bin/llama-perplexity" -m "$model" -c 512 -t "$jobs" --no-repack \
      --kl-divergence --kl-divergence-base "$base"
  fi
done
PYTHONPATH=tests/real .venv/bin/python ci/peer_quality.py "$folder" "${types[@]}" --out "$out"
say "$out: ci/quality_curve.py draws it"

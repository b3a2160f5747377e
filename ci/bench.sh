#!/usr/bin/env bash
# How fast is it, and how much faster than llama.cpp? Makes a .pte of MobileVLM-1.7B's shapes with random weights and
# measures it, beside the limits of this machine; and beside llama.cpp, if ci/peer_llama_cpp.sh has built it.
# The machine should do nothing else. Arguments go to python -m mvlm.runtime.bench.
#
#   ci/bench.sh                                 all cores, 5 runs of everything
#   ci/bench.sh --threads 1,2 --repeat 9
#   MODEL=mobilevlm-v2-1.7b ci/bench.sh         the other projector
#   PTE=my.pte ci/bench.sh                      a .pte that is there already
#   PEER_HOME=none ci/bench.sh                  without llama.cpp
#
# Writes build/bench/MODEL.json and MODEL.svg.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '== %s\n' "$*" >&2; }

model=${MODEL:-mobilevlm-1.7b}
case $model in
  mobilevlm-1.7b) projector=ldp ;;
  mobilevlm-v2-1.7b) projector=ldpv2 ;;
  *) projector= ;;
esac

for argument in "$@"; do
  case $argument in
    -h | --help) exec .venv/bin/python -m mvlm.runtime.bench --help ;;
  esac
done
ci/setup.sh
mkdir -p build/bench
pte=${PTE:-build/bench/$model.pte}
if [ -z "${PTE:-}" ]; then
  if [ -f "$pte" ] &&
     [ -z "$(find export ops -name __pycache__ -prune -o -type f -name '*.py' -newer "$pte" -print)" ]
  then
    say "$pte is newer than the exporter: not exporting again"
  else
    say "exporting $pte"
    .venv/bin/python -m mvlm.export --random-weights "$model" --pte-name "$pte"
  fi
fi

# llama.cpp with what is fastest there: 4-bit weights Q4_0 in the language model; of the types that a vision encoder may
# have, all are measured and the best one counts, stage by stage.
peer=${PEER_HOME:-$HOME/.cache/mvlm-peer}
bin=$peer/build/bin
llm=$peer/models/llm-q4_0.gguf
system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
system+=" and polite answers to the user's questions."
question="Who is the author of this book? Answer the question using a single word or phrase."
against=()
quoted() { printf '%q' "$1"; }
if [ -z "$projector" ]; then
  say "llama.cpp: there are no models of the shapes of $model for it; measuring without"
elif [ ! -x "$bin/llama-bench" ] || [ ! -x "$bin/llama-mtmd-cli" ] || [ ! -x "$peer/encbench" ] || [ ! -f "$llm" ]; then
  say "llama.cpp is not in $peer; ci/peer_llama_cpp.sh builds it there. Measuring without"
else
  bench="$(quoted "$bin/llama-bench") -m $(quoted "$llm") -t {threads} -r 1 -o json"
  against+=(--against "llama.cpp Q4_0@prefill: $bench -p {prompt_tokens} -n 0")
  against+=(--against "llama.cpp Q4_0@decode: $bench -p 0 -n {decode_tokens} -d {prompt_tokens}")
  for dtype in f16 bf16 q8_0; do
    mmproj=$peer/models/mmproj-$projector-$dtype-fl23.gguf
    [ -f "$mmproj" ] || continue
    label="llama.cpp ${dtype^^}"
    against+=(--against "$label@encode: $(quoted "$peer/encbench") $(quoted "$llm") $(quoted "$mmproj") {image} {threads} 2")
    # Question and template are its own; they take as many positions as the text beside our picture, 67.
    answer="$(quoted "$bin/llama-mtmd-cli") -m $(quoted "$llm") --mmproj $(quoted "$mmproj") --image {image}"
    answer+=" -sys \"$system\" -p \"$question\" --chat-template vicuna -c 768 -n {decode_tokens} --ignore-eos"
    answer+=" --temp 0 -t {threads} --perf -lv 4"
    against+=(--against "$label@load,first-token,memory: $answer")
    # Takes least: weights that are laid out anew are not in memory twice.
    [ "$dtype" != q8_0 ] || against+=(--against "$label no mmap@memory: $answer -lm none")
  done
fi

exec .venv/bin/python -m mvlm.runtime.bench "$pte" --json "build/bench/$model.json" --plot "build/bench/$model.svg" \
  "${against[@]}" "$@"

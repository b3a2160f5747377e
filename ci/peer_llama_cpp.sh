#!/usr/bin/env bash
# Builds llama.cpp, which ci/bench.sh compares with, and makes models of MobileVLM-1.7B's shapes with random weights for
# it. The source is the one in PyPI's llama-cpp-python, so that no other server is needed. A second call finds all done.
#
#   ci/peer_llama_cpp.sh              about 8 GB in ~/.cache/mvlm-peer, and 10 minutes on 2 cores
#   PEER_HOME=DIR ci/peer_llama_cpp.sh
#
# Needs a C++ compiler and python3 with venv. What comes of it:
#   build/bin/llama-bench, build/bin/llama-mtmd-cli, encbench       programs
#   models/llm-q4_0.gguf                                            the language model, at llama.cpp's fastest type
#   models/mmproj-{ldp,ldpv2}-{f16,bf16,q8_0}-fl23.gguf             the tower and the projector of V1 and of V2
set -euo pipefail
ci=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=ci/peer_build.sh
. "$ci/peer_build.sh"

build_llama_cpp llama-bench llama-mtmd-cli llama-quantize
cd "$home"
mkdir -p models
if [ ! -x encbench ]; then
  say "building encbench"
  "${CXX:-g++}" -std=c++17 -O2 "$ci/peer_encode.cpp" -o encbench \
    -I"$source/include" -I"$source/ggml/include" -I"$source/tools/mtmd" \
    -Lbuild/bin -lmtmd -lllama -lggml -lggml-base -lggml-cpu -Wl,-rpath,"$home/build/bin"
fi

if [ ! -f models/llm-q4_0.gguf ]; then
  if [ ! -f models/llm-f16.gguf ]; then
    say "making models/llm-f16.gguf"
    venv/bin/python "$ci/peer_gguf.py" llm models/llm-f16.gguf
  fi
  say "making models/llm-q4_0.gguf"
  build/bin/llama-quantize models/llm-f16.gguf models/llm-q4_0.part Q4_0 "$jobs" >build.log 2>&1 ||
    { tail -n 30 build.log >&2; exit 1; }
  mv models/llm-q4_0.part models/llm-q4_0.gguf
fi
for kind in ldp ldpv2; do
  for dtype in F16 BF16 Q8_0; do
    model=models/mmproj-$kind-${dtype,,}-fl23.gguf
    [ -f "$model" ] && continue
    say "making $model"
    venv/bin/python "$ci/peer_gguf.py" mmproj "$kind" "$dtype" "$model"
  done
done
say "ready: $home; ci/bench.sh compares with it"

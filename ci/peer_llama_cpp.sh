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
home=${PEER_HOME:-$HOME/.cache/mvlm-peer}
release=0.3.36 # of llama-cpp-python
jobs=${JOBS:-$(nproc)}
say() { printf '== %s\n' "$*" >&2; }

mkdir -p "$home/models"
cd "$home"
if [ ! -x venv/bin/python ]; then
  say "making $home/venv"
  python3 -m venv venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
venv/bin/python -m pip install --quiet numpy "gguf==0.19.0" "cmake>=3.21,<4" ninja
export PATH="$home/venv/bin:$PATH"

if [ ! -d lcpp ]; then
  say "fetching llama-cpp-python $release"
  venv/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest . "llama-cpp-python==$release"
  rm -rf unpacked
  mkdir unpacked
  tar -xzf "llama_cpp_python-$release.tar.gz" -C unpacked
  mv "unpacked/llama_cpp_python-$release" lcpp
  rmdir unpacked
fi
source=lcpp/vendor/llama.cpp

if [ ! -x build/bin/llama-mtmd-cli ] || [ ! -x build/bin/llama-bench ] || [ ! -x build/bin/llama-quantize ]; then
  say "building llama.cpp"
  cmake -S "$source" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >build.log
  cmake --build build --parallel "$jobs" --target llama-bench llama-mtmd-cli llama-quantize >>build.log ||
    { tail -n 30 build.log >&2; exit 1; }
fi
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

# shellcheck shell=bash
# Fetches and builds llama.cpp for ci/peer_llama_cpp.sh and ci/peer_quality.sh, which source this. The source is the one
# in PyPI's llama-cpp-python, so that no other server is needed. A second call finds all done.
#
#   home                       where everything goes: PEER_HOME, or ~/.cache/mvlm-peer
#   source                     llama.cpp's source in there
#   say TEXT...                a line on stderr
#   build_llama_cpp TARGET...  makes home's venv (numpy, gguf, cmake, ninja) and build/bin/TARGET with JOBS jobs
release=0.3.36 # of llama-cpp-python
jobs=${JOBS:-$(nproc)}
home=${PEER_HOME:-$HOME/.cache/mvlm-peer}
mkdir -p "$home"
home=$(cd "$home" && pwd)
# shellcheck disable=SC2034 # for those who source this
source=$home/lcpp/vendor/llama.cpp
say() { printf '== %s\n' "$*" >&2; }

build_llama_cpp() ( # in a subshell: PATH and the working directory stay the caller's
  cd "$home" || exit
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

  for target in "$@"; do
    [ ! -x "build/bin/$target" ] || continue
    say "building llama.cpp: $*"
    cmake -S "$source" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
      -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
      -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >build.log
    cmake --build build --parallel "$jobs" --target "$@" >>build.log || { tail -n 30 build.log >&2; exit 1; }
    break
  done
)

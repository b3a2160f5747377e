#!/usr/bin/env bash
# Sets everything up and runs every test: the C++ ones with CTest, the Python ones with pytest.
# The cross-build for 64-bit Arm is made and tested under qemu as well, unless the first argument is --no-aarch64.
# Other arguments go to pytest: ci/test.sh -k checkpoint, ci/test.sh -m large.
set -euo pipefail
cd "$(dirname "$0")/.."

aarch64=yes
pytest=()
if [ "${1:-}" = --no-aarch64 ]; then
  shift
  aarch64=
  pytest=(--ignore=tests/aarch64)
fi

ci/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"

cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DMVLM_BUILD_TESTS=ON >/dev/null
cmake --build build/native
ctest --test-dir build/native --output-on-failure --no-tests=error
if [ -n "$aarch64" ]; then
  ci/build_aarch64.sh
  ctest --test-dir build/aarch64 --label-regex aarch64 --parallel 2 --output-on-failure --no-tests=error
else
  printf '== NOT TESTED: 64-bit Arm, because of --no-aarch64\n' >&2
fi
ruff check .
python -m pytest "${pytest[@]}" "$@"

#!/usr/bin/env bash
# Sets everything up and runs every test: the C++ ones with CTest, the Python ones with pytest.
# Arguments go to pytest: ci/test.sh -k checkpoint, ci/test.sh -m large.
set -euo pipefail
cd "$(dirname "$0")/.."

ci/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"

cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DMVLM_BUILD_TESTS=ON >/dev/null
cmake --build build/native
ctest --test-dir build/native --output-on-failure --no-tests=error
ruff check .
python -m pytest "$@"

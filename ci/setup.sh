#!/usr/bin/env bash
# Everything that demo and tests need, from a bare Debian or Ubuntu machine: missing apt packages, .venv in the clone,
# and an editable install of mvlm, which also builds the C++ side. A second call finds all done and is quick.
#
#   ci/setup.sh          what export and llava_main need
#   ci/setup.sh test     and what the tests need
set -euo pipefail
cd "$(dirname "$0")/.."

apt_packages=(g++ python3 python3-venv python3-dev libhwy-dev libsentencepiece-dev libcli11-dev nlohmann-json3-dev
              libjpeg-dev libpng-dev)
[ "${1:-}" = test ] && apt_packages+=(libgtest-dev)

say() { printf '== %s\n' "$*" >&2; }

# ---- Debian packages ------------------------------------------------------------------------------------------------
. ci/apt.sh
install_packages "${apt_packages[@]}"

# ---- Python ---------------------------------------------------------------------------------------------------------
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; then
  say "$("$python" --version) is not supported: mvlm needs Python 3.11 to 3.14; set PYTHON to one of them"
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  say "making .venv"
  "$python" -m venv .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { .venv/bin/python -m pip "$@"; }

# What was installed is remembered by the hash of all that the install depends on: what is compiled, and which Python
# files there are, for an editable install has a list of them.
extras=${1:+[$1]}
stamp=.venv/mvlm-setup${1:+-$1}
state=$( (find pyproject.toml CMakeLists.txt ops runner runtime -name __pycache__ -prune -o -type f \
            ! -path 'runtime/*.py' -print0 | sort -z |
          xargs -0 sha256sum; find export runtime -name '*.py' | sort) | sha256sum)
# What was installed for the tests has all that is installed without.
if ! grep -qsFx -- "$state" "$stamp" .venv/mvlm-setup-test; then
  # torch first and alone: no other requirement may choose its version.
  say "installing torch"
  pip install --quiet torch==2.13.0
  say "installing executorch and the build tools"
  pip install --quiet executorch==1.5.1 "scikit-build-core>=0.11" "cmake>=3.28,<5" ninja
  say "installing mvlm, building its C++ side"
  # Without isolation, so that what is built and what runs is the same executorch, fetched once.
  pip install --quiet --no-build-isolation --editable ".$extras"
  printf '%s' "$state" > "$stamp"
fi

"""Where the cross-build is, on which CPUs it is run, and how its answers are read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
BUILD = TREE / "build" / "aarch64"
SYSROOT = TREE / "build" / "aarch64-sysroot"
BUNDLE = TREE / "build" / "mvlm-aarch64.tar.gz"
QEMU = "qemu-aarch64-static"

#: With dotprod and i8mm; with dotprod; with neither. Not plain max: qemu 7.2 computes SME's outer products wrongly.
I8MM = "max,sme=off"
DOTPROD = "neoverse-n1"
NEON = "cortex-a72"
CPUS = (I8MM, DOTPROD, NEON)

RunArm = Callable[..., subprocess.CompletedProcess]


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(TREE)} is not there; run ci/build_aarch64.sh, or ci/test.sh")
    return path


def tokens(stats: Path) -> list[int]:
    """The answer's tokens in the file that ``--stats_path`` wrote."""
    found = json.loads(stats.read_text())["tokens"]
    assert found
    return found

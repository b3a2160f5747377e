"""Finds the native test program of the runner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def stage_dump() -> Path:
    """``mvlm_stage_dump``, which shows single stages of the runner (tests/runner/stage_dump.cpp)."""
    build = Path(os.environ.get("MVLM_NATIVE_BUILD_DIR", REPOSITORY / "build" / "native"))
    program = build / "tests" / "runner" / "mvlm_stage_dump"
    if not program.exists():
        pytest.fail(
            f"{program} is not built. Run ci/test.sh, or name your build folder in MVLM_NATIVE_BUILD_DIR.",
            pytrace=False,
        )
    return program

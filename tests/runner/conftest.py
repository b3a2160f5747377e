"""Finds what was built of the runner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native_build() -> Path:
    """The build folder with everything in it."""
    build = Path(os.environ.get("MVLM_NATIVE_BUILD_DIR", REPOSITORY / "build" / "native"))
    if not (build / "tests" / "runner" / "mvlm_stage_dump").exists():
        pytest.fail(
            f"{build} is not built. Run ci/test.sh, or name your build folder in MVLM_NATIVE_BUILD_DIR.", pytrace=False
        )
    return build


@pytest.fixture(scope="session")
def stage_dump(native_build: Path) -> Path:
    """``mvlm_stage_dump``, which shows single stages of the runner (tests/runner/stage_dump.cpp)."""
    return native_build / "tests" / "runner" / "mvlm_stage_dump"

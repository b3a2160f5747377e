"""Runs ``llava_main``, with a folder of its own for what it keeps between runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llava_run import QUESTION

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder for caches while these tests run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def run_pte(llava_main: Path, tmp_path: Path) -> Run:
    """Runs ``llava_main`` in an empty folder. Flags as keywords; greedy sampling by default."""
    folder = tmp_path / "run"
    folder.mkdir()

    def call(*arguments: str | bytes, **flags: object) -> subprocess.CompletedProcess:
        flags = {"prompt": QUESTION, "temperature": 0} | flags
        command: list[object] = [llava_main]
        for name, value in flags.items():
            if value is not None:
                command += [f"--{name}", value if isinstance(value, bytes) else str(value)]
        return subprocess.run([*command, *arguments], capture_output=True, cwd=folder, timeout=300)

    return call


@pytest.fixture
def run(run_pte: Run, demo_pte: Path) -> Run:
    """The same with the demo model."""

    def call(*arguments: str | bytes, **flags: object) -> subprocess.CompletedProcess:
        return run_pte(*arguments, **{"model_path": demo_pte} | flags)

    return call

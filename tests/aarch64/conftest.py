"""Runs the cross-built ``llava_main`` under qemu, on three kinds of 64-bit Arm CPUs.

Everything but the tests of ci/adb_run.sh needs what ci/build_aarch64.sh makes, and is skipped without.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from aarch64_run import BUNDLE, I8MM, QEMU, RunArm, need


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked bundle's folder."""
    folder = tmp_path_factory.mktemp("bundle with a space")
    subprocess.run(["tar", "-C", folder, "-xzf", need(BUNDLE)], check=True)
    return folder / "mvlm-aarch64"


@pytest.fixture
def run_arm(bundle: Path, tmp_path: Path) -> RunArm:
    """Runs the bundle's ``llava_main`` on a CPU. Flags as keywords; greedy sampling and no weight cache by default."""

    def call(
        *arguments: object, cpu: str = I8MM, emulator: tuple[str, ...] = (), **flags: object
    ) -> subprocess.CompletedProcess:
        command: list[object] = [QEMU, "-cpu", cpu, *emulator, bundle / "llava_main", *arguments]
        flags = {"temperature": 0, "weight_cache": "off", "cpu_threads": 2} | flags
        for name, value in flags.items():
            command += [f"--{name}", value]
        return subprocess.run([str(part) for part in command], capture_output=True, cwd=tmp_path, timeout=300)

    return call

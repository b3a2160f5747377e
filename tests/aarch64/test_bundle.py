"""The bundle for 64-bit Arm starts anywhere, also where there is nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from aarch64_run import I8MM, QEMU, RunArm

QUESTION = "What color is the circle?"


def elf_files(bundle: Path) -> list[Path]:
    return [bundle / "llava_main", *sorted((bundle / "lib").iterdir())]


def readelf(*arguments: object) -> str:
    command = ["aarch64-linux-gnu-readelf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def test_segments_fit_large_pages(bundle: Path) -> None:
    """Kernels with pages of 16 or 64 KiB can map every file."""
    for path in elf_files(bundle):
        alignments = [int(line.split()[-1], 16) for line in readelf("-lW", path).splitlines() if " LOAD " in line]
        assert alignments, path
        assert all(alignment % 65536 == 0 for alignment in alignments), path


def test_holds_all_that_is_needed(bundle: Path) -> None:
    there = {path.name for path in (bundle / "lib").iterdir()}
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-dW", *elf_files(bundle))))
    assert "libc.so.6" in needed
    assert needed <= there
    # And no more, but for the program and the loader.
    assert there - needed <= {"llava_main.bin", "ld-linux-aarch64.so.1"}
    assert "(NEEDED)" not in readelf("-dW", bundle / "llava_main")
    assert "INTERP" not in readelf("-lW", bundle / "llava_main")


def test_licences(bundle: Path) -> None:
    names = {path.name for path in (bundle / "licenses").iterdir()}
    assert {"mvlm", "executorch", "libc6", "libstdc++6", "libsentencepiece0"} <= names


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_page_sizes(run_arm: RunArm, demo_pte: Path, sample_image: Path, page: int) -> None:
    """From another folder; the emulator says pages are so large, although the host's are not."""
    result = run_arm(emulator=("-p", str(page)), model_path=demo_pte, image_path=sample_image, prompt=QUESTION)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == b"red\n"


def test_through_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "llava_main"
    link.symlink_to(bundle / "llava_main")
    result = subprocess.run([QEMU, "-cpu", I8MM, link, "--version"], capture_output=True, cwd=tmp_path, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("llava_main ")


def test_exit_code_and_message(run_arm: RunArm) -> None:
    result = run_arm(model_path="none.pte", prompt="x")
    assert result.returncode == 2
    assert result.stderr.startswith(b"llava_main: error: ")
    assert b"none.pte" in result.stderr


@pytest.mark.parametrize("name", ["ld-linux-aarch64.so.1", "llava_main.bin"])
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "other"])
def test_broken_bundle(bundle: Path, tmp_path: Path, name: str, fault: str) -> None:
    broken = tmp_path / "broken"
    (broken / "lib").mkdir(parents=True)
    shutil.copy(bundle / "llava_main", broken)
    for path in (bundle / "lib").iterdir():
        (broken / "lib" / path.name).symlink_to(path)
    victim = broken / "lib" / name
    content = victim.read_bytes()
    victim.unlink()
    if fault != "missing":
        victim.write_bytes({"empty": b"", "cut": content[:100], "other": b"#!/bin/sh\n" * 50}[fault])
    result = subprocess.run([QEMU, "-cpu", I8MM, broken / "llava_main", "--version"], capture_output=True, text=True)
    assert result.returncode in (2, 127), result.stderr  # ours; that of ld.so
    assert str(victim) in result.stderr


def test_empty_root(bundle: Path, demo_pte: Path, sample_image: Path, tmp_path: Path) -> None:
    """In a root file system that holds nothing but the bundle, model and picture, the emulator, and what Linux tells
    about its processors."""
    enter = ["chroot"] if os.geteuid() == 0 else ["unshare", "-r", "chroot"]
    if subprocess.run([*enter, "/", "/bin/true"], capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: the bundle in an empty root; this machine allows neither chroot nor unshare -r")
    root = tmp_path / "root"
    shutil.copytree(bundle, root / "mvlm")
    shutil.copy(demo_pte, root / "model.pte")
    shutil.copy(sample_image, root / "picture.jpg")
    shutil.copy(shutil.which(QEMU), root / "qemu")
    for path in ("proc/cpuinfo", "sys/devices/system/cpu/possible", "sys/devices/system/cpu/present"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(Path("/", path).read_text())
    command = [*enter, root, "/qemu", "-cpu", I8MM, "/mvlm/llava_main", "--model_path", "/model.pte"]
    command += ["--image_path", "/picture.jpg", "--prompt", QUESTION, "--temperature", "0", "--weight_cache", "off"]
    result = subprocess.run(command, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == b"red\n"

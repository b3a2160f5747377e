"""ci/adb_run.sh, with a stand-in for adb whose phones are folders and whose llava_main is a script."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from aarch64_run import TREE

# A phone's shell runs its command with the phone's /data/local/tmp in a folder; what is pushed goes there too.
ADB = r"""#!/usr/bin/env bash
set -eu
printf '%s\n' "$*" >> "$PHONES/log"
in_phone() { printf '%s' "${1//\/data\/local\/tmp/$PHONES/$ANDROID_SERIAL}"; }
case $1 in
  devices) printf 'List of devices attached\n'; cat "$PHONES/devices"; printf '\n' ;;
  push)
    [ ! -e "$PHONES/full" ] || { echo "adb: error: failed to copy: No space left on device" >&2; exit 1; }
    cp -r "$2" "$(in_phone "$3")" ;;
  shell)
    shift
    if [ "$*" = "getprop ro.product.cpu.abi" ]; then cat "$PHONES/abi"; exit; fi
    sh -c "$(in_phone "$*")" ;;
  *) exit 9 ;;
esac
"""

LLAVA_MAIN = r"""#!/bin/sh
for word; do printf '<%s>' "$word"; done
[ ! -e fails ] || exit 130
"""

Call = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def phones(tmp_path: Path) -> Path:
    """The stand-in's folder, with one phone, ``first``."""
    folder = tmp_path / "phones"
    (folder / "first").mkdir(parents=True)
    (folder / "second").mkdir()
    (folder / "devices").write_text("first\tdevice\n")
    (folder / "abi").write_text("arm64-v8a\r\n")
    (folder / "adb").write_text(ADB)
    (folder / "adb").chmod(0o755)
    return folder


@pytest.fixture
def call(phones: Path, tmp_path: Path) -> Call:
    """Runs the script in a folder with a model, a picture, and ``it's a "picture".png``."""
    write_bundle(tmp_path / "bundle.tar.gz", LLAVA_MAIN)
    (tmp_path / "model.pte").write_bytes(b"model")
    (tmp_path / "picture.jpg").write_bytes(b"picture")
    (tmp_path / """it's a "picture".png""").write_bytes(b"other")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        variables = {"PATH": "/usr/bin:/bin", "PHONES": phones, "ADB": phones / "adb"}
        variables |= {"MVLM_BUNDLE": tmp_path / "bundle.tar.gz"} | environment
        return subprocess.run(
            [TREE / "ci" / "adb_run.sh", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={name: str(value) for name, value in variables.items()},
            timeout=60,
        )

    return run


def write_bundle(path: Path, program: str) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("mvlm-aarch64/llava_main")
        member.size = len(program)
        archive.addfile(member, io.BytesIO(program.encode()))


def pushes(phones: Path) -> int:
    count = (phones / "log").read_text().count("push ")
    (phones / "log").write_text("")
    return count


def check_refused(result: subprocess.CompletedProcess, *expected: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    for text in expected:
        assert text in result.stderr.splitlines()[-1]


def test_asks(call: Call, phones: Path) -> None:
    result = call("model.pte", "picture.jpg", "What", "is this?")
    assert result.returncode == 0, result.stderr
    assert "<--model_path><model.pte>" in result.stdout
    assert result.stdout.endswith("<--temperature><0><--image_path><picture><--prompt=What is this?>")
    remote = phones / "first" / "mvlm"
    assert (remote / "model.pte").read_bytes() == b"model"
    assert (remote / "picture").read_bytes() == b"picture"
    assert not list(remote.glob("*.part"))


def test_without_picture(call: Call, phones: Path) -> None:
    result = call("model.pte", "Tell me a story.")
    assert result.stdout.endswith("<--temperature><0><--prompt=Tell me a story.>")
    assert not (phones / "first" / "mvlm" / "picture").exists()


@pytest.mark.parametrize("prompt", ["it's", 'say "a" $HOME `id` \\ ; exit 3', "two  spaces", "ä\nb", "*", "--help"])
def test_prompt_is_not_read_by_a_shell(call: Call, prompt: str) -> None:
    result = call("model.pte", """it's a "picture".png""", prompt)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"<--prompt={prompt}>")


def test_pushes_what_changed(call: Call, phones: Path, tmp_path: Path) -> None:
    call("model.pte", "picture.jpg")
    assert pushes(phones) == 3
    call("model.pte", "picture.jpg", "Again?")
    assert pushes(phones) == 0
    (tmp_path / "model.pte").write_bytes(b"MODEL")
    call("model.pte", "picture.jpg")
    assert pushes(phones) == 1
    assert (phones / "first" / "mvlm" / "model.pte").read_bytes() == b"MODEL"
    write_bundle(tmp_path / "bundle.tar.gz", LLAVA_MAIN + "echo new\n")
    assert call("model.pte", "picture.jpg").stdout.endswith("new\n")
    assert pushes(phones) == 1
    (phones / "first" / "mvlm" / "picture").unlink()
    call("model.pte", "picture.jpg")
    assert pushes(phones) == 1


def test_exit_code(call: Call, phones: Path) -> None:
    assert call("model.pte", "picture.jpg").returncode == 0
    (phones / "first" / "mvlm" / "fails").touch()
    assert call("model.pte", "picture.jpg").returncode == 130


def test_failed_push(call: Call, phones: Path) -> None:
    assert call("model.pte", "picture.jpg").returncode == 0
    (phones / "full").touch()
    result = call("model.pte", """it's a "picture".png""")
    check_refused(result, "could not push", "picture", "room", code=1)
    (phones / "full").unlink()
    assert call("model.pte", "picture.jpg").returncode == 0
    assert (phones / "first" / "mvlm" / "picture").read_bytes() == b"picture"


def test_dry_run(call: Call, phones: Path) -> None:
    result = call("--dry-run", "model.pte", "picture.jpg", "Who?", ADB="no-such-adb")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no-such-adb push ") == 3
    assert "llava_main" in result.stdout.splitlines()[-1]
    assert "Who" in result.stdout.splitlines()[-1]
    assert not (phones / "log").exists()
    assert not list((phones / "first").iterdir())


def test_no_adb(call: Call) -> None:
    check_refused(call("model.pte", "picture.jpg", ADB="no-such-adb"), "no-such-adb", "install", "ADB")


@pytest.mark.parametrize("devices", ["", "first\tunauthorized\n", "first\toffline\n"])
def test_no_device(call: Call, phones: Path, devices: str) -> None:
    (phones / "devices").write_text(devices)
    check_refused(call("model.pte", "picture.jpg"), devices.strip().replace("\t", " ") or "no phone", "USB debugging")


def test_several_devices(call: Call, phones: Path) -> None:
    (phones / "devices").write_text("first\tdevice\nsecond\tdevice\n")
    check_refused(call("model.pte", "picture.jpg"), "ANDROID_SERIAL", "first, second")
    assert call("model.pte", "picture.jpg", ANDROID_SERIAL="second").returncode == 0
    assert (phones / "second" / "mvlm" / "model.pte").exists()
    assert not (phones / "first" / "mvlm").exists()
    check_refused(call("model.pte", "picture.jpg", ANDROID_SERIAL="third"), "third", "first device")


def test_other_processor(call: Call, phones: Path) -> None:
    (phones / "abi").write_text("x86_64\n")
    check_refused(call("model.pte", "picture.jpg"), "x86_64", "arm64-v8a")


def test_wrong_arguments(call: Call, tmp_path: Path) -> None:
    check_refused(call(), "no model")
    check_refused(call("none.pte"), "none.pte", "not a file")
    check_refused(call("model.pte"), "prompt is needed")
    check_refused(call("model.pte", "misspelt.jpg", "What?"), "misspelt.jpg", "not a file")
    check_refused(call("--wrong", "model.pte"), "--wrong")
    check_refused(call("model.pte", "picture.jpg", MVLM_BUNDLE="none.tar.gz"), "none.tar.gz", "ci/build_aarch64.sh")
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    check_refused(call("model.pte", "picture.jpg", MVLM_BUNDLE="bad.tar.gz"), "bad.tar.gz", "ci/build_aarch64.sh")

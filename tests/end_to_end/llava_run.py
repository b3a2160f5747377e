"""What tests of ``llava_main`` ask it, and how they look at what came out."""

from __future__ import annotations

import subprocess

QUESTION = "Describe the image."


def answer(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def check_refused(result: subprocess.CompletedProcess, *expected: str, code: int = 2) -> None:
    """The exit code, one line that says ``expected``, nothing on stdout, and no file left in the folder."""
    stderr = result.stderr.decode()
    assert result.returncode == code, stderr
    assert result.stdout == b""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("llava_main: error: ")
    for text in expected:
        assert text in lines[0]

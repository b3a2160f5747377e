"""Runs another program to its end and says what it took: time, CPU time, peak memory, and who else was busy meanwhile.

Memory is looked at from outside, in /proc, so that any program can be compared with any other. Whatever happens, Ctrl-C
included, no child stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvlm.runtime.machine import CpuClock, cores_of_others

#: A look takes some 50 microseconds.
_LOOK_SECONDS = 0.01
#: What a program gets to end after SIGTERM.
_GRACE_SECONDS = 2.0


class ChildError(RuntimeError):
    """A program could not be run to a good end; the message has what it said."""


@dataclass(frozen=True)
class ChildRun:
    """A program that ran and ended well.

    Attributes:
        command: what was run.
        stdout: what it said.
        stderr: likewise.
        wall_seconds: from start to end.
        cpu_seconds: of all its threads.
        peak_rss_bytes: largest resident set, as the kernel counts it; 0 where there is no /proc.
        peak_anonymous_bytes: largest that was seen of the part that is no file; likewise.
        others: cores that other programs used meanwhile, on average.
    """

    command: tuple[str, ...]
    stdout: str
    stderr: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    others: float


def run_child(command: Sequence[str], timeout: float | None = None) -> ChildRun:
    """Runs a command in a session of its own, with nothing on stdin.

    Raises:
        ChildError: it cannot be started, fails, or takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        before = CpuClock.now()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        except OSError as error:
            raise ChildError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
        with _ended(process), _MemoryWatch(process.pid) as memory:
            cpu_seconds = _wait(process, timeout)
        after = CpuClock.now()
        said = [_content(stdout), _content(stderr)]
    shown = shlex.join(command)
    if cpu_seconds is None:
        raise ChildError(f"took longer than {timeout:g} s and was stopped: {shown}{_tail(said)}")
    if process.returncode != 0:
        ended = f"exit code {process.returncode}"
        if process.returncode < 0:
            ended = f"killed by {signal.Signals(-process.returncode).name}"
        raise ChildError(f"{ended}: {shown}{_tail(said)}")
    return ChildRun(
        command=tuple(command),
        stdout=said[0],
        stderr=said[1],
        wall_seconds=after.when - before.when,
        cpu_seconds=cpu_seconds,
        peak_rss_bytes=memory.peak_rss_bytes,
        peak_anonymous_bytes=memory.peak_anonymous_bytes,
        others=cores_of_others(before, after, cpu_seconds),
    )


def status_bytes(status: str) -> Mapping[str, int]:
    """Memory in the text of /proc/PID/status: field -> bytes."""
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}


def _wait(process: subprocess.Popen, timeout: float | None) -> float | None:
    """Waits for the end; returns the CPU seconds it took, None if it is still running after ``timeout``."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        # wait4, because resource.getrusage would sum up over all children so far. WNOHANG alone cannot be waited for
        # with a limit; without a limit nothing must wake up this process.
        pid, status, usage = os.wait4(process.pid, 0 if deadline is None else os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        if time.monotonic() >= deadline:
            return None
        time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def _ended(process: subprocess.Popen):
    """Ends a process, and those it started, if the block is left while it runs."""
    try:
        yield
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class _MemoryWatch:
    """Looks at a process's memory while the block runs."""

    def __init__(self, pid: int) -> None:
        self.peak_rss_bytes = 0
        self.peak_anonymous_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        executable = None
        while not self._done.wait(_LOOK_SECONDS):
            try:
                # Right after fork a child is this program; what that had in memory is none of its own.
                now = os.readlink(self._status.parent / "exe")
                sizes = status_bytes(self._status.read_text())
            except OSError:
                continue
            if executable != now:
                executable = now
                self.peak_rss_bytes = self.peak_anonymous_bytes = 0
            self.peak_rss_bytes = max(self.peak_rss_bytes, sizes.get("VmHWM", 0))
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, sizes.get("RssAnon", 0))


def _content(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _tail(said: Sequence[str], lines: int = 20) -> str:
    """The last lines of what a program said, indented, stderr before stdout."""
    for text in reversed(said):
        if text.strip():
            return "".join(f"\n  {line}" for line in text.strip().splitlines()[-lines:])
    return ", and said nothing"

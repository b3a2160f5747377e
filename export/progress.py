"""What is said while a long work runs, and what libraries are kept from saying."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def peak_memory_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system, which glibc's malloc otherwise keeps for later.

    Where many large tensors come and go in several threads, what it keeps adds up to as much again as is in use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


#: Seconds between two lines that say how far a stage is, where there is no terminal that shows it all the time.
SECONDS_BETWEEN_LINES = 60.0


def time_left(seconds: float, done: float) -> str:
    """``, 3 min left`` of something that took ``seconds`` for a share ``done``; nothing if it is too early to tell."""
    if seconds < 10 or not 0 < done < 1:
        return ""
    left = seconds * (1 - done) / done
    return f", {left:.0f} s left" if left < 100 else f", {left / 60:.0f} min left"


class Progress:
    """Says what is done on stderr: a line per stage, with the time it took and the memory peak so far.

    On a terminal the line of a stage counts the seconds while it runs, and tells how much is left; elsewhere a long
    stage says so once a minute.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._start = time.monotonic()
        self._share: float | None = None
        self._begin = self._last_line = self._start
        self._has_terminal = not quiet and sys.stderr.isatty()

    def share(self, done: float) -> None:
        """How much of the present stage is done, 0 .. 1."""
        self._share = done
        now = time.monotonic()
        if not self._has_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"  {done:.0%}{time_left(now - self._begin, done)}")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, counts: bool = True) -> Iterator[None]:
        """Says when ``title`` begins and what it took; ``counts=False`` leaves the terminal to others meanwhile."""
        begin = self._begin = self._last_line = time.monotonic()
        done = threading.Event()
        ticker = None
        self._share = None
        if counts and self._has_terminal:

            def tick() -> None:
                while not done.wait(1.0):
                    seconds, done_so_far = time.monotonic() - begin, self._share
                    share = "" if done_so_far is None else f"{done_so_far:6.0%}{time_left(seconds, done_so_far)}"
                    line = f"\r{title:<44}{seconds:7.1f} s{share:<24}"
                    print(line, end="", file=sys.stderr, flush=True)

            ticker = threading.Thread(target=tick, daemon=True)
            ticker.start()
        else:
            self.say(f"{title} …")
        try:
            yield
        finally:
            done.set()
            if ticker:
                ticker.join()
                print("\r", end="", file=sys.stderr)
        now = time.monotonic()
        self.say(
            f"{title:<44}{now - begin:7.1f} s   elapsed {now - self._start:6.1f} s   peak {peak_memory_mib():6.0f} MiB"
        )


def quiet_libraries() -> None:
    """Silences what torch, torchao and ExecuTorch say about their own internals; for programs, called first.

    Their errors are raised, not logged, and still reach the user.
    """
    warnings.filterwarnings("ignore", module=r"(torch|torchao|executorch|copyreg)(\..*)?")
    import torch  # noqa: F401  (sets its loggers' levels when it is imported)

    for name in ("torch", "torchao", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torchao complains through the root logger that its CUDA kernels do not load.
    logging.getLogger().setLevel(logging.ERROR)

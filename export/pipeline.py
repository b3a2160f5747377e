"""The whole way: load, quantize, capture, lower, package. Each stage is in the module of its name."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mvlm.export.capture import capture
from mvlm.export.checkpoint import LoadedCheckpoint, load
from mvlm.export.contract import Metadata
from mvlm.export.files import check_writable
from mvlm.export.lower import delegation_table, lower
from mvlm.export.package import constant_methods, describe, write_pte
from mvlm.export.quantize import QuantizationReport, quantize
from mvlm.export.recipe import Recipe


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: of the .pte.
        size: of it, in bytes.
        metadata: that it carries.
        tokenizer: the SentencePiece model in it.
    """

    path: Path
    size: int
    metadata: Metadata
    tokenizer: bytes


def peak_memory_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


class Progress:
    """Says what is done on stderr: a line per stage, with the time it took and the memory peak so far.

    On a terminal the line of a stage counts the seconds while it runs.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        begin = time.monotonic()
        done = threading.Event()
        ticker = None
        if not self.quiet and sys.stderr.isatty():

            def tick() -> None:
                while not done.wait(1.0):
                    print(f"\r{title:<44}{time.monotonic() - begin:7.1f} s", end="", file=sys.stderr, flush=True)

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
            f"{title:<44}{now - begin:7.1f} s   elapsed {now - self._start:6.1f} s   "
            f"peak {peak_memory_mib():6.0f} MiB"
        )


def quiet_libraries() -> None:
    """Silences what torch, torchao and ExecuTorch say about their own internals on every export.

    Their errors are raised, not logged, and still reach the user.
    """
    warnings.filterwarnings("ignore", module=r"(torch|torchao|executorch|copyreg)(\..*)?")
    for name in ("torch", "torchao", "executorch", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quantize_checkpoint(checkpoint: LoadedCheckpoint, recipe: Recipe, say: Callable[[str], None]) -> QuantizationReport:
    """Quantizes the checkpoint's model in place and says where a smaller group had to be taken."""
    report = quantize(checkpoint.model, recipe)
    for group_size, kinds in report.smaller_groups(recipe).items():
        say(f"  group size {group_size} instead of {recipe.group_size} for {', '.join(kinds)}: their width wants it")
    return report


def export_checkpoint(
    model: str,
    path: Path,
    recipe: Recipe,
    vision_tower: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Exports a checkpoint into one .pte.

    Args:
        model: folder or hub id of the checkpoint.
        path: of the file to write; it appears whole or not at all.
        recipe: how to quantize.
        vision_tower: folder or hub id of the CLIP model, for checkpoints that carry none.
        progress: where to report; silent by default.

    Raises:
        ExportError: the checkpoint, the recipe or the path is not usable.
        OSError: the file could not be written.
    """
    progress = progress or Progress(quiet=True)
    quiet_libraries()
    check_writable(path)
    with progress.stage("load checkpoint"):
        checkpoint = load(model, vision_tower)
    if checkpoint.unused:
        progress.say(f"  {len(checkpoint.unused)} tensors are not needed: {_abridge(checkpoint.unused)}")
    with progress.stage("quantize"):
        quantize_checkpoint(checkpoint, recipe, progress.say)
    with progress.stage("capture with torch.export"):
        methods = capture(checkpoint.model, recipe.max_context_len)
    metadata = describe(checkpoint, recipe)
    with progress.stage("lower to XNNPACK"):
        lowered = lower(methods, constant_methods(metadata, checkpoint.tokenizer))
    progress.say("\n".join("  " + line for line in delegation_table(lowered.delegation).splitlines()))
    del methods
    with progress.stage("plan memory and write"):
        size = write_pte(lowered, path)
    return Exported(path, size, metadata, checkpoint.tokenizer)


def _abridge(names: tuple[str, ...], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")

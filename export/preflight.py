"""Preflight: what an export will need, said and checked before it starts.

Output size follows from the recipe. Memory and time are fits to exports that were measured (README, "What an export
costs"): what a process of torch, torchao and ExecuTorch takes by itself; the weights outside the stacks of layers,
which stay in memory once they are quantized; and the most that is worked on at once, the largest tensor while it is
quantized or one layer while it is captured.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.quantize import meta_model, place_in_stack, schemes_of, stored_bytes
from mvlm.export.recipe import Recipe

_MIB = 1 << 20

#: Resident memory of a process that has imported what an export needs.
BASE_MEMORY = 366 * _MIB
#: Bytes for each float32 weight outside the stacks: itself and, at the end, a copy of some while the file is written.
BYTES_PER_HELD_FLOAT = 5
#: Bytes for each weight of the largest tensor while it is quantized and packed, another one beside it on another core.
BYTES_PER_LARGEST_WEIGHT = 11
#: Bytes for each weight of the largest layer while it is lowered: the template, as torchao and as XNNPACK hold it.
BYTES_PER_LAYER_WEIGHT = 5
#: What capturing and lowering take whatever the size: graphs, passes, delegates.
LOWERING_MEMORY = 80 * _MIB
#: Peaks of one and the same export differ by some percent; what is estimated is meant to be above them all.
MEMORY_MARGIN = 1.13
#: Seconds on two cores of 2021 (Zen 3): whatever the size, and for each weight.
BASE_SECONDS = 40.0
SECONDS_PER_WEIGHT = 28e-9
#: The program without weights: instructions, delegates and padding, of all that is no layer, and of each layer.
PROGRAM_BYTES = 64 << 10
PROGRAM_BYTES_PER_LAYER = 12 << 10


@dataclass(frozen=True)
class Estimate:
    """What an export will need.

    Attributes:
        output: size of the .pte in bytes.
        spool: bytes of the temporary file on the same disk.
        memory: peak resident memory in bytes.
        seconds: on two cores.
    """

    output: int
    spool: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"about {self.output / 1e6:,.0f} MB of .pte, {self.memory / _MIB:,.0f} MiB of memory at the peak, "
            f"{(self.output + self.spool) / 1e6:,.0f} MB of disk while it is written, "
            f"{_duration(self.seconds)} on two cores"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def estimate(checkpoint: Checkpoint, recipe: Recipe) -> Estimate:
    """What it will need to export ``checkpoint`` by ``recipe``.

    Raises:
        ExportError: a weight whose width no group size divides.
    """
    model = meta_model(checkpoint)
    schemes = schemes_of(model, recipe)
    text = checkpoint.config.text
    rope_tables = 4 * recipe.max_context_len * text.head_dim
    output = PROGRAM_BYTES + len(checkpoint.tokenizer) + rope_tables
    layers: Counter[tuple[str, int]] = Counter()
    spool = held = largest = weights = 0
    for name, parameter in model.named_parameters():
        scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        count = parameter.numel()
        size = stored_bytes(scheme, parameter) if scheme else 4 * count
        output += size
        weights += count
        largest = max(largest, count)
        place = place_in_stack(name)
        if place is not None:
            layers[place[:2]] += count
        if place is not None and scheme is not None:
            spool += size
        else:
            # torchao holds integers of any width as int8.
            held += count if scheme and scheme.bits < 32 else BYTES_PER_HELD_FLOAT * count
    output += PROGRAM_BYTES_PER_LAYER * len(layers)
    quantizing = BYTES_PER_LARGEST_WEIGHT * largest
    lowering = LOWERING_MEMORY + BYTES_PER_LAYER_WEIGHT * max(layers.values(), default=0)
    memory = MEMORY_MARGIN * (BASE_MEMORY + held + max(quantizing, lowering))
    if checkpoint.size:
        # The file's pages that the largest tensor is read from, 2 bytes a weight in float16.
        memory += largest * checkpoint.size / weights
    return Estimate(output, spool, int(memory), BASE_SECONDS + SECONDS_PER_WEIGHT * weights)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the machine and of its control groups; None where nothing tells."""
    limits = [_left_in_machine(root), *map(_left_in_control_group, _control_groups(root))]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _left_in_machine(root: Path) -> int | None:
    kib = _table(root / "proc/meminfo").get("MemAvailable:")
    return None if kib is None else kib * 1024


def _left_in_control_group(group: Path) -> int | None:
    """What a group counts includes cached files, a checkpoint just downloaded say; they give way when need be."""
    for limit_name, used_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None:
            stat = _table(group / "memory.stat")
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            return limit - used + cached
    return None


def _number(path: Path) -> int | None:
    """The one number in a file; None where there is no such file, or a word such as ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Names and numbers, a line each; units behind them are left out."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}


def _control_groups(system: Path) -> list[Path]:
    """The folders of this process's memory control groups: its own and those above it, version 2 and 1."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = system / "sys/fs/cgroup" / controllers
            folder = root / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return list(dict.fromkeys(folders))


def check(estimated: Estimate, path: Path) -> None:
    """Refuses an export that will not get through.

    Raises:
        ExportError: there is not enough memory, or not enough space on the disk of ``path``.
    """
    advice = "; --force tries nevertheless"
    memory = available_memory()
    if memory is not None and memory < estimated.memory:
        raise ExportError(
            f"not enough memory: the export will need about {estimated.memory / _MIB:,.0f} MiB and "
            f"{memory / _MIB:,.0f} MiB are available; close other programs, or use a machine with more{advice}"
        )
    folder = path.absolute().parent
    free = shutil.disk_usage(folder).free
    needed = estimated.output + estimated.spool
    if free < needed:
        raise ExportError(
            f"not enough disk space in {folder}: the export will need about {needed / 1e6:,.0f} MB there while it "
            f"writes and {free / 1e6:,.0f} MB are free; free some, or choose another --pte-name{advice}"
        )

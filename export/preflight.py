"""Preflight: what an export will need, said and checked before it starts.

Output size follows from the recipe. Memory and time are fits to exports that were measured (README, "What an export
costs"): what a process of torch, torchao and ExecuTorch takes by itself, and the largest tensors while they are
quantized and lowered, for the layers pass through memory one tensor at a time.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.errors import ExportError
from mvlm.export.quantize import meta_model, place_in_stack, schemes_of, stored_bytes
from mvlm.export.recipe import Recipe

_MIB = 1 << 20

#: Resident memory of a process that has imported what an export needs and lowered a small layer.
BASE_MEMORY = 450 * _MIB
#: Bytes at the peak for each weight of the tensors that stay in memory: embedding, lm_head, projector.
BYTES_PER_HELD_WEIGHT = 2
#: Bytes at the peak for each weight of the largest tensor while it is quantized or lowered.
BYTES_PER_LARGEST_WEIGHT = 12
#: The same while it is in a file's map, and what else of the file is.
BYTES_PER_MAPPED_WEIGHT = 2
MAPPED_BYTES = 128 * _MIB
#: Seconds on two cores of 2021 (Zen 3): whatever the size, and for each weight.
BASE_SECONDS = 45.0
SECONDS_PER_WEIGHT = 40e-9
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
    layers = set()
    spool = held = largest = weights = 0
    for name, parameter in model.named_parameters():
        scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        count = parameter.numel()
        size = stored_bytes(scheme, parameter) if scheme else 4 * count
        output += size
        weights += count
        place = place_in_stack(name)
        if place is not None:
            layers.add(place[:2])
        if place is not None and scheme is not None:
            spool += size
        else:
            held += count
        largest = max(largest, count)
    output += PROGRAM_BYTES_PER_LAYER * len(layers)
    memory = BASE_MEMORY + BYTES_PER_HELD_WEIGHT * held + BYTES_PER_LARGEST_WEIGHT * largest
    if checkpoint.size:
        memory += MAPPED_BYTES + BYTES_PER_MAPPED_WEIGHT * largest
    return Estimate(output, spool, memory, BASE_SECONDS + SECONDS_PER_WEIGHT * weights)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the machine and of its control groups; None where nothing tells."""
    limits = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        for group in _control_groups(root):
            for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
                if (group / limit).is_file():
                    text = (group / limit).read_text().strip()
                    if text != "max":
                        limits.append(int(text) - int((group / used).read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(limits)) if limits else None


def _control_groups(system: Path) -> list[Path]:
    """The folders of this process's memory control groups: its own and those above it, version 2 and 1."""
    folders = []
    for line in (system / "proc/self/cgroup").read_text().splitlines():
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

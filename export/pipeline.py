"""The whole way: load, quantize, capture, lower, package. Each stage is in the module of its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mvlm.export.capture import capture
from mvlm.export.checkpoint import LoadedCheckpoint, load
from mvlm.export.contract import Metadata
from mvlm.export.errors import ExportError
from mvlm.export.files import check_writable
from mvlm.export.lower import delegation_table, lower
from mvlm.export.package import constant_methods, describe, write_pte
from mvlm.export.progress import Progress
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
    check_writable(path)
    with progress.stage("load checkpoint"):
        checkpoint = load(model, vision_tower)
    _check_context_len(checkpoint, recipe)
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


def _check_context_len(checkpoint: LoadedCheckpoint, recipe: Recipe) -> None:
    """Refuses a cache that is longer than the model was trained for, or that a picture alone would fill."""
    config = checkpoint.model.config
    if recipe.max_context_len > config.text.max_position_embeddings:
        raise ExportError(
            f"max context length {recipe.max_context_len} is more than the {config.text.max_position_embeddings} "
            "positions that the model was trained for (max_position_embeddings of its config.json)"
        )
    if recipe.max_context_len <= config.num_image_tokens:
        raise ExportError(
            f"max context length {recipe.max_context_len} leaves no room beside a picture, which takes "
            f"{config.num_image_tokens} positions in this model"
        )


def _abridge(names: tuple[str, ...], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")

"""The whole way: quantize, capture, lower, package. Each stage is in the module of its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvlm.export import preflight
from mvlm.export.calibrate import CalibrationOptions, calibrate, work_folder
from mvlm.export.capture import capture
from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import Metadata
from mvlm.export.errors import ExportError
from mvlm.export.files import check_writable
from mvlm.export.llama_operators import load_llama_operators
from mvlm.export.lower import delegation_table, lower
from mvlm.export.package import constant_methods, describe, program_id, write_pte
from mvlm.export.progress import Progress
from mvlm.export.quantize import meta_model, quantize_checkpoint, schemes_of, smaller_groups
from mvlm.export.recipe import Recipe
from mvlm.export.report import QuantizationReport, check_report_path, write_report
from mvlm.export.spool import Spool
from mvlm.export.stored_weights import digest_of_quantized


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: of the .pte.
        size: of it, in bytes.
        metadata: that it carries.
        tokenizer: the SentencePiece model in it.
        report: what quantization did to the weights.
    """

    path: Path
    size: int
    metadata: Metadata
    tokenizer: bytes
    report: QuantizationReport


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    report_path: Path | None = None,
    force: bool = False,
    calibration: CalibrationOptions | None = None,
) -> Exported:
    """Exports a checkpoint into one .pte.

    Args:
        checkpoint: opened, its weights still where they come from.
        path: of the file to write; it appears whole or not at all.
        recipe: how to quantize.
        progress: where to report; silent by default.
        report_path: a .json for the report of the quantization, with a page beside it; none by default.
        force: go on although memory or disk will probably not do.
        calibration: on what to calibrate; by default what the model writes itself, where the recipe wants calibration.

    Raises:
        ExportError: the checkpoint, the recipe or the path is not usable, or memory or disk will not do.
        OSError: a file could not be written.
    """
    progress = progress or Progress(quiet=True)
    check_writable(path)
    if report_path is not None:
        check_report_path(report_path)
    _check_context_len(checkpoint, recipe)
    if recipe.attention_op == "llama":
        load_llama_operators()
    estimated = preflight.estimate(checkpoint, recipe)
    progress.say(f"{checkpoint.name}, recipe {recipe.name}: {estimated}")
    if not force:
        preflight.check(estimated, path)
    if checkpoint.unused:
        progress.say(f"  {len(checkpoint.unused)} tensors are not needed: {_abridge(checkpoint.unused)}")
    for group_size, kinds in smaller_groups(schemes_of(meta_model(checkpoint), recipe), recipe).items():
        progress.say(
            f"  group size {group_size} instead of {recipe.group_size} for {', '.join(kinds)}: their width wants it"
        )
    with progress.stage("identify checkpoint"):
        checkpoint.checkpoint_id  # noqa: B018  (reads all files once; remembered)
    folder = found = None
    if recipe.calibration != "none":
        calibration = calibration or CalibrationOptions(recipe.calibration)
        folder = work_folder(checkpoint, recipe, calibration, path)
        found = calibrate(checkpoint, recipe, calibration, folder, progress)
        checkpoint, recipe = found.checkpoint, found.recipe
    metadata = describe(checkpoint, recipe)
    with Spool(path.absolute().parent) as spool:
        with progress.stage("read and quantize"):
            quantized = quantize_checkpoint(checkpoint, recipe, spool, progress, found)
        digest = digest_of_quantized(quantized, schemes_of(meta_model(checkpoint), recipe))
        report = QuantizationReport(checkpoint.name, recipe, quantized.layers)
        progress.say(_indent(report.table()))
        if report_path is not None:
            write_report(report, report_path)
        with progress.stage("capture with torch.export"):
            methods = capture(quantized)
        with progress.stage("lower to XNNPACK"):
            lowered = lower(methods, progress)
        progress.say(_indent(delegation_table(lowered.delegation)))
        # Of the captured programs only what the lowered ones share is still needed.
        del methods, quantized
        with progress.stage("plan memory and write"):
            constants = constant_methods(
                metadata,
                checkpoint.tokenizer,
                program_id(lowered, metadata),
                digest,
                found.smoothing if found else None,
            )
            size = write_pte(lowered, constants, path)
    if folder is not None:
        folder.remove()
    return Exported(path, size, metadata, checkpoint.tokenizer, report)


def _check_context_len(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuses a cache that is longer than the model was trained for, or that a picture alone would fill."""
    config = checkpoint.config
    if recipe.max_context_len > config.text.max_position_embeddings:
        raise ExportError(
            f"max context length {recipe.max_context_len} is more than the {config.text.max_position_embeddings} "
            "positions that the model was trained for (max_position_embeddings of its config.json)"
        )
    if config.vision is not None and recipe.max_context_len <= config.num_image_tokens:
        raise ExportError(
            f"max context length {recipe.max_context_len} leaves no room beside a picture, which takes "
            f"{config.num_image_tokens} positions in this model"
        )


def _abridge(names: tuple[str, ...], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())

"""Flags that say which checkpoint is meant, for every command that reads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mvlm.export import demo
from mvlm.export.errors import ExportError

if TYPE_CHECKING:
    from mvlm.export.checkpoint import Checkpoint


def add_checkpoint_arguments(parser: argparse.ArgumentParser, default: str = "the bundled demo checkpoint") -> None:
    """Adds the flags that :func:`open_of` reads.

    Args:
        parser: of the command.
        default: what the command takes if none of them is given, for its help.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="DIR|ID",
        help="checkpoint: a folder with config.json, tokenizer.model and weights, or a Hugging Face hub id "
        f"(default: {default})",
    )
    source.add_argument(
        "--random-weights",
        metavar="NAME",
        help="random weights of a published model's shape, mobilevlm-1.7b say, for benchmarks; --list names them all",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of --random-weights (default: 0)")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of --model on the hub (default: its main branch)"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="DIR|ID",
        help="CLIP checkpoint for a model that carries none, MobileVLM V1 (default: what its config.json names)",
    )


def open_of(options: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the flags name: a folder or hub id, random weights, or else the bundled demo checkpoint.

    Raises:
        ExportError: it cannot be used, or flags do not go together.
    """
    if options.random_weights is None and options.seed is not None:
        raise ExportError(f"--seed {options.seed} goes with --random-weights; a checkpoint's weights are not random")
    if options.model is None:
        if options.vision_tower is not None:
            whose = "random weights have their" if options.random_weights else "the bundled demo checkpoint has its"
            raise ExportError(f"--vision-tower goes with --model; {whose} own")
        if options.revision is not None:
            raise ExportError(f"--revision {options.revision} goes with --model and the id of a model on the hub")
    from mvlm.export.checkpoint import open_checkpoint, random_checkpoint

    if options.random_weights is not None:
        return random_checkpoint(options.random_weights, options.seed or 0)
    if options.quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return open_checkpoint(options.model or str(demo.CHECKPOINT), options.vision_tower, options.revision)

"""Command line of the exporter: turns flags into a recipe and prints what happened."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.export import demo
from mvlm.export.errors import ExportError
from mvlm.export.progress import Progress, quiet_libraries
from mvlm.export.recipe import RECIPES, SCALE_ALGORITHMS, Recipe, mobile

if TYPE_CHECKING:
    from mvlm.export.checkpoint import Checkpoint

EPILOG = """\
examples:
  # the bundled demo model, with its picture beside it
  python -m mvlm.export --pte-name mobilevlm.pte --with-artifacts

  # MobileVLM V2 from the Hugging Face hub; it carries its own vision tower
  python -m mvlm.export --model mtgv/MobileVLM_V2-1.7B --pte-name mobilevlm-v2-1.7b.pte

  # MobileVLM V1 from folders: the vision tower is a checkpoint of its own
  python -m mvlm.export --model ./MobileVLM-1.7B --vision-tower ./clip-vit-large-patch14-336 --pte-name mobilevlm.pte

then:
  llava_main --model_path mobilevlm.pte --image_path photo.jpg --prompt "What is in the picture?"
"""


class _List(argparse.Action):
    """Prints what is supported and exits, whatever other flags say, as --version does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        quiet_libraries()
        from mvlm.export.checkpoint.listing import listing

        print(listing())
        parser.exit()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = mobile()
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.export",
        description="Export a MobileVLM checkpoint into one self-describing .pte for llava_main and ExecuTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pte-name", required=True, type=Path, metavar="FILE", help="the file to write, usually NAME.pte"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="DIR|ID",
        help="checkpoint: a folder with config.json, tokenizer.model and weights, or a Hugging Face hub id "
        "(default: the bundled demo checkpoint)",
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
    parser.add_argument(
        "--recipe", choices=sorted(RECIPES), default=defaults.name, help="named recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"4-bit weights that share a scale: 32, 64, 128, … (default: {defaults.group_size})",
    )
    parser.add_argument(
        "--scales",
        choices=sorted(SCALE_ALGORITHMS),
        help=f"how scales of 4-bit groups are chosen (default: {defaults.scales})",
    )
    parser.add_argument(
        "--max-context-len",
        type=int,
        metavar="N",
        help=f"positions for prompt, picture and answer together (default: {defaults.max_context_len})",
    )
    parser.add_argument(
        "--with-artifacts",
        action="store_true",
        help="also write tokenizer.model, the metadata as JSON and the sample picture beside the .pte",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "--list", action=_List, nargs=0, help="print which checkpoints and named models are supported, and exit"
    )
    parser.add_argument("--version", action="version", version=f"mvlm {version('mvlm')}")
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The named recipe with the flags that were given put over it."""
    given = {
        name: getattr(options, name)
        for name in ("group_size", "scales", "max_context_len")
        if getattr(options, name) is not None
    }
    return replace(RECIPES[options.recipe](), **given)


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
        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()
    return open_checkpoint(options.model or str(demo.CHECKPOINT), options.vision_tower, options.revision)


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    if options.model is None and options.vision_tower is not None:
        raise ExportError("--vision-tower goes with --model; the bundled demo checkpoint has its own")
    # Late, because it imports torch, torchao and executorch: --help and wrong flags answer at once.
    quiet_libraries()
    from mvlm.export.package import write_artifacts
    from mvlm.export.pipeline import export_checkpoint

    progress = Progress(options.quiet)
    model = options.model
    if model is None:
        model = str(demo.CHECKPOINT)
        progress.say(f"no --model given: exporting the bundled demo checkpoint, {demo.CHECKPOINT}")
    exported = export_checkpoint(model, options.pte_name, recipe, options.vision_tower, progress)
    progress.say(f"{exported.path}: {exported.size:,} bytes, {exported.metadata.model_name}, {recipe.to_json()}")
    if options.with_artifacts:
        for path in write_artifacts(exported.path, exported.metadata, exported.tokenizer, demo.SAMPLE_IMAGE):
            progress.say(f"{path}: {path.stat().st_size:,} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for unusable input, 1 for a failure, 130 for Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        run(options)
    except ExportError as error:
        print(f"mvlm.export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or options.pte_name
        print(f"mvlm.export: {where}: could not be read or written: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mvlm.export: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that a file half written is removed; 128 + 15, as shells count.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

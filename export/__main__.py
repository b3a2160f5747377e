"""Command line of the exporter: turns flags into a recipe and prints what happened."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.export import demo
from mvlm.export.command_line import add_checkpoint_arguments, open_of
from mvlm.export.errors import ExportError
from mvlm.export.files import check_writable
from mvlm.export.progress import Progress, quiet_libraries
from mvlm.export.recipe import (
    ATTENTION_OPS,
    CALIBRATIONS,
    EMBEDDING_BITS,
    GROUP_SIZES,
    KV_CACHES,
    LM_HEAD_BITS,
    RECIPES,
    SCALE_ALGORITHMS,
    VISION_WEIGHTS,
    Recipe,
    mobile,
)
from mvlm.export.report import check_report_path

if TYPE_CHECKING:
    from mvlm.export.calibrate import CalibrationOptions

#: Flags that change one field of the named recipe.
RECIPE_FLAGS = (
    "group_size",
    "scales",
    "lm_head_bits",
    "embedding_bits",
    "vision",
    "kv_cache",
    "max_context_len",
    "prefill_chunk",
    "attention_op",
    "calibration",
    "bits_budget",
)

#: Said behind an export that was not calibrated. The figures are of SmolLM2-135M, see README.
UNCALIBRATED = (
    "not calibrated: --calibrate would bring answers closer to the float model's. Of a real Llama of 135 million "
    "parameters the divergence from float32 fell from 0.42 to 0.06 nats a token with it, to 0.23 with --calibrate quick"
)

EPILOG = """\
examples:
  # the bundled demo model, with its picture beside it
  python -m mvlm.export --pte-name mobilevlm.pte --with-artifacts

  # MobileVLM V2 from the Hugging Face hub, as it was on a certain day; it carries its own vision tower
  python -m mvlm.export --model mtgv/MobileVLM_V2-1.7B --revision 9a5b623a83fe --pte-name mobilevlm-v2-1.7b.pte

  # MobileVLM V1 from folders: the vision tower is a checkpoint of its own
  python -m mvlm.export --model ./MobileVLM-1.7B --vision-tower ./clip-vit-large-patch14-336 --pte-name mobilevlm.pte

  # LLaVA-1.5, smaller than by default; and a language model alone, which takes no picture
  python -m mvlm.export --model llava-hf/llava-1.5-7b-hf --recipe small --pte-name llava.pte
  python -m mvlm.export --model mtgv/MobileLLaMA-1.4B-Chat --pte-name mobilellama.pte

  # for a benchmark without a download: random weights of a true shape
  python -m mvlm.export --random-weights mobilevlm-3b --pte-name mobilevlm-3b.pte

  # minutes more, and answers much closer to the float model's; on your own text and pictures, or its own
  python -m mvlm.export --model ./MobileVLM_V2-1.7B --calibrate --calibration-text text.txt --pte-name good.pte

  # how much each layer lost, as JSON and as a page with a plot
  python -m mvlm.export --model ./MobileVLM_V2-1.7B --group-size 32 --pte-name fine.pte --report fine.json

then:
  python -m mvlm.export.inspect mobilevlm.pte
  llava_main --model_path mobilevlm.pte --image_path photo.jpg --prompt "What is in the picture?"
"""


def _share(text: str) -> float:
    """``+5%`` or ``5%`` as 0.05."""
    match = re.fullmatch(r"\+?(\d+(?:\.\d+)?)%", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give per cent, +5% for example")
    return float(match[1]) / 100


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
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default=defaults.name,
        help="named recipe; the flags below change parts of it (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, help="4-bit weights that share a scale (mobile: 32)"
    )
    parser.add_argument(
        "--scales", choices=sorted(SCALE_ALGORITHMS), help="how the scale of a group is chosen (mobile: search)"
    )
    parser.add_argument(
        "--lm-head-bits", type=int, choices=LM_HEAD_BITS, help="of the layer that makes logits (mobile: 8)"
    )
    parser.add_argument("--embedding-bits", type=int, choices=EMBEDDING_BITS, help="of the token embedding (mobile: 8)")
    parser.add_argument("--vision", choices=VISION_WEIGHTS, help="weights of vision tower and projector (mobile: int8)")
    parser.add_argument("--kv-cache", choices=KV_CACHES, help="type of the KV cache (mobile: int8)")
    parser.add_argument(
        "--max-context-len",
        type=int,
        metavar="N",
        help=f"positions for prompt, picture and answer together (default: {defaults.max_context_len})",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens that the language model reads at once; more take more memory for activations "
        f"(default: {defaults.prefill_chunk}; a picture's at least)",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="full",
        choices=CALIBRATIONS,
        dest="calibration",
        metavar="full|quick",
        help="quantize for the least damage to the model's answers: full (GPTQ, minutes to half an hour), or quick "
        "(scales alone, minutes); on text and pictures that the model writes and answers itself, unless the next two "
        "flags give others",
    )
    parser.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="UTF-8 text to calibrate on, some 100 KB or more"
    )
    parser.add_argument(
        "--calibration-images",
        type=Path,
        metavar="DIR",
        help="pictures to calibrate on (default: a few photographs); beside photo.jpg there may be photo.txt, a "
        "question in each line and behind a tab the answer",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help="of text to use; more take longer and more memory"
    )
    parser.add_argument("--calibration-seed", type=int, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument(
        "--bits-budget",
        type=_share,
        metavar="+N%",
        help="bytes to add to the language model's layers, in which those linears get 8 bits that need them most "
        "(with --calibrate; accurate: +20%%, else none)",
    )
    parser.add_argument(
        "--attention-op",
        choices=ATTENTION_OPS,
        help="mvlm: our operators, for llava_main and mvlm.runtime; llama: ExecuTorch's attention and none of our "
        "operators, for ExecuTorch's own programs, slower and with an fp32 KV cache (default: mvlm)",
    )
    parser.add_argument(
        "--with-artifacts",
        action="store_true",
        help="also write tokenizer.model, the metadata as JSON and the sample picture beside the .pte",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="what quantization did to each layer, as JSON, and as a page with a plot beside it",
    )
    parser.add_argument("--force", action="store_true", help="go on although memory or disk space will probably not do")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "--list", action=_List, nargs=0, help="print which checkpoints and named models are supported, and exit"
    )
    parser.add_argument("--version", action="version", version=f"mvlm {version('mvlm')}")
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The named recipe with the flags that were given put over it."""
    given = {name: getattr(options, name) for name in RECIPE_FLAGS if getattr(options, name) is not None}
    if given.get("attention_op") == "llama":
        given.setdefault("kv_cache", "fp32")
    return replace(RECIPES[options.recipe](), **given)


def calibration_of(options: argparse.Namespace, recipe: Recipe) -> CalibrationOptions | None:
    """On what to calibrate; None where nothing is calibrated.

    Raises:
        ExportError: a flag is not possible, or goes with --calibrate, which is not there.
    """
    from mvlm.export.calibrate import CalibrationOptions

    given = {
        "--calibration-text": options.calibration_text,
        "--calibration-images": options.calibration_images,
        "--calibration-tokens": options.calibration_tokens,
        "--calibration-seed": options.calibration_seed,
    }
    if options.bits_budget and recipe.calibration != "full":
        raise ExportError(
            f"--bits-budget {options.bits_budget:+.0%} goes with --calibrate, which finds out where bits matter; add it"
        )
    if recipe.calibration == "none":
        for flag, value in given.items():
            if value is not None:
                raise ExportError(f"{flag} {value} goes with --calibrate, which is not given; add it or leave this out")
        return None
    if options.calibration_tokens is not None and options.calibration_tokens < 1024:
        raise ExportError(
            f"--calibration-tokens {options.calibration_tokens} are too few to calibrate on: 1024 or more"
        )
    return CalibrationOptions(
        recipe.calibration,
        options.calibration_text,
        options.calibration_images,
        options.calibration_tokens,
        options.calibration_seed or 0,
    )


def check_outputs(options: argparse.Namespace) -> None:
    """Checks, before minutes of work, that all files that the flags ask for can be written.

    Raises:
        ExportError: one cannot be written, or would be written twice.
    """
    pte, report = options.pte_name, options.report
    check_writable(pte)
    outputs = [(pte, "the file itself")]
    if report is not None:
        check_report_path(report)
        outputs += [(report, "--report"), (report.with_suffix(".html"), "the page of --report")]
    if options.with_artifacts:
        for name in ("tokenizer.model", f"{pte.stem}.json", demo.SAMPLE_IMAGE.name):
            check_writable(pte.parent / name)
            outputs.append((pte.parent / name, "--with-artifacts"))
    asked_by: dict[Path, str] = {}
    for path, what in outputs:
        first = asked_by.setdefault(path.resolve(), what)
        if first != what:
            raise ExportError(f"{path}: would be written for {first} and again for {what}; give one another name")


def run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    check_outputs(options)
    # Late, because it imports torch, torchao and executorch: --help and wrong flags answer at once.
    quiet_libraries()
    progress = Progress(options.quiet)
    with progress.stage("open checkpoint", counts=False):  # the hub's downloads have progress bars
        checkpoint = open_of(options)
    from mvlm.export.package import write_artifacts
    from mvlm.export.pipeline import export_checkpoint

    if options.model is None and options.random_weights is None:
        progress.say(f"no --model given: exporting the bundled demo checkpoint, {demo.CHECKPOINT}")
    calibration = calibration_of(options, recipe)
    exported = export_checkpoint(
        checkpoint, options.pte_name, recipe, progress, options.report, options.force, calibration
    )
    progress.say(f"{exported.path}: {exported.size:,} bytes, {exported.metadata.model_name}, {recipe.to_json()}")
    if wide := Recipe.from_json(exported.metadata.recipe).eight_bit_linears:
        progress.say(
            f"  {len(wide)} linears of the language model have 8 bits; python -m mvlm.export.inspect names them"
        )
    if recipe.calibration == "none":
        progress.say(UNCALIBRATED)
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
        work = options.pte_name.with_name(f"{options.pte_name.name}.calibration")
        kept = (
            f"the same command goes on where it was, with what is in {work}" if work.exists() else "nothing was written"
        )
        print(f"mvlm.export: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that a file half written is removed; 128 + 15, as shells count.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

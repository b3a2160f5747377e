"""The correctness test of a ``.pte``; what it compares is in :mod:`mvlm.runtime.fidelity`.

    python -m mvlm.runtime.test_pte mobilevlm.pte --model ./MobileVLM-1.7B --vision-tower ./clip

Exits with 1 and names the rows that failed; with 2 if the input cannot be tested at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.export import demo
from mvlm.export.command_line import add_checkpoint_arguments, open_of
from mvlm.export.progress import Progress, quiet_libraries

if TYPE_CHECKING:
    from mvlm.runtime.fidelity import Row


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.runtime.test_pte",
        description="Compare a .pte with the checkpoint it was made from, stage by stage. Exit code 0: faithful; "
        "1: not, the failing rows are named; 2: the input cannot be tested.",
    )
    parser.add_argument("pte", type=Path, help="a file made by mvlm.export")
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--image", type=Path, help="any picture (default: the bundled one); none for a language model alone"
    )
    parser.add_argument("--prompt", default="Describe the image.", help="question (default: %(default)s)")
    parser.add_argument(
        "--engine",
        choices=("executorch", "llava_main"),
        default="executorch",
        help="whose kernels are tested: those of ExecuTorch's Python runtime alone, or llava_main's, too, which runs "
        "others on some CPUs (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args(arguments)


def tokens_of_llava_main(pte: Path, image: Path | None, question: str, count: int) -> list[int]:
    """The likeliest tokens after a question, as llava_main finds them.

    Raises:
        ValueError: there is no llava_main beside this Python or on the PATH, or it failed.
    """
    beside_python = Path(sys.executable).with_name("llava_main")
    program = str(beside_python) if beside_python.exists() else shutil.which("llava_main")
    if program is None:
        raise ValueError("--engine llava_main: there is no llava_main on the PATH; pip install . puts it there")
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.json"
        picture = ["--image_path", str(image)] if image is not None else []
        command = [
            *(program, "--model_path", str(pte), "--prompt", question, *picture),
            *("--temperature", "0", "--ignore_eos", "--max_new_tokens", str(count)),
            *("--stats_path", str(stats), "--quiet"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise ValueError(f"--engine llava_main: {done.stderr.strip() or f'exit code {done.returncode}'}")
        return json.loads(stats.read_text())["tokens"]


def run(options: argparse.Namespace) -> list[Row]:
    # Late, so that --help and wrong flags answer at once.
    import torch

    from mvlm.export.preprocess import load_image
    from mvlm.export.recipe import Recipe
    from mvlm.export.smoothing import Smoothing, smoothed
    from mvlm.runtime.fidelity import GREEDY_TOKENS, check
    from mvlm.runtime.program import PteError, PteProgram

    progress = Progress(options.quiet)
    program = PteProgram(options.pte)
    if not (options.model or options.random_weights) and program.metadata.model_name != demo.CHECKPOINT.name:
        progress.say(f"no --model given: comparing with the bundled demo checkpoint, {demo.CHECKPOINT}")
    image = None
    if program.metadata.image is not None or options.image:
        program.require_vision()
        image = load_image(options.image or demo.SAMPLE_IMAGE)
    try:
        recipe = Recipe.from_json(program.metadata.recipe)
    except ValueError as error:
        raise PteError(f"{options.pte}: its recipe cannot be read: {error}") from error
    with progress.stage("open checkpoint", counts=False):
        checkpoint = open_of(options)
        if program.smoothing is not None:
            checkpoint = smoothed(checkpoint, Smoothing.read(program.smoothing, checkpoint.config.text))
    other_engine = None
    if options.engine == "llava_main":
        picture = (options.image or demo.SAMPLE_IMAGE) if program.metadata.image is not None else None
        other_engine = partial(tokens_of_llava_main, options.pte, picture, options.prompt, GREEDY_TOKENS)
    with progress.stage("compare"), torch.no_grad():
        return check(program, checkpoint, recipe, image, options.prompt, say=progress.say, other_engine=other_engine)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    quiet_libraries()
    from mvlm.runtime.fidelity import table

    try:
        rows = run(options)
    except ValueError as error:  # ExportError and PteError are such
        print(f"mvlm.runtime.test_pte: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    failed = [f"{row.name} ({row.compared})" for row in rows if not row.passed]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    print(f"{options.pte}: faithful to its checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())

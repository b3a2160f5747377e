"""Asks a demo model about pictures drawn anew and counts the answers that are exactly right.

python -m mvlm.export.demo.evaluate --checkpoint export/demo/mobilevlm-demo --questions 1000
python -m mvlm.export.demo.evaluate --pte mobilevlm.pte --llava-main .venv/bin/llava_main --questions 100
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvlm.export.demo import world
from mvlm.export.demo.data import PromptTokens, normalized, resized
from mvlm.export.demo.tokenizer import EOS_ID
from mvlm.export.models import MobileVLM

#: The longest right answer, three sentences, takes 28 tokens.
MAX_NEW_TOKENS = 40

#: A picture and a question to an answer.
Answerer = Callable[[world.Picture, str], str]


@dataclass(frozen=True)
class Outcome:
    """One question, what was right and what was answered."""

    picture: world.Picture
    question: world.Question
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.question.answer


class EagerModel:
    """Answers with the float32 model, greedily."""

    def __init__(self, model: MobileVLM, tokenizer_model: bytes) -> None:
        self.model = model
        self.tokens = PromptTokens(tokenizer_model)

    @torch.no_grad()
    def __call__(self, picture: world.Picture, question: str) -> str:
        pixels = normalized([resized(picture.image(), self.model.config.vision.image_size)])
        prefix, suffix = (torch.tensor([ids]) for ids in (self.tokens.prefix, self.tokens.question(question)))
        embed = self.model.embed_tokens
        sequence = torch.cat([embed(prefix), self.model.encode_image(pixels), embed(suffix)], dim=1)
        answer: list[int] = []
        for _ in range(MAX_NEW_TOKENS):
            token = int(self.model(sequence)[0, -1].argmax())
            if token == EOS_ID:
                break
            answer.append(token)
            sequence = torch.cat([sequence, embed(torch.tensor([[token]]))], dim=1)
        return self.tokens.processor.decode(answer).strip()


class Runner:
    """Answers with a .pte through ``llava_main``, one process a question."""

    def __init__(self, llava_main: Path, pte: Path, folder: Path) -> None:
        self.llava_main, self.pte, self.folder = llava_main, pte, folder

    def __call__(self, picture: world.Picture, question: str) -> str:
        path = self.folder / f"picture{picture.suffix}"
        path.write_bytes(picture.data)
        command = [
            str(self.llava_main),
            *("--model_path", str(self.pte)),
            *("--image_path", str(path)),
            *("--prompt", question),
            *("--temperature", "0"),
            *("--max_new_tokens", str(MAX_NEW_TOKENS)),
            "--quiet",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\nexited with {result.returncode}: {result.stderr.strip()}")
        return result.stdout.strip()


def ask(answerer: Answerer, count: int, seed: int) -> Iterator[Outcome]:
    """Asks ``count`` questions, every kind in turn, each about a picture of its own.

    Question i depends on the seed and i alone; none of the pictures was trained on.
    """
    for index in range(count):
        rng = random.Random(f"evaluation/{seed}/{index}")
        picture = world.sample_picture(rng)
        question = world.sample_question(picture.scene, world.KINDS[index % len(world.KINDS)], rng)
        yield Outcome(picture, question, answerer(picture, question.question))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts by kind of question, and by what the picture was."""
    right: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        picture = outcome.picture
        layout = "square" if picture.width == picture.height else f"not square, {picture.layout}"
        longer = max(picture.width, picture.height)
        size = "60 to 112 pixels" if longer <= 112 else "113 to 300 pixels" if longer <= 300 else "301 to 800 pixels"
        groups = [
            ("overall", ""),
            ("kind", outcome.question.kind),
            ("picture", layout),
            ("file", picture.format),
            ("longer side", size),
            ("shapes", str(len(picture.scene.objects))),
        ]
        asked.update(groups)
        right.update(groups if outcome.right else ())
    result: dict[str, Any] = {}
    for group in sorted(asked):
        counts = {
            "right": right[group],
            "asked": asked[group],
            "percent": round(100 * right[group] / asked[group], 2),
        }
        if group[1]:
            result.setdefault(group[0], {})[group[1]] = counts
        else:
            result[group[0]] = counts
    return result


def table(result: dict[str, Any]) -> str:
    """A summary for people."""

    def line(name: str, counts: dict[str, Any]) -> str:
        return f"  {name:24s} {counts['right']:5d} of {counts['asked']:5d}  {counts['percent']:6.2f} %"

    lines = [line("overall", result["overall"])]
    for title in ("kind", "picture", "file", "longer side", "shapes"):
        lines += ["", f"by {title}"] + [line(name, counts) for name, counts in result.get(title, {}).items()]
    return "\n".join(lines)


def evaluate_checkpoint(folder: Path, questions: int, seed: int) -> tuple[dict[str, Any], list[Outcome]]:
    """The float32 model of a checkpoint folder: :func:`summary` with what was evaluated in front, and the outcomes."""
    from mvlm.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    outcomes = list(ask(EagerModel(checkpoint.load_model(), checkpoint.tokenizer), questions, seed))
    head = {"model": "float32, eager", "checkpoint_id": checkpoint.checkpoint_id, "seed": seed}
    return head | summary(outcomes), outcomes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.export.demo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="evaluate a checkpoint, in float32")
    what.add_argument("--pte", type=Path, metavar="FILE", help="evaluate an exported model, with --llava-main")
    parser.add_argument("--llava-main", type=Path, metavar="PATH", help="the runner, for --pte")
    parser.add_argument("--questions", type=int, default=1000, help="how many to ask (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and questions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--show-wrong", type=int, default=5, metavar="N", help="print N wrong answers (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="for --checkpoint (default: %(default)s)")
    options = parser.parse_args()
    if options.questions < 1:
        parser.error(f"--questions must be at least 1, not {options.questions}")
    if options.pte and not options.llava_main:
        parser.error("--pte needs --llava-main, the path of the runner (.venv/bin/llava_main after installation)")
    for path in (options.pte, options.llava_main):
        if path and not path.is_file():
            parser.error(f"{path}: no such file")
    torch.set_num_threads(options.threads)

    start = time.monotonic()
    if options.checkpoint:
        result, outcomes = evaluate_checkpoint(options.checkpoint, options.questions, options.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(options.llava_main, options.pte, Path(folder))
            outcomes = list(ask(runner, options.questions, options.seed))
        result = {"model": options.pte.name, "seed": options.seed} | summary(outcomes)
    print(table(result))
    print(f"\n{len(outcomes)} questions in {time.monotonic() - start:.0f} s")
    for outcome in [o for o in outcomes if not o.right][: options.show_wrong]:
        picture = outcome.picture
        print(
            f"wrong: {outcome.question.question} {outcome.answer!r}, right is {outcome.question.answer!r} "
            f"({picture.width} x {picture.height} {picture.format}, {picture.layout}: {world.describe(picture.scene)})"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

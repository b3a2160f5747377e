"""Questions about pictures that nobody here made: the data set easy-vqa, out of the package of that name.

Every picture shows one shape (circle, rectangle, triangle) in one of eight colours; 13 answers, yes and no among them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

#: Of the sample that is asked; another seed would be another thousand questions.
SEED = 1


@dataclass(frozen=True)
class PictureQuestion:
    """A question about a picture.

    Attributes:
        picture: number of the picture within its split.
        path: of the picture, a PNG of 64 x 64 pixels.
        question: as it is asked.
        answer: what is right; one word.
    """

    picture: int
    path: Path
    question: str
    answer: str

    @property
    def kind(self) -> str:
        """What is asked for, by the answer: ``color``, ``shape`` or ``yes/no``."""
        return "color" if self.answer in COLORS else "shape" if self.answer in SHAPES else "yes/no"

    def image(self) -> Image.Image:
        """The picture, decoded."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def read_questions(data: Path, split: str) -> list[PictureQuestion]:
    """All questions of a split, in the package's order.

    Args:
        data: the package's folder ``easy_vqa/data``.
        split: ``train`` (4,000 pictures, 38,575 questions) or ``test`` (1,000 pictures, 9,673 questions).
    """
    folder = data / split
    return [
        PictureQuestion(picture, folder / "images" / f"{picture}.png", question, answer)
        for question, answer, picture in json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    ]


def sample_questions(data: Path, count: int) -> list[PictureQuestion]:
    """``count`` questions of the test split, chosen at random by :data:`SEED`; a shorter sample begins a longer one."""
    questions = read_questions(data, "test")
    random.Random(SEED).shuffle(questions)
    return questions[:count]


def write_calibration_pictures(data: Path, folder: Path, count: int) -> None:
    """The first pictures of the training split and their questions, as ``mvlm.export --calibration-images`` reads them.

    Args:
        data: the package's folder ``easy_vqa/data``.
        folder: to make.
        count: of pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = defaultdict(list)
    for item in read_questions(data, "train"):
        if item.picture < count:
            lines[item.path].append(f"{item.question}\t{item.answer}\n")
    for path, questions in lines.items():
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text("".join(questions), encoding="utf-8")

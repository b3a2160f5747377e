"""A checkpoint, open: what it is, and its weights one at a time. Knows nothing of where the weights come from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.models import MobileVLM, MobileVLMConfig, fused_parts, unfused


class WeightSource(Protocol):
    """Where a checkpoint's weights come from."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name`` of :func:`parameter_shapes`, a float32 tensor of its own, of that shape."""

    def fingerprint(self) -> str:
        """``sha256:…`` over all that the checkpoint is made of."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened: checked in all that can be told without the weights' values, which are read when asked for.

    Attributes:
        name: what people call it: the folder's name, the hub id, or the named model that random weights are for.
        config: sizes; ``config.vision`` is None for a language model alone.
        preprocessing: of pictures; without meaning for a language model alone.
        tokenizer: a SentencePiece model with all tokens in it that the checkpoint's files add.
        bos_id: opens a prompt.
        eos_ids: end an answer.
        prompt_template: text around a question, with ``{prompt}`` in it once.
        unused: tensors that are left out on purpose.
        size: bytes of the weights on disk, 0 for random ones.
        weights: where they come from.
    """

    name: str
    config: MobileVLMConfig
    preprocessing: ImagePreprocessing
    tokenizer: bytes = field(repr=False)
    bos_id: int
    eos_ids: tuple[int, ...]
    prompt_template: str
    unused: tuple[str, ...]
    size: int
    weights: WeightSource = field(repr=False)

    @cached_property
    def checkpoint_id(self) -> str:
        """``sha256:…`` over all files that were read; for random weights over name, seed, generator and sizes.

        Reads all files when it is first asked for, which takes a second for one or two GB.
        """
        return self.weights.fingerprint()

    def read(self, name: str) -> Tensor:
        """A parameter of :class:`MobileVLM` by its name there: float32, contiguous, of the model's shape, a new one.

        The parts of what the model fuses can be read as well.

        Raises:
            KeyError: the model has no such parameter.
            ExportError: a file can no longer be read.
        """
        shapes = parameter_shapes(self.config)
        parts = _parts(self.config).get(name, (name,))
        if parts[0] not in shapes:
            raise KeyError(f"{self.name}: the model has no parameter {name!r}")
        if len(parts) == 1:
            return self.weights.read(parts[0], shapes[parts[0]])
        # Part by part into its place: torch.cat would hold everything twice.
        rows = [shapes[part][0] for part in parts]
        whole = torch.empty(sum(rows), *shapes[parts[0]][1:])
        for part, place in zip(parts, whole.split(rows), strict=True):
            place.copy_(self.weights.read(part, shapes[part]))
        return whole

    def load_part(self, part: nn.Module, prefix: str, device: torch.device | None = None) -> nn.Module:
        """A part of the model, such as one layer, in float32, in eval mode, without gradients.

        Args:
            part: a module of the model on the meta device; it is left as it is.
            prefix: its name in the model.
            device: of the result; the CPU by default.
        """
        loaded = copy.deepcopy(part).eval().requires_grad_(False)
        for name, _ in list(loaded.named_parameters()):
            parent, _, own_name = name.rpartition(".")
            tensor = self.read(f"{prefix}.{name}").to(device or "cpu")
            setattr(loaded.get_submodule(parent), own_name, nn.Parameter(tensor, requires_grad=False))
        return loaded

    def load_model(self) -> MobileVLM:
        """The whole model in float32, in eval mode, without gradients: four bytes of memory for each parameter."""
        model = empty_model(self.config).to_empty(device="cpu").requires_grad_(False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.read(name))
        return model.eval()


def empty_model(config: MobileVLMConfig) -> MobileVLM:
    """The model on the meta device: shapes without memory.

    Raises:
        ValueError: the sizes do not go together.
    """
    with torch.device("meta"):
        return MobileVLM(config)


@lru_cache(maxsize=8)
def parameter_shapes(config: MobileVLMConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint must hold, by its name in ``MobileVLM(config)`` with nothing fused.

    Raises:
        ValueError: the sizes do not go together.
    """
    model = empty_model(config)
    return {name: tuple(tensor.shape) for name, tensor in unfused(model, dict(model.named_parameters())).items()}


@lru_cache(maxsize=8)
def _parts(config: MobileVLMConfig) -> Mapping[str, tuple[str, ...]]:
    return fused_parts(empty_model(config))

"""Smoothing: the same model with its weights scaled so that what its linears are given is easier to round.

A linear's inputs are rounded to 8 bits with one scale for each token, which the largest of them sets; a few inputs that
are always much larger than the others leave these few steps. As SmoothQuant does (https://arxiv.org/abs/2211.10438),
inputs that are large are made smaller, and the columns of the weight that meet them larger. What is made smaller lies
before: the weight of a norm, the rows of up_proj before down_proj, those of v_proj before o_proj.

Scales are powers of two, so nothing is rounded: the float model computes the same numbers, bit for bit. The scales go
into the file (:data:`contract.SMOOTHING`) for whoever wants to compare its weights with the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvlm.export.checkpoint import Checkpoint, WeightSource
from mvlm.export.errors import ExportError
from mvlm.export.models import MobileLlamaConfig

#: Share of the way from inputs that are as different as they are to inputs of equal power. Half of the way is where
#: rounded inputs alone cost a real Llama of 135 million parameters least (0.0086 nats a token instead of 0.0199), but
#: then 4-bit weights in groups cost more; a quarter gains as much without that.
STRENGTH = 0.25

_LAYER = re.compile(r"language_model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Smoothing:
    """By which power of two each input of each linear is divided.

    Attributes:
        exponents: int8 [layers, 2 D + K H + F]: of the inputs of q/k/v, of o_proj (of a key-value head, for all query
            heads that share it), of gate and up, and of down_proj.
    """

    exponents: Tensor

    @classmethod
    def read(cls, exponents: Tensor, config: MobileLlamaConfig) -> Smoothing:
        """Those of a file.

        Raises:
            ExportError: they are not of a model of these sizes.
        """
        K, H = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, 2 * config.hidden_size + K * H + config.intermediate_size)
        if exponents.dtype != torch.int8 or tuple(exponents.shape) != shape:
            raise ExportError(
                f"the file's smoothing is {exponents.dtype} {list(exponents.shape)}, the checkpoint's would be int8 "
                f"{list(shape)}: it was made of another checkpoint"
            )
        return cls(exponents)

    def of_layer(self, index: int, config: MobileLlamaConfig) -> dict[str, Tensor]:
        """The scales of a layer by the linear that gets the inputs: float32 ``2^e``."""
        D, F = config.hidden_size, config.intermediate_size
        sizes = {"qkv": D, "o": config.num_key_value_heads * config.head_dim, "gate_up": D, "down": F}
        parts = self.exponents[index].float().exp2().split(list(sizes.values()))
        return dict(zip(sizes, parts, strict=True))


def find_smoothing(powers: Mapping[str, Tensor], config: MobileLlamaConfig, strength: float = STRENGTH) -> Smoothing:
    """The scales that inputs of such powers want.

    Args:
        powers: second moment [in] of each linear's inputs, by its name in the model.
        config: of the language model.
        strength: see :data:`STRENGTH`.
    """
    K, H = config.num_key_value_heads, config.head_dim
    rows = []
    for index in range(config.num_hidden_layers):
        parts = []
        for linear in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            power = powers[f"language_model.layers.{index}.{linear}"].double()
            # An input that was never anything but zero is no reason to scale by a thousand.
            logs = power.clamp_min(1e-6 * float(power.mean()) + torch.finfo(torch.float32).tiny).log2() / 2
            if linear == "self_attn.o_proj":
                logs = logs.view(K, -1, H).mean(1).flatten()
            parts.append(strength * (logs - logs.mean()))
        rows.append(torch.cat(parts).round().to(torch.int8))
    return Smoothing(torch.stack(rows))


def smoothed(checkpoint: Checkpoint, smoothing: Smoothing) -> Checkpoint:
    """The same checkpoint with its weights scaled; what it is called and was made of stays."""
    return replace(checkpoint, weights=_SmoothedWeights(checkpoint.weights, checkpoint.config.text, smoothing))


@dataclass(frozen=True)
class _SmoothedWeights:
    """The weights of another source, scaled as they are read."""

    source: WeightSource
    config: MobileLlamaConfig
    smoothing: Smoothing

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.source.read(name, shape)
        match = _LAYER.fullmatch(name)
        if match is None:
            return tensor
        scales = self.smoothing.of_layer(int(match[1]), self.config)
        part = match[2]
        if part == "input_layernorm":
            return tensor / scales["qkv"]
        if part == "post_attention_layernorm":
            return tensor / scales["gate_up"]
        if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            tensor *= scales["qkv"]
            return tensor / scales["o"].unsqueeze(1) if part == "self_attn.v_proj" else tensor
        if part == "self_attn.o_proj":
            K, H = self.config.num_key_value_heads, self.config.head_dim
            shared = scales["o"].view(K, 1, H).expand(K, self.config.num_attention_heads // K, H)
            return tensor * shared.reshape(-1)
        if part in ("mlp.gate_proj", "mlp.up_proj"):
            tensor *= scales["gate_up"]
            return tensor / scales["down"].unsqueeze(1) if part == "mlp.up_proj" else tensor
        return tensor * scales["down"] if part == "mlp.down_proj" else tensor

    def fingerprint(self) -> str:
        return self.source.fingerprint()

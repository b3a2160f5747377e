"""Linears that share their input, as one: a matrix product in place of two or three.

Checkpoints hold the parts (``q_proj``, ``k_proj`` and ``v_proj``; ``gate_proj`` and ``up_proj``), the model one matrix
of their rows one after another (``qkv_proj``, ``gate_up_proj``, as vLLM calls them). That is the same arithmetic, also
when quantized, for every row of a weight has scales of its own. But the input is quantized and read once instead of
two or three times, and threads meet once instead of two or three times, which is what a step of decoding waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FusedLinear(nn.Linear):
    """Several linears of one input. ``load_state_dict`` takes the fused parameters or those of the parts.

    Args:
        in_features: width of the input.
        parts: name -> output width of each linear, in the order of their rows.
        bias: whether they have biases.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool) -> None:
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = dict(parts)
        self.register_load_state_dict_pre_hook(_fuse_parts)


def _fuse_parts(module: FusedLinear, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    parent = prefix.removesuffix(".").rpartition(".")[0]
    for kind in ("weight", "bias"):
        names = [".".join(filter(None, (parent, part, kind))) for part in module.parts]
        if all(name in state for name in names):
            state[prefix + kind] = torch.cat([state.pop(name) for name in names])


def _fused_parameters(model: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    """Name of every fused parameter, and of its parts with their numbers of rows."""
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            parent = name.rpartition(".")[0]
            for kind, _ in module.named_parameters():
                parts = {".".join(filter(None, (parent, part, kind))): rows for part, rows in module.parts.items()}
                yield f"{name}.{kind}", parts


def fused_parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of every fused parameter -> names of its parts, in order."""
    return {name: tuple(parts) for name, parts in _fused_parameters(model)}


def unfused(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's names, such as its ``state_dict()``, with the parts in place of what is fused."""
    fused = dict(_fused_parameters(model))
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in fused:
            result |= zip(fused[name], tensor.split(list(fused[name].values())), strict=True)
        else:
            result[name] = tensor
    return result

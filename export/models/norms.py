"""Norms, alone and together with the addition before them, by our operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mvlm.ops


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return mvlm.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """``x + branch``, and its norm."""
        return mvlm.ops.add_layer_norm(x, branch, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return mvlm.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """``x + branch``, and its norm."""
        return mvlm.ops.add_rms_norm(x, branch, self.weight, self.eps)

"""The projectors between vision tower and language model: LDP, LDPv2, and LLaVA's MLP and linear ones.

Shape letters: B pictures, G patches along a side of the grid, P = G * G patches, V width of the vision features,
D width of the language model, T image tokens.

LDP and LDPv2 are the light downsampling projectors of MobileVLM (https://arxiv.org/abs/2312.16886, section 3.3) and
MobileVLM V2 (https://arxiv.org/abs/2402.03766, section 3.3); both leave (G / 2)^2 tokens. Their 1x1 convolutions are
held as linear layers over the channels, which is the same arithmetic, so that they can be quantized like any linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mvlm.ops
from mvlm.export.models.norms import LayerNorm


def _grid_size(num_patches: int) -> int:
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise ValueError(f"the projector needs a square grid of patches, got {num_patches} patches")
    return grid


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution with padding 1 over a grid of tokens: [B, G*G, D] to [B, G'*G', D]."""

    def __init__(self, channels: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=bias)

    def forward(self, x_BPD: Tensor) -> Tensor:
        # Our operator takes tokens and weights channels last, and so the tokens as they lie.
        conv = self.conv
        weight_33D = conv.weight.squeeze(1).permute(1, 2, 0)
        grid = _grid_size(x_BPD.shape[1])
        return mvlm.ops.depthwise_conv2d(x_BPD, weight_33D, conv.bias, grid, conv.stride[0], conv.padding[0])


def hardsigmoid(x: Tensor) -> Tensor:
    """``clamp(x / 6 + 1 / 2, 0, 1)``, in operators that XNNPACK takes (torch's own would be cut into others)."""
    return (x * (1 / 6) + 0.5).clamp(0, 1)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the mean over all tokens (https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A quarter: MobileNetV3's ratio (https://arxiv.org/abs/1905.02244, section 5.3).
        self.fc1 = nn.Linear(channels, channels // 4)
        self.fc2 = nn.Linear(channels // 4, channels)

    def forward(self, x_BPD: Tensor) -> Tensor:
        B, P, _ = x_BPD.shape
        # The mean as a matrix product: XNNPACK takes that, and no mean over tokens.
        gate_B1D = torch.bmm(x_BPD.new_full((B, 1, P), 1 / P), x_BPD)
        gate_B1D = hardsigmoid(self.fc2(nn.functional.relu(self.fc1(gate_B1D))))
        return x_BPD * gate_B1D


class InvertedResidual(nn.Module):
    """MobileNetV3's block with LayerNorm over the channels in place of BatchNorm, and no expansion."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.has_residual = stride == 1
        self.depthwise = DepthwiseConv(channels, stride)
        self.depthwise_norm = LayerNorm(channels, eps=1e-5)
        self.squeeze_excite = SqueezeExcite(channels)
        self.pointwise = nn.Linear(channels, channels, bias=False)
        self.pointwise_norm = LayerNorm(channels, eps=1e-5)

    def forward(self, x_BPD: Tensor) -> Tensor:
        y = self.depthwise_norm(self.depthwise(x_BPD))
        y = y * hardsigmoid(y)  # hardswish
        y = self.pointwise_norm(self.pointwise(self.squeeze_excite(y)))
        return x_BPD + y if self.has_residual else y


class LDP(nn.Module):
    """MobileVLM V1's projector (``ldpnet``): two linears, then two inverted residuals, the second of stride 2."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.blocks = nn.Sequential(InvertedResidual(hidden_size, stride=1), InvertedResidual(hidden_size, stride=2))

    def forward(self, features_BPV: Tensor) -> Tensor:
        return self.blocks(self.mlp(features_BPV))


class LDPv2(nn.Module):
    """MobileVLM V2's projector (``ldpnetv2``): two linears, 2x2 mean, and a depthwise convolution with a skip."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.positional_encoding = DepthwiseConv(hidden_size, bias=True)

    def forward(self, features_BPV: Tensor) -> Tensor:
        x_BPD = self.mlp(features_BPV)
        _, P, D = x_BPD.shape
        # A mean over 2x2 tokens is a depthwise convolution, too.
        quarter = torch.full((2, 2, D), 0.25, device=x_BPD.device)
        x_BTD = mvlm.ops.depthwise_conv2d(x_BPD, quarter, None, _grid_size(P), 2, 0)
        return x_BTD + self.positional_encoding(x_BTD)


def _mlp2x_gelu(vision_size: int, hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


#: Value of ``mm_projector_type`` in config.json -> how to build it from the widths V and D.
PROJECTOR_TYPES: dict[str, Callable[[int, int], nn.Module]] = {
    "ldpnet": LDP,
    "ldpnetv2": LDPv2,
    "mlp2x_gelu": _mlp2x_gelu,
    "linear": nn.Linear,
}

_HALVES_THE_GRID = {"ldpnet", "ldpnetv2"}


def build_projector(projector_type: str, vision_size: int, hidden_size: int) -> nn.Module:
    """Builds a projector [B, P, vision_size] -> [B, T, hidden_size].

    Raises:
        ValueError: ``projector_type`` is not one of :data:`PROJECTOR_TYPES`.
    """
    if projector_type not in PROJECTOR_TYPES:
        raise ValueError(
            f"mm_projector_type {projector_type!r} is not supported; supported: {', '.join(PROJECTOR_TYPES)}"
        )
    return PROJECTOR_TYPES[projector_type](vision_size, hidden_size)


def image_token_count(projector_type: str, num_patches: int) -> int:
    """How many tokens T the language model sees for one picture of ``num_patches`` patches.

    Raises:
        ValueError: a downsampling projector and a grid that is not square and even.
    """
    if projector_type not in _HALVES_THE_GRID:
        return num_patches
    grid = _grid_size(num_patches)
    if grid % 2:
        raise ValueError(f"{projector_type} halves the grid of patches, but {grid} x {grid} is odd")
    return (grid // 2) ** 2

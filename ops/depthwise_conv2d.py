"""``mvlm::depthwise_conv2d``: depthwise convolution over a grid of tokens, channels last.

A projector's tokens [B, Gh * Gw, D] are the rows of a grid of Gh x Gw, each with D channels. Every channel is convolved
(cross-correlated, as convolutions of neural networks are) with its own kernel, over zeros around the grid:

    out[b, y, x, d] = bias[d] + sum over i < kh, j < kw of
                      weight[i, j, d] * input[b, y * stride + i - padding, x * stride + j - padding, d]

Nothing is transposed on the way, as it is around torch's convolutions, which want [B, D, Gh, Gw]. With weights of
1 / (kh * kw) and no padding it is average pooling.

Here are the schema, the eager reference and the shape function. The kernel that a .pte runs is in
``depthwise_conv2d.cpp`` and ``depthwise_conv2d_kernel.cpp``.
"""

from __future__ import annotations

import torch

from .definition import define, require, require_float32

_OPERATOR = "depthwise_conv2d"


def depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid_width: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Convolves every channel of a grid of tokens with its own kernel.

    Args:
        input: float32 [B, Gh * Gw, D], B >= 1, D >= 1; token y * Gw + x lies in row y and column x.
        weight: float32 [kh, kw, D], kh >= 1, kw >= 1. (torch's [D, 1, kh, kw] is ``permute(2, 3, 1, 0)[:, :, 0]``.)
        bias: float32 [D], or None for zeros.
        grid_width: Gw >= 1; a divisor of the number of tokens.
        stride: steps between the places of the kernel, down and to the right; >= 1.
        padding: rows and columns of zeros on each side; from 0 to min(kh, kw) - 1.

    Returns:
        float32 [B, Oh * Ow, D], contiguous, with Oh = (Gh + 2 * padding - kh) // stride + 1 and Ow alike.

    Raises:
        ValueError: an argument is not as described, or the kernel is larger than the padded grid. (In a .pte the
            kernel fails with Error::InvalidArgument and logs the same.)
    """
    return torch.ops.mvlm.depthwise_conv2d(input, weight, bias, grid_width, stride, padding)


def _shapes(input, weight, bias, grid_width, stride, padding):
    require_float32(_OPERATOR, input=input, weight=weight, bias=bias)
    require(
        input.dim() == 3 and all(size >= 1 for size in input.shape),
        _OPERATOR,
        f"input has shape {list(input.shape)}; it must be [batch, tokens, channels], each at least 1",
    )
    batch, tokens, channels = input.shape
    require(
        weight.dim() == 3 and weight.shape[0] >= 1 and weight.shape[1] >= 1 and weight.shape[2] == channels,
        _OPERATOR,
        f"weight has shape {list(weight.shape)}; with input {list(input.shape)} it must be "
        f"[1 or more, 1 or more, {channels}]",
    )
    if bias is not None:
        require(
            bias.shape == input.shape[2:],
            _OPERATOR,
            f"bias has shape {list(bias.shape)}; with input {list(input.shape)} it must be [{channels}]",
        )
    require(
        grid_width >= 1 and tokens % grid_width == 0,
        _OPERATOR,
        f"grid_width is {grid_width}; with {tokens} tokens it must be a positive divisor of that",
    )
    require(stride >= 1, _OPERATOR, f"stride is {stride}; it must be at least 1")
    kernel = weight.shape[:2]
    require(
        0 <= padding < min(kernel),
        _OPERATOR,
        f"padding is {padding}; with a kernel of {kernel[0]} x {kernel[1]} it must be from 0 to {min(kernel) - 1}",
    )
    grid = (tokens // grid_width, grid_width)
    require(
        all(size + 2 * padding >= extent for size, extent in zip(grid, kernel, strict=True)),
        _OPERATOR,
        f"a kernel of {kernel[0]} x {kernel[1]} does not fit a grid of {grid[0]} x {grid[1]} with padding {padding}",
    )
    rows, columns = ((size + 2 * padding - extent) // stride + 1 for size, extent in zip(grid, kernel, strict=True))
    return ((batch, rows * columns, channels),)


def _eager(input, weight, bias, grid_width, stride, padding):
    channels = input.shape[2]
    channels_first = input.unflatten(1, (-1, grid_width)).permute(0, 3, 1, 2)
    result = torch.nn.functional.conv2d(
        channels_first, weight.permute(2, 0, 1).unsqueeze(1), bias, stride, padding, groups=channels
    )
    return result.flatten(2).transpose(1, 2).contiguous()


define(
    _OPERATOR,
    "Tensor input, Tensor weight, Tensor? bias, int grid_width, int stride, int padding",
    _shapes,
    _eager,
)

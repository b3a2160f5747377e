"""How the scale of a group of weights is chosen, and values rounded to it.

Pure functions of tensors; knows nothing of models, recipes or files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Half-quadratic quantization ends after this many rounds, or when no scale changes by more than this share; torchao's.
HQQ_ITERATIONS = 20
HQQ_TOLERANCE = 1e-5

#: Scales that are tried for a group, as shares of the one with which no weight is cut off.
SCALE_SHARES = tuple(1.0 - 0.04 * step for step in range(16))

#: Weights of whose groups scales are searched at once: about what a core's cache holds with the temporaries.
SEARCH_ELEMENTS = 1 << 18


def value_range(bits: int) -> tuple[int, int]:
    """The least and the greatest of signed integers with so many bits: -8 and 7 for 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def search_scales(weight: Tensor, importance: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of every group that makes the squared error of rounding least, weighted by the power of the inputs.

    Of every group some shares of its range are tried, each is improved by the least-squares scale for the values that
    it gives, and the best of all is taken.

    Args:
        weight: float32 [out, in].
        importance: [in]; the second moment of each input, all equal for the plain squared error.
        group_size: weights that share a scale; divides ``in``.
        bits: of a value.
        dtype: in which scales are stored; the search knows their rounding.

    Returns:
        float32 [out, in / group_size], positive, exactly representable in ``dtype``.
    """
    low, high = value_range(bits)
    rows, columns = weight.shape
    # Inputs that never were anything but zero must not make all scales of a group equally good.
    importance = importance.clamp_min(1e-6 * float(importance.mean()) + torch.finfo(torch.float32).tiny)
    importance_GS = importance.view(-1, group_size)
    tiny = torch.finfo(torch.bfloat16).smallest_normal

    def stored(scale: Tensor) -> Tensor:
        return scale.clamp_min(tiny).to(dtype).float()

    result = torch.empty(rows, columns // group_size, device=weight.device)
    block_rows = max(1, SEARCH_ELEMENTS // columns)
    for block, best_scale in zip(weight.split(block_rows), result.split(block_rows), strict=True):
        groups_RGS = block.reshape(len(block), -1, group_size)
        weighted_RGS = groups_RGS * importance_GS
        values = torch.empty_like(groups_RGS)
        scratch = torch.empty_like(groups_RGS)
        # With the range -8 .. 7 the end of larger magnitude may be the negative one, which reaches further.
        whole = torch.maximum(groups_RGS.amax(-1) / high, groups_RGS.amin(-1) / low)
        best_gain = torch.full_like(whole, -1.0)

        def products(scale: Tensor) -> tuple[Tensor, Tensor]:
            """sum(h w q) and sum(h q^2) over each group, for the values q that ``scale`` gives."""
            torch.mul(groups_RGS, scale.reciprocal().unsqueeze(-1), out=values)  # noqa: B023
            values.round_().clamp_(low, high)  # noqa: B023
            wq = torch.linalg.vecdot(weighted_RGS, values)  # noqa: B023
            torch.mul(values, importance_GS, out=scratch)  # noqa: B023
            return wq, torch.linalg.vecdot(scratch, values)  # noqa: B023

        def keep_better(scale: Tensor) -> Tensor:
            """Takes ``scale`` where it is the best so far; gives the least-squares scale for the values it makes."""
            wq, qq = products(scale)
            # sum(h w^2) - sum(h (w - s q)^2): how much of the group's weighted power is met.
            gain = scale * (2 * wq - scale * qq)
            better = gain > best_gain  # noqa: B023
            best_gain[better] = gain[better]  # noqa: B023
            best_scale[better] = scale[better]  # noqa: B023
            return stored(torch.where(qq > 0, wq / qq, scale))

        for share in SCALE_SHARES:
            keep_better(keep_better(stored(whole * share)))
    return result


def round_to_scales(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Each weight [out, in] as the nearest multiple of its group's scale [out, groups]: int8 values [out, in]."""
    low, high = value_range(bits)
    groups = weight.reshape(*scales.shape, -1)
    return (groups / scales.unsqueeze(-1)).round_().clamp_(low, high).to(torch.int8).view(weight.shape)


def choose_scales_hqq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """4-bit values and the scales that lower their squared error: half-quadratic quantization, scales only.

    Rounding with the present scale and solving the least-squares problem for the scale take turns
    (https://mobiusml.github.io/hqq_blog). The same as torchao's ``hqq_scale_only``, three times as fast on a CPU: one
    buffer, and products summed as they are made.

    Args:
        weight: float32 [out, in].
        group_size: divides ``in``.

    Returns:
        int8 [out, in] with values -8 .. 7, and float32 scales [out, in / group_size].
    """
    tiny = torch.finfo(torch.float32).eps
    groups = weight.reshape(weight.shape[0], -1, group_size)
    values = torch.empty_like(groups)

    def round_by(scale: Tensor) -> Tensor:
        return torch.mul(groups, scale.reciprocal().unsqueeze(-1), out=values).round_().clamp_(-8, 7)

    scale = (torch.linalg.vector_norm(groups, math.inf, dim=-1) / 8).clamp_min(tiny)
    for _ in range(HQQ_ITERATIONS):
        round_by(scale)
        products = torch.linalg.vecdot(groups, values)
        squares = torch.linalg.vecdot(values, values)
        better = torch.where(squares > 0, products / squares, scale).clamp_min(tiny)
        change = ((better - scale).abs() / scale).max()
        scale = better
        if change < HQQ_TOLERANCE:
            break
    return round_by(scale).view(weight.shape).to(torch.int8), scale

"""What the attention operators share: the packed projection, and checks whose messages name the operator.

A packed projection is float32 [1, n, (heads + 2 * kv_heads) * head_dim], the result of one matrix product: every token
holds all its query heads, then all its key heads, then all its value heads.
"""

from __future__ import annotations

import math

import torch

from .definition import require


def check_tensor(
    operator: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], dims: int, layout: str
) -> None:
    """Checks type, rank and, where ``layout`` starts with a 1, that the first dimension is 1."""
    allowed = " or ".join(str(dtype) for dtype in dtypes)
    require(tensor.dtype in dtypes, operator, f"{name} is {tensor.dtype}; it must be {allowed}")
    require(
        tensor.dim() == dims and (not layout.startswith("[1,") or tensor.shape[0] == 1),
        operator,
        f"{name} has shape {list(tensor.shape)}; it must be {layout}",
    )


def check_scale(operator: str, scale: float | None) -> None:
    require(
        scale is None or (math.isfinite(scale) and scale > 0),
        operator,
        f"scale is {scale}; it must be positive and finite",
    )


def check_out(operator: str, out: torch.Tensor, result: torch.Tensor) -> None:
    """Checks the tensor of an ``.out`` variant against the result that it is to hold."""
    require(out.dtype == result.dtype, operator, f"out is {out.dtype}; it must be {result.dtype}")
    require(
        out.shape == result.shape,
        operator,
        f"out has shape {list(out.shape)}; it must be {list(result.shape)}",
    )


def split_heads(qkv: torch.Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Queries [B, n, heads, head_dim], keys and values [B, n, kv_heads, head_dim] of a packed projection."""
    return qkv.unflatten(2, (heads + 2 * kv_heads, head_dim)).split([heads, kv_heads, kv_heads], dim=2)

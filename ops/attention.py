"""``mvlm::attention``: self attention without a mask, as vision transformers have it.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        (Vaswani et al., 2017, equation 1)

Here are the schema, the eager reference and the shape function. The kernel that a .pte runs is in
``attention.cpp`` and ``attention_kernel.cpp``.
"""

from __future__ import annotations

import torch

from .definition import add_reference, make_differentiable, require
from .packed_qkv import check_out, check_scale, check_tensor, split_heads

_OPERATOR = "attention"
_ARGUMENTS = "Tensor qkv, int heads, *, float? scale=None"

# Kept for the life of the process: the operators go away with it.
_library = torch.library.Library("mvlm", "FRAGMENT")
_library.define(f"{_OPERATOR}({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# What ExecuTorch's memory planning turns the operator above into.
_library.define(f"{_OPERATOR}.out({_ARGUMENTS}, Tensor(a!) out) -> Tensor(a!)")


def attention(qkv: torch.Tensor, heads: int, *, scale: float | None = None) -> torch.Tensor:
    """Lets every token attend to all tokens.

    Args:
        qkv: float32 [B, n, 3 * heads * head_dim], n >= 1: per token all query heads, then all key heads, then all
            value heads. In a .pte B must be 1.
        heads: how many there are of each.
        scale: what query-key products are multiplied by, positive; 1 / sqrt(head_dim) by default.

    Returns:
        float32 [B, n, heads * head_dim], contiguous.

    Raises:
        ValueError: an argument is not as described. (In a .pte the kernel fails with Error::InvalidArgument and logs
            the same.)
    """
    return torch.ops.mvlm.attention(qkv, heads, scale=scale)


def _check(qkv: torch.Tensor, heads: int, scale: float | None) -> int:
    """Checks everything and returns head_dim."""
    check_tensor(_OPERATOR, "qkv", qkv, (torch.float32,), 3, "[batch, tokens, 3 * heads * head_dim]")
    require(heads >= 1, _OPERATOR, f"heads is {heads}; it must be at least 1")
    batch, tokens, width = qkv.shape
    require(
        batch >= 1 and tokens >= 1 and width >= 1 and width % (3 * heads) == 0,
        _OPERATOR,
        f"qkv has shape {list(qkv.shape)}; with heads {heads} it must be [batch, tokens, a multiple of {3 * heads}], "
        "with at least one token",
    )
    check_scale(_OPERATOR, scale)
    return width // (3 * heads)


def _eager(qkv: torch.Tensor, heads: int, *, scale: float | None = None) -> torch.Tensor:
    """The reference: what the operator means, without any thought of speed."""
    head_dim = _check(qkv, heads, scale)
    # [B * heads, n, head_dim], for torch.bmm, which is captured as it is; a product of four dimensions makes copies.
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in split_heads(qkv, heads, heads, head_dim))
    scores = torch.bmm(q, k.transpose(1, 2)) * (head_dim**-0.5 if scale is None else scale)  # [B * heads, n, n]
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).contiguous()


def _eager_out(qkv: torch.Tensor, heads: int, *, scale: float | None = None, out: torch.Tensor) -> torch.Tensor:
    check_out(_OPERATOR, out, _fake(qkv, heads, scale=scale))
    return out.copy_(_eager(qkv, heads, scale=scale))


def _fake(qkv: torch.Tensor, heads: int, *, scale: float | None = None) -> torch.Tensor:
    """Shapes only, for tracing and memory planning."""
    head_dim = _check(qkv, heads, scale)
    return qkv.new_empty((*qkv.shape[:2], heads * head_dim))


def _fake_out(qkv: torch.Tensor, heads: int, *, scale: float | None = None, out: torch.Tensor) -> torch.Tensor:
    _check(qkv, heads, scale)
    return out


_library.impl(_OPERATOR, _eager, "CompositeExplicitAutograd")
_library.impl(f"{_OPERATOR}.out", _eager_out, "CompositeExplicitAutograd")
torch.library.register_fake(f"mvlm::{_OPERATOR}", _fake, lib=_library)
torch.library.register_fake(f"mvlm::{_OPERATOR}.out", _fake_out, lib=_library)
make_differentiable(_OPERATOR, _eager)
add_reference(_OPERATOR, _eager)

"""mvlm::attention, eager and native, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from attention_programs import export, load
from torch.nn.functional import scaled_dot_product_attention

from mvlm.ops import attention

MAX_TOKENS = 600
TOLERANCE = 2e-6  # inputs and outputs are of magnitude 1


class Attention(torch.nn.Module):
    def __init__(self, heads: int, scale: float | None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return torch.ops.mvlm.attention(qkv, self.heads, scale=self.scale)


@functools.cache
def exported(heads: int, head_dim: int, scale: float | None) -> bytes:
    return export(Attention(heads, scale), (torch.zeros(1, 3, 3 * heads * head_dim),), MAX_TOKENS)


def native(heads: int, head_dim: int, scale: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    function = load(exported(heads, head_dim, scale))
    return lambda qkv: function(qkv)[0]


def eager(heads: int, head_dim: int, scale: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda qkv: attention(qkv, heads, scale=scale)


def reference(qkv: torch.Tensor, heads: int, scale: float | None) -> torch.Tensor:
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in qkv.double().chunk(3, dim=-1))
    return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize("implementation", [eager, native])
@pytest.mark.parametrize(
    ("heads", "head_dim", "scale"), [(4, 64, None), (2, 80, None), (3, 7, 0.5), (1, 128, None), (2, 1, 1.5)]
)
def test_equals_torch(heads: int, head_dim: int, scale: float | None, implementation: Callable) -> None:
    function = implementation(heads, head_dim, scale)
    generator = torch.Generator().manual_seed(head_dim)
    for tokens in [1, 2, 5, 24, 25, 64, 197, 577]:
        qkv = torch.randn(1, tokens, 3 * heads * head_dim, generator=generator)
        result = function(qkv)
        assert result.is_contiguous()
        torch.testing.assert_close(result, reference(qkv, heads, scale), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("qkv", "heads", "scale", "message"),
    [
        (torch.zeros(1, 2, 12).half(), 2, None, "qkv is torch.float16"),
        (torch.zeros(2, 12), 2, None, r"qkv has shape \[2, 12\]"),
        (torch.zeros(0, 2, 12), 2, None, r"qkv has shape \[0, 2, 12\]"),
        (torch.zeros(1, 0, 12), 2, None, "at least one token"),
        (torch.zeros(1, 2, 0), 2, None, "multiple of 6"),
        (torch.zeros(1, 2, 15), 2, None, "multiple of 6"),
        (torch.zeros(1, 2, 12), 0, None, "heads is 0"),
        (torch.zeros(1, 2, 12), -2, None, "heads is -2"),
        (torch.zeros(1, 2, 12), 2, 0.0, "scale is 0.0"),
    ],
)
def test_eager_and_fake_reject_wrong_arguments(
    qkv: torch.Tensor, heads: int, scale: float | None, message: str
) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message):
            attention(qkv.to(device), heads, scale=scale)


def test_out_variant() -> None:
    qkv = torch.randn(1, 5, 24)
    out = torch.empty(1, 5, 8)
    assert torch.ops.mvlm.attention.out(qkv, 2, scale=0.3, out=out) is out
    assert torch.equal(out, attention(qkv, 2, scale=0.3))
    with pytest.raises(ValueError, match=r"out has shape \[1, 4, 8\]"):
        torch.ops.mvlm.attention.out(qkv, 2, out=torch.empty(1, 4, 8))


def test_opcheck() -> None:
    qkv = torch.randn(1, 5, 24)
    torch.library.opcheck(torch.ops.mvlm.attention.default, (qkv, 2), {"scale": 0.5})
    torch.library.opcheck(
        torch.ops.mvlm.attention.out,
        (qkv, 2),
        {"out": torch.empty(1, 5, 8)},
        # Out variants are not meant for tracing: torch.compile has no functional form of them.
        test_utils=("test_schema", "test_faketensor"),
    )

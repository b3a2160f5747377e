"""``mvlm::swiglu`` and ``mvlm::quick_gelu``: activations that are a number times a sigmoid.

    silu(x) = x * sigmoid(x)                 (Elfwing et al., 2017, https://arxiv.org/abs/1702.03118)
    swiglu(gate, up) = silu(gate) * up       (Shazeer, 2020, https://arxiv.org/abs/2002.05202)
    quick_gelu(x) = x * sigmoid(1.702 x)     (Hendrycks & Gimpel, 2016, https://arxiv.org/abs/1606.08415; OpenAI's CLIP)

Here are the schemas, the eager references and the shape functions. The kernels that a .pte runs are in
``activation.cpp`` and ``activation_kernel.cpp``.
"""

from __future__ import annotations

import torch

from .definition import define, require, require_float32


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, where gate is the first half of the last dimension and up the second.

    Args:
        gate_up: float32 [..., 2 * F], F >= 1.

    Returns:
        float32 [..., F], contiguous.

    Raises:
        ValueError: the argument is not as described. (In a .pte the kernel fails with Error::InvalidArgument and logs
            the same.)
    """
    return torch.ops.mvlm.swiglu(gate_up)


def quick_gelu(input: torch.Tensor) -> torch.Tensor:
    """``input * sigmoid(1.702 * input)``, element by element.

    Args:
        input: float32, of any shape.

    Returns:
        float32, of the same shape, contiguous.

    Raises:
        ValueError: as :func:`swiglu`.
    """
    return torch.ops.mvlm.quick_gelu(input)


def _swiglu_shapes(gate_up):
    require_float32("swiglu", gate_up=gate_up)
    require(
        gate_up.dim() >= 1 and gate_up.shape[-1] >= 2 and gate_up.shape[-1] % 2 == 0,
        "swiglu",
        f"gate_up has shape {list(gate_up.shape)}; it must be [..., 2 * F] with an even last dimension of at least 2",
    )
    return ((*gate_up.shape[:-1], gate_up.shape[-1] // 2),)


def _swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _quick_gelu_shapes(input):
    require_float32("quick_gelu", input=input)
    return (input.shape,)


def _quick_gelu(input):
    return input * torch.sigmoid(1.702 * input)


define("swiglu", "Tensor gate_up", _swiglu_shapes, _swiglu)
define("quick_gelu", "Tensor input", _quick_gelu_shapes, _quick_gelu)

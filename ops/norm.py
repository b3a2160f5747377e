"""``mvlm::rms_norm``, ``mvlm::layer_norm``, and the same fused with the addition before them.

RMSNorm (Zhang & Sennrich, 2019, https://arxiv.org/abs/1910.07467) and LayerNorm (Ba et al., 2016,
https://arxiv.org/abs/1607.06450) of every row x of D numbers, the last dimension:

    rms_norm:    x / sqrt(mean(x^2) + eps) * weight
    layer_norm:  (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

In a transformer the rows are the sum of a residual stream and of a branch, and that sum is needed later, too. The
``add_`` operators return both and go through memory once.

Here are the schemas, the eager references and the shape functions. The kernels that a .pte runs are in ``norm.cpp``
and ``norm_kernel.cpp``.
"""

from __future__ import annotations

import torch

from .definition import define, require, require_eps, require_float32


def rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``input / sqrt(mean(input^2) + eps) * weight`` over the last dimension.

    Args:
        input: float32 [..., D], D >= 1.
        weight: float32 [D].
        eps: added to the mean square; not negative.

    Returns:
        float32 [..., D], contiguous.

    Raises:
        ValueError: an argument is not as described. (In a .pte the kernel fails with Error::InvalidArgument and logs
            the same.)
    """
    return torch.ops.mvlm.rms_norm(input, weight, eps)


def layer_norm(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension.

    Args:
        input: float32 [..., D], D >= 1.
        weight: float32 [D].
        bias: float32 [D].
        eps: added to the variance; not negative.

    Returns:
        float32 [..., D], contiguous.

    Raises:
        ValueError: as :func:`rms_norm`.
    """
    return torch.ops.mvlm.layer_norm(input, weight, bias, eps)


def add_rms_norm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input + residual``, and its :func:`rms_norm`.

    Args:
        input: float32 [..., D], D >= 1.
        residual: float32, of the same shape.
        weight: float32 [D].
        eps: added to the mean square; not negative.

    Returns:
        The sum and the normalized sum, each float32 [..., D], contiguous.

    Raises:
        ValueError: as :func:`rms_norm`.
    """
    return torch.ops.mvlm.add_rms_norm(input, residual, weight, eps)


def add_layer_norm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input + residual``, and its :func:`layer_norm`.

    Args:
        input: float32 [..., D], D >= 1.
        residual: float32, of the same shape.
        weight: float32 [D].
        bias: float32 [D].
        eps: added to the variance; not negative.

    Returns:
        The sum and the normalized sum, each float32 [..., D], contiguous.

    Raises:
        ValueError: as :func:`rms_norm`.
    """
    return torch.ops.mvlm.add_layer_norm(input, residual, weight, bias, eps)


def _check(operator: str, input: torch.Tensor, eps: float, **parameters: torch.Tensor) -> None:
    require_float32(operator, input=input, **parameters)
    require(
        input.dim() >= 1 and input.shape[-1] >= 1,
        operator,
        f"input has shape {list(input.shape)}; it must be [..., D] with a last dimension of at least 1",
    )
    for name, tensor in parameters.items():
        require(
            tensor.shape == input.shape[-1:],
            operator,
            f"{name} has shape {list(tensor.shape)}; with input {list(input.shape)} it must be {[*input.shape[-1:]]}",
        )
    require_eps(operator, eps)


def _check_residual(operator: str, input: torch.Tensor, residual: torch.Tensor) -> None:
    require_float32(operator, residual=residual)
    require(
        residual.shape == input.shape,
        operator,
        f"residual has shape {list(residual.shape)}; it must be that of input, {list(input.shape)}",
    )


def _rms_norm_shapes(input, weight, eps):
    _check("rms_norm", input, eps, weight=weight)
    return (input.shape,)


def _layer_norm_shapes(input, weight, bias, eps):
    _check("layer_norm", input, eps, weight=weight, bias=bias)
    return (input.shape,)


def _add_rms_norm_shapes(input, residual, weight, eps):
    _check("add_rms_norm", input, eps, weight=weight)
    _check_residual("add_rms_norm", input, residual)
    return (input.shape, input.shape)


def _add_layer_norm_shapes(input, residual, weight, bias, eps):
    _check("add_layer_norm", input, eps, weight=weight, bias=bias)
    _check_residual("add_layer_norm", input, residual)
    return (input.shape, input.shape)


def _rms_norm(input, weight, eps):
    mean_square = (input * input).mean(dim=-1, keepdim=True)
    return input * torch.rsqrt(mean_square + eps) * weight


def _layer_norm(input, weight, bias, eps):
    return torch.nn.functional.layer_norm(input, input.shape[-1:], weight, bias, eps)


def _add_rms_norm(input, residual, weight, eps):
    total = input + residual
    return total, _rms_norm(total, weight, eps)


def _add_layer_norm(input, residual, weight, bias, eps):
    total = input + residual
    return total, _layer_norm(total, weight, bias, eps)


_SUM_AND_NORM = ("sum", "normalized")

define("rms_norm", "Tensor input, Tensor weight, float eps", _rms_norm_shapes, _rms_norm)
define("layer_norm", "Tensor input, Tensor weight, Tensor bias, float eps", _layer_norm_shapes, _layer_norm)
define(
    "add_rms_norm",
    "Tensor input, Tensor residual, Tensor weight, float eps",
    _add_rms_norm_shapes,
    _add_rms_norm,
    results=_SUM_AND_NORM,
)
define(
    "add_layer_norm",
    "Tensor input, Tensor residual, Tensor weight, Tensor bias, float eps",
    _add_layer_norm_shapes,
    _add_layer_norm,
    results=_SUM_AND_NORM,
)

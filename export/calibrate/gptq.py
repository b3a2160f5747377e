"""GPTQ: 4-bit values that make a linear's outputs, not its weights, come close to those wanted.

Pure functions of tensors; knows nothing of models, files or layers. They run where their arguments are, on a CPU or a
GPU. The method is that of Frantar et al. (https://arxiv.org/abs/2210.17323) with three choices that each lower the
divergence of a real Llama:

- the scales are fixed beforehand (:func:`mvlm.export.scales.search_scales`), so that the columns can go in any order
  while groups stay as they lie in the file;
- columns go by falling second moment of their inputs: those that matter most are rounded first, while all others can
  still make up for their errors;
- the weights that are rounded are not the float model's but such as bring the float model's outputs about from the
  inputs that this layer will get, which those before it, quantized already, have changed (:func:`corrected_target`;
  the idea is GPTAQ's, https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvlm.export.scales import value_range

#: Added to the diagonal of a Hessian, as a share of its mean, so that it can be inverted; GPTQ's own.
DAMPING = 0.01

#: Columns that are rounded before what they bring about is applied to all columns behind them; GPTQ's "lazy batch".
BLOCK_COLUMNS = 128


def damped(hessian: Tensor) -> Tensor:
    """``hessian`` [in, in] with :data:`DAMPING` on its diagonal, in place."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal += DAMPING * mean if mean > 0 else 1.0
    return hessian


def corrected_target(weight: Tensor, hessian: Tensor, cross: Tensor, share: float) -> Tensor:
    """Weights that bring the float model's outputs about from the quantized model's inputs.

    With float inputs X and quantized ones Z [tokens, in], the ridge least-squares solution of ``Z V' = X W'`` is
    ``V = W X'Z (Z'Z + damping)^-1``, which is ``W + W (X - Z)'Z (Z'Z + damping)^-1`` without the shrinking that the
    damping alone would bring. On few tokens it fits what is accidental in them, so one goes a share of the way.

    Args:
        weight: W, float32 [out, in].
        hessian: Z'Z, :func:`damped`, [in, in].
        cross: (X - Z)'Z [in, in].
        share: of the way that is gone, 0 .. 1.
    """
    if share == 0:
        return weight
    factor = torch.linalg.cholesky(hessian)
    moved = torch.cholesky_solve((weight @ cross).T, factor).T
    return weight + share * moved


def gptq(weight: Tensor, hessian: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rounds column after column, and lets the columns that are still to come make up for each one's errors.

    Args:
        weight: float32 [out, in], what the outputs are to be like.
        hessian: of the inputs, Z'Z with :func:`damped` diagonal, [in, in]; any factor before it makes no difference.
        scales: float32 [out, groups], of groups of equal size that lie one after another in a row.
        bits: of a value.

    Returns:
        int8 [out, in].

    Raises:
        torch.linalg.LinAlgError: the Hessian is not positive definite, with values that are not finite for example.
    """
    low, high = value_range(bits)
    rows, columns = weight.shape
    order = hessian.diagonal().argsort(descending=True)
    group_of = (order // (columns // scales.shape[1])).tolist()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    # Row i holds how the error of column i is shared among those behind it, once all before it are fixed.
    sharing = torch.linalg.cholesky(inverse, upper=True)
    del inverse
    # Transposed: a column is worked on as a whole, so it should lie together.
    left_CR = weight.T[order].contiguous()
    scales_GR = scales.T.contiguous()
    values_CR = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block_CR = left_CR[start:stop]
        errors_CR = torch.empty_like(block_CR)
        block_sharing = sharing[start:stop, start:stop]
        pivots = block_sharing.diagonal().tolist()
        for i in range(stop - start):
            scale_R = scales_GR[group_of[start + i]]
            value_R = (block_CR[i] / scale_R).round_().clamp_(low, high)
            values_CR[start + i] = value_R
            error_R = torch.addcmul(block_CR[i], value_R, scale_R, value=-1.0).div_(pivots[i])
            errors_CR[i] = error_R
            if i + 1 < stop - start:
                block_CR[i + 1 :].addr_(block_sharing[i, i + 1 :], error_R, alpha=-1.0)
        if stop < columns:
            left_CR[stop:].addmm_(sharing[start:stop, stop:].T, errors_CR, alpha=-1.0)
    values = torch.empty_like(values_CR)
    values[order] = values_CR
    return values.T.contiguous()

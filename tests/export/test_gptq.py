"""GPTQ gives what its definition gives, and outputs that are closer for it."""

from __future__ import annotations

import pytest
import torch

from mvlm.export.calibrate.gptq import DAMPING, corrected_target, damped, gptq
from mvlm.export.scales import round_to_scales, search_scales


def layer(rows=24, columns=96, tokens=400, seed=0):
    """A weight, and inputs that depend on each other as a layer's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing *= torch.linspace(0.2, 3, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def optimal_brain_quantizer(weight, hessian, scales, bits):
    """GPTQ by its definition: one column after another, the inverse Hessian of what is left made anew each time.

    Of Frantar and Alistarh, Optimal Brain Compression (https://arxiv.org/abs/2208.11580), equations 3 and 4, in the
    order of columns that ours has.
    """
    weight, hessian = weight.double(), hessian.double()
    left = hessian.diagonal().argsort(descending=True).tolist()
    size = weight.shape[1] // scales.shape[1]
    values = torch.zeros(weight.shape, dtype=torch.int8)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale = scales[:, column // size].double()
        value = (weight[:, column] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        values[:, column] = value.to(torch.int8)
        error = (weight[:, column] - value * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return values


@pytest.mark.parametrize(("columns", "group_size", "bits"), [(96, 32, 4), (160, 160, 8), (320, 64, 4)])
def test_equals_its_definition(columns, group_size, bits):
    """More columns than a block has among them, so that what blocks bring about is seen."""
    weight, inputs = layer(columns=columns)
    hessian = damped(inputs.T @ inputs)
    scales = search_scales(weight, hessian.diagonal(), group_size, bits, torch.float32)
    expected = optimal_brain_quantizer(weight, hessian, scales, bits)
    found = gptq(weight, hessian, scales, bits)
    # A value that lies in the middle between two falls to either side, and all behind it in its row with it.
    different_rows = (found != expected).any(1).float().mean()
    assert different_rows <= 0.1


def test_outputs_are_closer_than_those_of_rounding():
    weight, inputs = layer()
    hessian = damped(inputs.T @ inputs)
    scales = search_scales(weight, hessian.diagonal(), 32, 4, torch.bfloat16)

    def error(values):
        restored = (values.view(24, 3, 32) * scales.unsqueeze(-1)).view(24, 96)
        return float((inputs @ (restored - weight).T).square().mean())

    rounded, found = error(round_to_scales(weight, scales, 4)), error(gptq(weight, hessian, scales, 4))
    assert found < 0.5 * rounded


def test_arguments_are_left_as_they_are():
    weight, inputs = layer()
    hessian = damped(inputs.T @ inputs)
    scales = search_scales(weight, hessian.diagonal(), 32, 4, torch.bfloat16)
    before = [x.clone() for x in (weight, hessian, scales)]
    gptq(weight, hessian, scales, 4)
    corrected_target(weight, hessian, hessian * 0.1, 0.5)
    assert all(torch.equal(x, y) for x, y in zip(before, (weight, hessian, scales), strict=True))


def test_damping_is_a_share_of_the_mean():
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(damped(hessian.clone()).diagonal(), torch.tensor([1.0, 2.0, 3.0]) + 2 * DAMPING)
    # Inputs that are always zero have a Hessian that can be inverted, too.
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3))


def test_target_is_the_ridge_solution():
    """Against least squares with the damping as further rows, by torch's own solver."""
    weight, inputs = layer(tokens=3000)
    generator = torch.Generator().manual_seed(5)
    quantized = inputs + 0.3 * torch.randn(inputs.shape, generator=generator) * inputs.std()
    plain = quantized.T @ quantized
    hessian = damped(plain.clone())
    ridge = (hessian - plain).diagonal().sqrt().diag()
    # W + D with Z D' = (X - Z) W' in the sense of least squares, D damped.
    wanted = torch.cat([(inputs - quantized) @ weight.T, torch.zeros(len(ridge), len(weight))])
    moved = torch.linalg.lstsq(torch.cat([quantized, ridge]).double(), wanted.double()).solution.T.float()
    whole = corrected_target(weight, hessian, (inputs - quantized).T @ quantized, 1.0)
    half = corrected_target(weight, hessian, (inputs - quantized).T @ quantized, 0.5)
    assert torch.allclose(whole, weight + moved, atol=2e-4)
    assert torch.allclose(half, weight + moved / 2, atol=1e-4)

    # And that is what it is for: the float outputs come about from the quantized inputs.
    def error(target):
        return float((quantized @ target.T - inputs @ weight.T).square().mean())

    assert error(whole) < error(half) < error(weight)


def test_numbers_that_are_not_finite_are_an_error():
    weight, inputs = layer()
    hessian = inputs.T @ inputs
    hessian[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(weight, hessian, torch.ones(24, 3), 4)

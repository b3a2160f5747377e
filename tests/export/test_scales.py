"""Scales are the best there are for the error that counts, and what XNNPACK can store."""

from __future__ import annotations

import pytest
import torch

from mvlm.export.scales import choose_scales_hqq, round_to_scales, search_scales, value_range


def weighted_error(weight, scales, importance, bits):
    """sum(h (w - s q)^2) of each group: [out, groups]."""
    values = round_to_scales(weight, scales, bits).float().view(*scales.shape, -1)
    error = weight.view(*scales.shape, -1) - values * scales.unsqueeze(-1)
    return (error.square() * importance.view(scales.shape[1], -1)).sum(-1)


def best_of_all(weight, importance, group_size, bits):
    """The same for the best of two thousand scales of each group: by brute force."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = value_range(bits)
    whole = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low)
    best = torch.full(whole.shape, torch.inf)
    for share in torch.linspace(0.2, 1.1, 2000):
        best = torch.minimum(best, weighted_error(weight, whole * share, importance, bits))
    return best


@pytest.mark.parametrize("distribution", ["normal", "long tails"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_search_finds_nearly_the_best_scale(distribution, group_size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    if distribution == "long tails":
        weight = weight / torch.randn(128, 128, generator=generator).abs().clamp_min(0.3)
    importance = torch.rand(128, generator=generator).square()
    scales = search_scales(weight, importance, group_size, 4, torch.float32)
    found = weighted_error(weight, scales, importance, 4)
    best = best_of_all(weight, importance, group_size, 4)
    # Two dozen shares cannot find every narrow minimum that two thousand find.
    assert found.sum() <= 1.02 * best.sum()


def test_weighting_is_what_makes_the_difference():
    """A scale for a group in which one weight counts is one that this weight is a multiple of."""
    weight = torch.tensor([[0.30, *[0.71] * 31]])
    importance = torch.tensor([1.0, *[1e-4] * 31])
    scales = search_scales(weight, importance, 32, 4, torch.float32)
    plain = search_scales(weight, torch.ones(32), 32, 4, torch.float32)

    def error_of_first(scales):
        return abs(float(round_to_scales(weight, scales, 4)[0, 0] * scales[0, 0] - weight[0, 0]))

    assert error_of_first(scales) < 0.3 * error_of_first(plain)


def test_no_worse_than_the_range_and_than_hqq():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(256)
    found = weighted_error(weight, search_scales(weight, ones, 64, 4, torch.bfloat16), ones, 4).sum()
    _, hqq = choose_scales_hqq(weight, 64)
    assert found < weighted_error(weight, hqq.to(torch.bfloat16).float(), ones, 4).sum()
    whole = weight.view(64, -1, 64).abs().amax(-1) / 8
    assert found < weighted_error(weight, whole.to(torch.bfloat16).float(), ones, 4).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_can_be_stored_and_are_positive(dtype):
    """XNNPACK refuses a scale of 0 or below; of a group of zeros, too, and of one that was never given anything."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    weight[3] = 0
    weight[4, 32:64] = -torch.rand(32)
    importance = torch.ones(96)
    importance[:32] = 0
    scales = search_scales(weight, importance, 32, 4, dtype)
    assert scales.shape == (8, 3)
    assert (scales > 0).all()
    assert torch.equal(scales, scales.to(dtype).float())
    # What has no importance at all is rounded by the plain squared error, not by nothing.
    plain = search_scales(weight, torch.ones(96), 32, 4, dtype)
    assert torch.allclose(scales[:, 0], plain[:, 0])


def test_an_exact_weight_stays_exact():
    values = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(3)).float()
    values[:, ::32] = -8
    scales = search_scales(values * 0.125, torch.ones(64), 32, 4, torch.bfloat16)
    assert torch.equal(scales, torch.full((16, 2), 0.125))
    assert torch.equal(round_to_scales(values * 0.125, scales, 4), values.to(torch.int8))

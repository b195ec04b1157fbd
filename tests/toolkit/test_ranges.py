"""Ranges per channel, and groups of channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hf_optim.toolkit.quantization.activation_rounding import RoundingSensitivity, rounded_inputs
from hf_optim.toolkit.quantization.ranges import (
    ChannelMinMax,
    even_groups,
    group_qparams,
    optimal_groups,
    quantize_dequantize,
)


def draws(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -(torch.rand(n, generator=generator) ** 4), torch.rand(n, generator=generator) ** 4


def noise(low, high, group):
    total = 0.0
    for number in group.unique():
        inside = group == number
        span = high[inside].max().clamp_min(0) - low[inside].min().clamp_max(0)
        total += int(inside.sum()) * float(span) ** 2
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("channels", "groups"), [(7, 2), (9, 3), (10, 4), (5, 5), (6, 9), (8, 1), (30, 3), (18, 4)])
def test_optimal_groups_have_the_least_noise_of_all_intervals(channels, groups, seed):
    low, high = draws(channels, seed=10 * channels + seed)
    every = []
    for cuts in itertools.combinations(range(1, channels), min(groups, channels) - 1):
        group = torch.zeros(channels, dtype=torch.int64)
        for cut in cuts:
            group[cut:] += 1
        every.append(noise(low, high, group))
    found = optimal_groups(low, high, groups)
    assert found[0] == 0
    assert set(found.diff().tolist()) <= {0, 1}
    assert int(found.max()) < groups
    assert noise(low, high, found) == pytest.approx(min(every), rel=1e-6)


def test_optimal_groups_of_many_channels():
    low, high = draws(3000)
    high[[5, 700, 2999]] = 50.0
    order = (high - low).argsort()
    found = optimal_groups(low[order], high[order], 6)
    assert found.shape == (3000,)
    assert noise(low[order], high[order], found) < 0.02 * noise(low[order], high[order], even_groups(3000, 6))


def test_even_groups():
    assert even_groups(7, 3).bincount().tolist() == [3, 2, 2]
    assert even_groups(6, 1).tolist() == [0] * 6
    assert even_groups(4, 9).tolist() == [0, 1, 2, 3]


def test_group_qparams_cover_their_channels_and_zero():
    low, high = torch.tensor([-1.0, 2.0, -4.0, 0.5]), torch.tensor([3.0, 5.0, -2.0, 0.5])
    scale, zero = group_qparams(low, high, torch.tensor([0, 0, 1, 2]), torch.float32)
    assert torch.allclose(scale, torch.tensor([6.0, 4.0, 0.5]) / 255)
    x = torch.tensor([[-1.0, 5.0, -4.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(
        quantize_dequantize(x, scale, zero, torch.tensor([0, 0, 1, 2])), x, atol=float(scale.max()) / 2
    )
    assert torch.equal(quantize_dequantize(x, scale, zero, torch.tensor([0, 0, 1, 2]))[1], torch.zeros(4))


def test_channel_ranges_over_batches():
    layer = nn.Linear(5, 2)
    batches = [torch.randn(2, 3, 5), torch.randn(4, 5)]
    with torch.no_grad(), ChannelMinMax({"layer": layer}) as found:
        for batch in batches:
            layer(batch)
    rows = torch.cat([batch.reshape(-1, 5) for batch in batches])
    assert torch.equal(found["layer"][0], rows.amin(0))
    assert torch.equal(found["layer"][1], rows.amax(0))


def test_rounding_sensitivity_is_the_divergence_of_the_rounded_forward():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    batches = [torch.randn(5, 4) for _ in range(3)]
    cases = {"none": {}, "second": {model[1]: torch.round}}
    with torch.no_grad(), RoundingSensitivity(model, cases) as found:
        for batch in batches:
            model(batch)
    expected = []
    for batch in batches:
        hidden = model[0](batch).detach()
        dense, moved = model[1](hidden).detach(), model[1](hidden.round()).detach()
        expected.append(float((moved - dense).square().sum() / dense.square().sum()))
    assert found["none"] == 0
    assert found["second"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rounding_is_removed_if_a_forward_raises():
    layer = nn.Linear(4, 4)

    def broken(x):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), rounded_inputs({layer: broken}):
        layer(torch.ones(4))
    assert not layer._forward_pre_hooks

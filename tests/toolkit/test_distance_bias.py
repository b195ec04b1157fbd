"""Attention with a bias by distance: dense, over blocks and by a kernel, beside a softmax written down."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.attention import Rows, attend_biased, distance_bias

COUNTS, SLOPES = [70, 200, 129, 300], [0.1, 0.02, 0.05, 0.0]  # the last head sees all
UNBIASED = [65, 64, 1, 300]


def bias_of(slopes):
    """Return a bias that falls from where a head's unbiased keys end, and hides what lies beyond its counts."""

    def bias(distance, heads):
        index = torch.arange(4) if heads is None else heads
        shape = (-1, *[1] * distance.dim())
        counts, free = (torch.tensor(each)[index].view(shape) for each in (COUNTS, UNBIASED))
        away = distance.abs()
        found = -slopes[index].view(shape) * (away - free + 1).clamp_min(0)
        return found.masked_fill(away >= counts, -torch.inf)

    return bias


def formula(query, key, value, slopes, causal, segments):
    key, value = (part.repeat_interleave(2, 1) for part in (key, value))
    n = query.shape[2]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = query @ key.transpose(-1, -2) * 0.3 + bias_of(slopes)(distance, None)
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    seen = (seen & (distance >= 0) if causal else seen)[:, None]
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    return weights @ value


@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_way_computes_the_formula_with_its_gradients(way, causal, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, heads, 250, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    ]
    slopes = torch.tensor(SLOPES, dtype=torch.float64, requires_grad=True)
    segments = torch.zeros(3, 250, dtype=torch.int32)
    segments[1, :33] = -1
    segments[2, 120:] = 1
    calls = []
    blocked = distance_bias.blocked_attention
    monkeypatch.setattr(distance_bias, "blocked_attention", lambda *a: calls.append(1) or blocked(*a))
    bias = bias_of(slopes)
    found = attend_biased(*tensors, COUNTS, UNBIASED, bias, causal, 0.3, Rows.of(segments), way=way)
    assert len(calls) == (way == "blocks")
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    own = torch.autograd.grad((found * weights).sum(), [*tensors, slopes])
    expected = formula(*tensors, slopes, causal, segments)
    others = torch.autograd.grad((expected * weights).sum(), [*tensors, slopes])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", ["dense", "blocks"])
def test_padding_between_tokens_is_no_distance(way):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 250, 8, generator=generator) for heads in (4, 2, 2)]
    segments = torch.zeros(1, 250, dtype=torch.int32)
    segments[0, 100:140] = -1
    real = segments[0] >= 0
    bias = bias_of(torch.tensor(SLOPES))
    found = attend_biased(*tensors, COUNTS, UNBIASED, bias, True, 0.3, Rows.of(segments), way=way)
    alone = attend_biased(*(part[:, :, real] for part in tensors), COUNTS, UNBIASED, bias, True, 0.3, way="dense")
    torch.testing.assert_close(found[:, :, real], alone, rtol=0, atol=1e-5)
    assert not found[:, :, ~real].any()


def test_lists_of_blocks_stay_while_spans_change_a_little():
    patterns = [distance_bias.nearest_keys(distance_bias._in_blocks(counts), True) for counts in ([65, 3], [128, 64])]
    assert patterns[0] == patterns[1]


class Ramp:
    """The logarithm of a ramp, as a kernel computes it and as a function of the distance."""

    def __init__(self, reach, slope, limit):
        self.reach, self.slope, self.limit = reach, slope, limit

    def __call__(self, distance, heads):
        reach = self.reach if heads is None else self.reach[heads]
        away = distance.abs()
        count = ((reach.view(-1, *[1] * distance.dim()) - away) * self.slope).clamp(0, 1)
        seen = (away < self.limit) & (count > 0)
        return torch.where(seen, count, 1).log().masked_fill(~seen, -torch.inf)

    def ramp(self):
        slope, limit = (torch.full_like(self.reach, each) for each in (self.slope, self.limit))
        return torch.stack([self.reach, slope, limit], 1)


@pytest.mark.parametrize("documents", [False, True])
def test_a_ramp_is_computed_by_the_kernel_where_there_is_one(documents, monkeypatch):
    from hf_optim_kernels.sparse_attention import op

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, heads, 250, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    tensors = [each.requires_grad_() for each in drawn]
    reach = torch.tensor([70.3, 200.0, 129.5, 300.0], dtype=torch.float64, requires_grad=True)
    segments = torch.zeros(2, 250, dtype=torch.int32)
    segments[1, 120:] = 1
    rows = Rows.of(segments) if documents else None
    bias, counts = Ramp(reach, 1 / 64, 250), [71, 201, 130, 250]
    blocks = attend_biased(*tensors, counts, [1] * 4, bias, True, 0.3, rows, way="blocks")
    calls = []
    monkeypatch.setattr(distance_bias, "installed_kernel", lambda *_: calls.append(1) or op.sparse_attention)
    kernel = attend_biased(*tensors, counts, [1] * 4, bias, True, 0.3, rows, way="blocks")
    assert calls
    torch.testing.assert_close(kernel, blocks, rtol=0, atol=1e-12)
    weights = torch.randn(blocks.shape, generator=generator, dtype=torch.float64)
    both = [torch.autograd.grad((out * weights).sum(), [*tensors, reach]) for out in (kernel, blocks)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)

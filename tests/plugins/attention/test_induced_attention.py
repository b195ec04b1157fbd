"""Attention over inducing points in the place of self-attention, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_optim_plugins.attention._induced_attention import InducedAttention

HEADS, GROUPS, WIDTH, POINTS = 4, 2, 3, 5
SCALE = 0.4


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens, batch=3):
    heads = (HEADS, GROUPS, GROUPS)
    return [drawn(batch, count, tokens, WIDTH, seed=n).requires_grad_() for n, count in enumerate(heads)]


def seeded(norm=False, start="identity"):
    """Return a module in float64 whose parameters, layer norms included, are drawn from a seed."""
    module = InducedAttention(HEADS, WIDTH, POINTS, norm, start, dtype=torch.float64)
    with torch.no_grad():
        for seed, weight in enumerate(module.parameters()):
            weight.copy_(0.5 * drawn(*weight.shape, seed=seed + 50))
    return module


def softmax_of(queries, keys, values):
    """One head: ``[n, D]``, ``[m, D]`` and ``[m, D]``."""
    weights = (SCALE * queries @ keys.T).exp()
    return weights @ values / weights.sum(1, keepdim=True)


def normalized(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def formula(w, q, k, v, valid, norm):
    rows = []
    for b in range(len(q)):
        tokens = valid[b].nonzero()[:, 0]
        heads = []
        for h in range(HEADS):
            own, g = w["points"][:, h * WIDTH : (h + 1) * WIDTH], h // (HEADS // GROUPS)
            heads.append(own + softmax_of(own, k[b, g, tokens], v[b, g, tokens]))
        points = torch.cat(heads, 1)
        if norm:
            points = normalized(points, w["attention_norm.weight"], w["attention_norm.bias"])
        points = points + (points @ w["feed_forward.weight"].T + w["feed_forward.bias"]).clamp_min(0)
        if norm:
            points = normalized(points, w["output_norm.weight"], w["output_norm.bias"])
        keys, values = (points @ w[f"{name}.weight"].T + w[f"{name}.bias"] for name in ("key", "value"))
        parts = [slice(h * WIDTH, (h + 1) * WIDTH) for h in range(HEADS)]
        rows.append(torch.stack([softmax_of(q[b, h], keys[:, p], values[:, p]) for h, p in enumerate(parts)]))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(norm):
    module, given = seeded(norm), inputs(6)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1, 3:], valid[2, :2] = False, False
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}
    found, expected = module(*given, valid, SCALE), formula(weights, *given, valid, norm)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slope = drawn(*found.shape, seed=9)
    own = torch.autograd.grad(found, [*given, *module.parameters()], slope)
    others = torch.autograd.grad(expected, [*given, *weights.values()], slope)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_order_means_nothing():
    module, given = seeded(), inputs(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    expected = module(*given, None, SCALE)[:, :, order]
    found = module(*(part[:, :, order] for part in given), None, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_without_tokens_are_finite_and_change_no_other():
    module, given = seeded(), inputs(4)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1] = False
    found = module(*given, valid, SCALE)
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(found.sum(), given, retain_graph=True))
    torch.testing.assert_close(found[[0, 2]], module(*(part[[0, 2]] for part in given), None, SCALE))


def test_the_cost_grows_with_the_tokens():
    module, counted = seeded().requires_grad_(False), []
    for tokens in (64, 128, 256):
        with FlopCounterMode(display=False) as counter:
            module(*(part.detach() for part in inputs(tokens, 1)), None, SCALE)
        counted.append(counter.get_total_flops())
    assert counted[2] - counted[1] == 2 * (counted[1] - counted[0])


def test_small_points_start_as_the_mean_of_the_values():
    module = InducedAttention(HEADS, WIDTH, POINTS, False, "identity", dtype=torch.float64)
    with torch.no_grad():
        module.points.zero_()
        module.feed_forward.weight.zero_()
    q, k, v = inputs(6)
    mean = v.mean(2, keepdim=True).repeat_interleave(HEADS // GROUPS, 1).expand_as(q)
    torch.testing.assert_close(module(q, k, v, None, SCALE), mean, rtol=0, atol=1e-12)

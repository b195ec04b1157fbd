"""Layers over sets against their formulas, and what they do with the order of elements and with padding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_optim.toolkit.attention import ISAB, MAB, PMA, SAB

WIDTH, HEADS = 12, 3


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build, *args, **options):
    """Return a layer in float64 whose parameters, layer norms included, are drawn from a seed."""
    layer = build(*args, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return layer


def normalized(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def mab(w, prefix, x, y, norm=False, scale="width"):
    """Return the block by its formula, element by element and head by head; ``w`` holds weights by name."""

    def linear(name, z):
        return z @ w[f"{prefix}{name}.weight"].T + w[f"{prefix}{name}.bias"]

    q, k, v = linear("query", x), linear("key", y), linear("value", y)
    size = q.shape[-1] // HEADS
    rows = []
    for b in range(len(x)):
        elements = []
        for i in range(x.shape[1]):
            parts = []
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = k[b, :, part] @ q[b, i, part] / (q.shape[-1] if scale == "width" else size) ** 0.5
                weights = scores.exp() / scores.exp().sum()
                parts.append((weights[:, None] * v[b, :, part]).sum(0))
            elements.append(q[b, i] + torch.cat(parts))
        rows.append(torch.stack(elements))
    out = torch.stack(rows)
    if norm:
        out = normalized(out, w[f"{prefix}attention_norm.weight"], w[f"{prefix}attention_norm.bias"])
    out = out + linear("feed_forward", out).clamp_min(0)
    return normalized(out, w[f"{prefix}output_norm.weight"], w[f"{prefix}output_norm.bias"]) if norm else out


def sab_formula(w, x, **options):
    return mab(w, "block.", x, x, **options)


def isab_formula(w, x, **options):
    points = torch.stack([w["points"]] * len(x))
    return mab(w, "spread.", x, mab(w, "gather.", points, x, **options), **options)


def pma_formula(w, x, **options):
    if "feed_forward.weight" in w:
        x = (x @ w["feed_forward.weight"].T + w["feed_forward.bias"]).clamp_min(0)
    return mab(w, "block.", torch.stack([w["seeds"]] * len(x)), x, **options)


LAYERS = {
    "sab": (SAB, (8, WIDTH, HEADS), {}, sab_formula, 8),
    "isab": (ISAB, (8, WIDTH, HEADS, 4), {}, isab_formula, 8),
    "pma": (PMA, (WIDTH, HEADS, 2), {}, pma_formula, WIDTH),
    "pma of the authors' code": (PMA, (WIDTH, HEADS, 2), {"feed_forward": False}, pma_formula, WIDTH),
}


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"scale": "head"}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_formula(name, options):
    build, sizes, own, formula, width = LAYERS[name]
    layer = seeded(build, *sizes, **own, **options)
    x = drawn(2, 5, width).requires_grad_()
    weights = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters()}
    told = {"norm": options.get("layer_norm", False), "scale": options.get("scale", "width")}
    found, expected = layer(x), formula(weights, x, **told)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    own_gradients = torch.autograd.grad(found.square().sum(), [x, *layer.parameters()])
    others = torch.autograd.grad(expected.square().sum(), [x, *weights.values()])
    for one, other in zip(own_gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_order_means_nothing(name):
    build, sizes, own, _, width = LAYERS[name]
    layer = seeded(build, *sizes, **own)
    x, order = drawn(2, 7, width), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    found, expected = layer(x[:, order]), layer(x)
    if build is not PMA:
        assert (expected[:, order] - expected).abs().max() > 1e-3  # the outputs of elements differ
        expected = expected[:, order]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_on_either_side_changes_nothing(name):
    build, sizes, own, _, width = LAYERS[name]
    layer = seeded(build, *sizes, **own)
    x = drawn(3, 6, width)
    x[0, 4:], x[1, :3] = 1e3, -1e3
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:], mask[1, :3] = False, False
    found = layer(x, mask)
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row]])[0]
        own_part = found[row] if build is PMA else found[row, mask[row]]
        torch.testing.assert_close(own_part, alone, rtol=0, atol=1e-12)


def test_inducing_points_cost_in_proportion_to_the_elements():
    layer, counted = ISAB(16, 16, 2, 4).requires_grad_(False), []
    for length in (64, 128, 256):
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, length, 16))
        counted.append(counter.get_total_flops())
    assert counted[2] - counted[1] == 2 * (counted[1] - counted[0])


@pytest.mark.parametrize("build", [lambda: SAB(8, 12, 3), lambda: ISAB(8, 12, 3, 2), lambda: PMA(8, 2)])
def test_a_row_of_padding_alone_and_other_masks_are_refused(build):
    layer, x = build(), torch.zeros(2, 4, 8)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="row 1 of the batch is padding alone"):
        layer(x, mask)
    with pytest.raises(ValueError, match=r"bool of the shape \(2, 4\)"):
        layer(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"bool of the shape \(2, 4\)"):
        layer(x, mask[:, :3])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ISAB(8, 8, 2, 0), "points must be a whole number from 1"),
        (lambda: PMA(8, 2, 0), "seeds must be a whole number from 1"),
        (lambda: MAB(8, 8, 8, 3), "heads=3 does not divide width=8"),
        (lambda: MAB(8, 8, 8, 0), "heads must be a whole number from 1"),
        (lambda: MAB(8, 8, 8, 2, scale="dim"), "scale is one of width, head"),
    ],
)
def test_sizes_that_make_no_layer_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_more_seeds_than_elements_are_vectors_of_the_set():
    layer = seeded(PMA, 8, 2, 5)
    found = layer(drawn(1, 2, 8))
    assert found.shape == (1, 5, 8)
    assert torch.isfinite(found).all()


def test_layers_have_a_seed():
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(ISAB(8, 8, 2, 4).state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in made), strict=True))
    assert made[0]["points"].abs().max() <= (6 / (4 + 8)) ** 0.5

"""One mixture of V-MoE: its losses against the formulas, what it computes and drops, and when it is the dense layer."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_vit
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification, Dinov2Config, Dinov2ForImageClassification
from vmoe_models import DROPLESS, logits, mixtures, pictures, vmoe

from hf_optim.toolkit import experts
from hf_optim_plugins.moe import _vmoe_modules
from hf_optim_plugins.moe.vmoe import VMoE

VISION = {
    "image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_labels": 3,
}  # fmt: skip


def mixture(**fields):
    """A mixture on its own, in float64."""
    settings = {**VMoE.from_dict(fields).settings()}
    torch.manual_seed(0)
    config = tiny_vit().config
    return _vmoe_modules.Mixture(config, settings, 32, 48).double()


def tokens(count=40, seed=1):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the losses -------------------------------------------------------------------------------------------------------
def variation(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def test_the_importance_loss_is_the_formula():
    scores = tokens(20)[:, :4]
    probabilities = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in scores.tolist()]
    expected = variation([sum(row[e] for row in probabilities) for e in range(4)])
    assert float(_vmoe_modules.importance_loss(scores.softmax(-1))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_load_loss_is_the_formula(top_k):
    plain, noise, deviation = tokens(20)[:, :4], tokens(20, 2)[:, :4], 0.25
    noisy = plain + deviation * noise
    chance = [[], [], [], []]
    for row, shaken in zip(plain.tolist(), noisy.tolist(), strict=True):
        threshold = sorted(shaken, reverse=True)[top_k - 1]
        for expert in range(4):
            z = (row[expert] - threshold) / deviation
            chance[expert].append(0.5 * (1 + math.erf(z / math.sqrt(2))))
    expected = variation([sum(column) / len(column) for column in chance])
    found = _vmoe_modules.load_loss(plain, noisy, top_k, deviation)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_both_are_zero_for_equal_experts_and_largest_for_one_expert():
    one = torch.zeros(8, 4, dtype=torch.float64)
    one[:, 2] = 1
    assert float(_vmoe_modules.importance_loss(torch.full((8, 4), 0.25))) == 0
    assert float(_vmoe_modules.importance_loss(one)) == pytest.approx(3)


def test_gradients_of_the_losses_are_those_of_differences():
    plain, noise = tokens(6)[:, :4].clone().requires_grad_(), tokens(6, 2)[:, :4]
    assert torch.autograd.gradcheck(lambda x: _vmoe_modules.importance_loss(x.softmax(-1)), plain)
    assert torch.autograd.gradcheck(lambda x: _vmoe_modules.load_loss(x, x + 0.25 * noise, 2, 0.25), plain)


def test_a_layer_weighs_its_losses_and_has_none_in_evaluation():
    layer, rows = mixture(experts=4, noise=0.0, load_loss=0.0, importance_loss=0.25), tokens()
    layer.train()(rows[None])
    expected = 0.25 * _vmoe_modules.importance_loss(layer.router(rows).softmax(-1))
    assert torch.allclose(layer.loss, expected, rtol=1e-12)
    layer.loss = None
    layer.eval()(rows[None])
    assert layer.loss is None
    noisy = mixture(experts=4, importance_loss=0.0, load_loss=0.5).train()
    torch.manual_seed(5)
    noisy(rows[None])
    torch.manual_seed(5)
    plain = noisy.router(rows)
    expected = 0.5 * _vmoe_modules.load_loss(plain, plain + 0.25 * torch.randn_like(plain), 2, 0.25)
    assert torch.allclose(noisy.loss, expected, rtol=1e-12)


def test_the_losses_balance_a_router():
    rows = tokens(200)

    def balanced(**fields):
        layer = mixture(experts=4, **fields).train()
        nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
        values = []
        for _ in range(40):
            layer(rows[None])
            values.append(float(layer.loss.detach()))
            optimizer.zero_grad()
            layer.loss.backward()
            optimizer.step()
        return values[-1] / values[0]

    assert balanced(importance_loss=1.0, load_loss=0.0) < 0.05
    assert balanced(importance_loss=0.0, load_loss=1.0) < 0.2


# -- what a layer computes --------------------------------------------------------------------------------------------
def by_hand(layer, rows, kept=None):
    """Return the sum over the k largest gates, token by token."""
    own, result = layer.experts, torch.zeros_like(rows)
    for t, row in enumerate(rows):
        gates, chosen = layer.router(row).softmax(-1).topk(layer.settings["top_k"])
        for j, e in enumerate(chosen.tolist()):
            if kept is None or kept[t, j]:
                inner = nn.functional.gelu(own.up_proj[e] @ row + own.up_proj_bias[e])
                result[t] += gates[j] * (own.down_proj[e] @ inner + own.down_proj_bias[e])
    return result


@pytest.mark.parametrize("fields", [{}, {"capacity": 0.5}, {"capacity": 0.5, "batch_priority": True}], ids=str)
@torch.no_grad()
def test_a_layer_is_the_sum_of_its_experts_weighted_with_the_gates_of_the_whole_softmax(fields):
    layer, rows = mixture(experts=4, **{"capacity": 2.0, **fields}).eval(), tokens(24)
    chosen, gates = layer.choose(rows)
    kept = layer.kept(chosen, gates, 2)
    assert torch.allclose(layer(rows.view(2, 12, 32)).view(24, 32), by_hand(layer, rows, kept), atol=1e-12)
    assert float(gates.sum(-1).max()) < 1
    if fields:
        slots = round(0.5 * 2 * 24 / 4)
        counts = [int((kept & (chosen == e)).sum()) for e in range(4)]
        assert counts == [min(slots, int((chosen == e).sum())) for e in range(4)]


@torch.no_grad()
def test_with_priority_the_computed_pairs_of_first_choices_are_those_with_the_largest_gates():
    layer, rows = mixture(experts=4, top_k=1, capacity=0.4, batch_priority=True).eval(), tokens(60)
    chosen, gates = layer.choose(rows)
    kept = layer.kept(chosen, gates, 1)
    for e in range(4):
        mine = chosen[:, 0] == e
        if (mine & ~kept[:, 0]).any():
            assert gates[mine & kept[:, 0]].min() >= gates[mine & ~kept[:, 0]].max()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    again = layer.kept(chosen[order], gates[order], 1)
    assert torch.equal(again, kept[order])


@torch.no_grad()
def test_images_compete_on_their_own_with_group_image():
    fields = {"experts": 4, "capacity": 0.5, "batch_priority": True}
    own, shared = vmoe(group="image", **fields), vmoe(group="batch", **fields)
    together = pictures(6)
    assert torch.allclose(own(together).logits[:1], own(together[:1]).logits, atol=1e-5)
    assert not torch.allclose(shared(together).logits[:1], shared(together[:1]).logits, atol=1e-5)


def test_noise_is_drawn_in_training_only():
    model = vmoe(**DROPLESS, noise=4.0)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    quiet = vmoe(**DROPLESS, noise=0.0, load_loss=0.0).train()
    assert torch.equal(logits(quiet), logits(quiet))


def test_training_has_its_own_capacity():
    layer, rows = mixture(experts=4, capacity=0.25, train_capacity=2.0, noise=0.0, load_loss=0.0), tokens(24)
    chosen, gates = layer.choose(rows)
    assert layer.eval().kept(chosen, gates, 1) is not None
    assert layer.train().kept(chosen, gates, 1) is None


# -- the exact settings -----------------------------------------------------------------------------------------------
FAMILIES = {
    "vit": tiny_vit,
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**VISION)).eval(),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**VISION, mlp_ratio=2)).eval(),
}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{"top_k": 4}, {"top_k": 2, "normalize": True}], ids=["k = E", "gates sum to 1"])
def test_copies_with_gates_that_sum_to_one_are_the_dense_model(family, fields):
    dense = FAMILIES[family]().double()
    expected = logits(dense)
    model = vmoe(dense, experts=4, every=1, capacity=4.0, **fields)
    assert len(mixtures(model)) == 2
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-12)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("rounding", experts.ROUNDINGS)
def test_nothing_is_dropped_from_e_over_k_on(rounding):
    model = vmoe(rounding=rounding, **DROPLESS, expert_noise=0.5)
    for layer in mixtures(model):
        layer.settings["capacity"] = 1e4
    without = logits(model)
    for layer in mixtures(model):
        layer.settings["capacity"] = 2.0
    assert torch.equal(logits(model), without)
    for layer in mixtures(model):
        layer.settings["capacity"] = 0.25
    assert not torch.equal(logits(model), without)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "hf_optim"])
@pytest.mark.parametrize("capacity", [0.5, 2.0])
def test_every_implementation_of_experts_computes_the_same(name, capacity):
    model = vmoe(experts=4, capacity=capacity, expert_noise=0.5)
    expected = logits(model)
    if name == "hf_optim":  # the product that runs where the package is installed
        for layer in mixtures(model):
            layer.experts.forward = lambda *args, own=layer.experts: experts.expert_product(own, *args, False)
    else:
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
    assert torch.allclose(logits(model), expected, atol=1e-6)

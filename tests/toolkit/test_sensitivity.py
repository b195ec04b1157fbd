"""Sensitivity of layers, and the choice within a budget."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

from hf_optim.toolkit.statistics.sensitivity import OutputShift, output_divergence, select_within_budget


def test_cheapest_takes_the_least_error_for_each_weight_that_fits():
    errors = {"a": 8.0, "b": 1.0, "c": 3.0, "d": 0.4}
    sizes = {"a": 100, "b": 10, "c": 60, "d": 10}
    assert select_within_budget(errors, sizes, 180) == ["d", "c", "a", "b"]
    assert select_within_budget(errors, sizes, 75) == ["d", "c"]
    assert select_within_budget(errors, sizes, 40) == ["d", "b"]
    assert select_within_budget(errors, sizes, 9) == []


def test_output_shift_is_the_divergence_of_the_changed_model():
    model = tiny_llama()
    tokens = torch.arange(40).view(2, 20)
    layers = {
        name: model.get_submodule(name) for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
    }
    changes = {name: (layer, torch.zeros_like(layer.weight)) for name, layer in layers.items()}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad(), OutputShift(model, changes) as shifts:
        dense = model(tokens).logits.log_softmax(-1)
    assert not model._forward_hooks
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        with torch.no_grad():
            layer.weight.zero_()
            changed = model(tokens).logits.log_softmax(-1)
            layer.weight.copy_(before[name])
        assert shifts[name] == pytest.approx(float((dense.exp() * (dense - changed)).sum(-1).mean()), rel=1e-4)
        assert shifts[name] > 0


def test_weights_return_when_a_forward_raises():
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()

    def refuse(module, args):
        if not module.weight.any():
            raise RuntimeError("stop")

    handle = layer.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="stop"), OutputShift(model, {"up": (layer, torch.zeros_like(layer.weight))}):
        model(torch.arange(8)[None])
    handle.remove()
    assert torch.equal(layer.weight, before)
    assert not model._forward_hooks


def test_divergence_of_plain_tensors_is_relative():
    dense = torch.tensor([[3.0, 4.0]])
    assert output_divergence(dense, dense + torch.tensor([[0.0, 0.5]])) == pytest.approx(0.01)
    assert output_divergence((dense,), (dense,)) == 0.0
    assert output_divergence(torch.zeros(2), torch.ones(2)) == 0.0

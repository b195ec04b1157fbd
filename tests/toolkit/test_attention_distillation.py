"""Distillation of attention outputs: converted attention learns what the dense one gave for the same inputs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from transformers import AttentionInterface

import hf_optim
from hf_optim import ModelError, NumericalError
from hf_optim.toolkit.distillation import AttentionDistillation
from hf_optim.toolkit.statistics import BatchRows

IDS = torch.randint(3, 60, (4, 22), generator=torch.Generator().manual_seed(0))


def converted(build, **fields):
    return hf_optim.optimize(build(), [{"technique": "compressed", "local": 0, **fields}])


def attentions(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_causal")}


def distilled(model, batches, **more):
    kept = AttentionDistillation(model, attentions(model), "here", **{"steps": 6, "rate": 1e-2, **more})
    with kept, torch.no_grad():
        for _ in kept.passes():
            for batch in batches:
                with BatchRows(model).of(batch):
                    model(**batch, use_cache=False)
    return kept.figures()


def outputs(model, batch):
    """Return the first output of each attention module."""
    found, handles = {}, []
    for name, module in attentions(model).items():
        keep = lambda module, args, out, name=name: found.__setitem__(name, out[0].detach())  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_the_error_falls_and_is_that_of_the_outputs(build):
    model, dense = converted(build), build().eval()
    batches = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
    figures = distilled(model, batches, steps=30)
    assert figures["after"] < 0.7 * figures["before"]
    assert figures["before"] == pytest.approx(sum(own["before"] for own in figures["layers"].values()) / 2)
    first = next(iter(figures["layers"]))  # reads what it reads in the dense model
    for fresh, when in ((converted(build), "before"), (model, "after")):
        difference = scale = 0.0
        for batch in batches:
            own, full = outputs(fresh.eval(), batch)[first], outputs(dense, batch)[first]
            difference += (own - full).square().sum()
            scale += full.square().sum()
        assert figures["layers"][first][when] == pytest.approx(float(difference / scale), rel=1e-4)


def test_layers_read_what_they_read_in_the_dense_model():
    model, dense, read = converted(tiny_llama), tiny_llama().eval(), []
    last = list(attentions(model).values())[-1]
    kept = last.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True
    )
    distilled(model, [{"input_ids": IDS}])
    kept.remove()
    with torch.no_grad():
        hidden = dense.model(IDS, output_hidden_states=True).hidden_states[1]
        expected = dense.model.layers[1].input_layernorm(hidden)
    torch.testing.assert_close(read[-1], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_teaches_nothing(side):
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, slice(0, 7) if side == "left" else slice(15, None)] = 0
    other = torch.where(mask.bool(), IDS[:2], IDS[2:])
    results = []
    for ids in (IDS[:2], other):
        model = converted(tiny_bert)
        figures = distilled(model, [{"input_ids": ids, "attention_mask": mask}])
        results.append((figures["after"], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_what_trains_is_what_was_asked_and_nothing_is_left_behind():
    before = converted(tiny_llama)
    model = converted(tiny_llama)
    function = AttentionInterface._global_mapping[model.config._attn_implementation]
    masks = {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32, dtype=torch.bool).tril()}
    with torch.no_grad():
        model.get_parameter(next(iter(masks))).tril_()
    distilled(model, [{"input_ids": IDS}], trains="projections", masks=masks)
    assert AttentionInterface._global_mapping[model.config._attn_implementation] == function
    assert not any(module._forward_hooks for module in model.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {name for name in before.state_dict() if "self_attn" in name}  # ``compression`` among them
    assert not model.get_parameter(next(iter(masks))).triu(1).any()
    with pytest.raises(ModelError, match="has no learned weights"):
        distilled(model, [], trains="learned")


def test_half_precision_learns_in_single():
    model = converted(tiny_llama).to(torch.bfloat16)
    figures = distilled(model, [{"input_ids": IDS}], steps=20)
    assert figures["after"] < 0.8 * figures["before"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_error_leaves_the_weights_and_says_which_layer():
    model = converted(tiny_llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericalError, match=r"here: the loss of .*self_attn is not finite at step \d"):
        distilled(model, [{"input_ids": IDS}], steps=50, rate=1e30)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ModelError, match="no calibration batch reached"):
        distilled(model, [])


def test_the_same_data_give_the_same_weights():
    one, two = converted(tiny_gpt2), converted(tiny_gpt2)
    for model in (one, two):
        distilled(model, [{"input_ids": IDS}])
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)


def test_gradients_and_outputs_that_are_not_finite_are_errors():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.nan

    for which, message in ((Backward.apply, "gradient of .* is not finite at step 0"), (None, "not finite before")):
        model = converted(tiny_llama)
        name = model.config._attn_implementation
        stock = AttentionInterface._global_mapping[name]
        change = which or (lambda out: out * torch.nan)
        AttentionInterface.register(name, lambda *a, s=stock, c=change, **k: (c(s(*a, **k)[0]), None))
        try:
            with pytest.raises(NumericalError, match=message):
                distilled(model, [{"input_ids": IDS}], steps=1)
        finally:
            AttentionInterface.register(name, stock)

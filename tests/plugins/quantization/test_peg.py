"""Per-embedding-group quantization: the two ends of K, the fold of the permutation, and synthetic outliers repaired."""

from __future__ import annotations

import copy

import pytest
import torch
from real_stories import perplexity, windows
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, BertModel

import hf_optim
from hf_optim import NumericalError, run_of
from hf_optim.checkpoints.dense import convert_to_dense
from hf_optim.testing.outliers import add_synthetic_outliers
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit import topology
from hf_optim.toolkit.quantization.ranges import even_groups
from hf_optim_plugins.quantization.peg import PEG, Wiring, sort_pair_


def logits(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return getattr(out, "logits", out[0])


def calibrated(model, batches=None, **fields):
    batches = batches or [inputs_for(model, seed=s, rows=4) for s in range(3)]
    return hf_optim.optimize(model, [PEG(**fields)], calibration=batches)


def ranges_of(model, names, batches):
    """Return the smallest and largest input per channel, computed directly."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    for batch in batches:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(rows).amin(0), torch.cat(rows).amax(0)) for name, rows in seen.items()}


@pytest.mark.parametrize(("groups", "dim"), [(1, ()), (32, (0,))], ids=["per tensor", "per embedding"])
def test_the_two_ends_of_the_number_of_groups(groups, dim):
    model = tiny_llama()
    batches = [inputs_for(model, seed=s) for s in range(2)]
    name = "model.layers.1.mlp.gate_proj"
    low, high = ranges_of(model, [name], batches)[name]
    if not dim:
        low, high = low.min(), high.max()
    scale = (high.clamp_min(0) - low.clamp_max(0)) / 255
    zero = (-128 - low.clamp_max(0) / scale).round()
    made = calibrated(model, batches, groups=groups, permute=False, split="even").get_submodule(name)
    assert made.input_scale.numel() == groups
    x = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    expected = ((x / scale).round() + zero).clamp(-128, 127).sub(zero).mul(scale)
    assert torch.allclose(made.rounded(x), expected, atol=1e-6)


def test_without_the_permutation_even_groups_are_slices_of_the_channels():
    model = calibrated(tiny_llama(), permute=False, split="even", groups=5)
    for module in model.modules():
        if getattr(module, "holds_codes", False):
            assert torch.equal(module.input_group.long(), even_groups(module.input_group.numel(), 5))


@pytest.mark.many
@pytest.mark.parametrize("family", TINY)
def test_with_float_weights_the_product_is_that_of_the_groups_partial_products(family):
    """y = sum_g s_g W_g (c_g - z_g), in float64, of a layer with 8-bit weights too."""
    model = calibrated(TINY[family]())
    name, layer = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "RoundedLinear")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(3, layer.out_features, dtype=torch.float64)
    for g in range(layer.groups):
        inside = layer.input_group == g
        scale, zero = layer.input_scale[g].double(), layer.input_zero[g].double()
        codes = ((x[:, inside] / scale).round() + zero).clamp(-128, 127)
        rows = layer.weight_scale[:, g if layer.scales > 1 else 0].double()
        total += scale * ((codes - zero) @ layer.weight[:, inside].double().T) * rows
    if layer.bias is not None:
        total += layer.bias.double()
        layer.bias.data = layer.bias.data.double()
    assert torch.allclose(layer(x), total.detach(), rtol=0, atol=1e-12), name


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "vit"])
def test_sorting_is_exact_in_float64_and_sorts(family):
    model = TINY[family]().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(model).items()}
    before, wiring = logits(model, inputs), Wiring.of(model)
    names = [*wiring.residual.readers, *wiring.norms, *(pair.consumer for pair in wiring.pairs)]
    ranges = ranges_of(model, names, [inputs])
    assert wiring.sort_residual_(ranges).folded == 1
    for pair in wiring.pairs:
        sort_pair_(pair, ranges)
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-12)
    now = ranges_of(model, names, [inputs])
    assert all(torch.allclose(now[n][0], ranges[n][0]) and torch.allclose(now[n][1], ranges[n][1]) for n in names)
    for pair in wiring.pairs:
        width = now[pair.consumer][1].clamp_min(0) - now[pair.consumer][0].clamp_max(0)
        rows = torch.stack([width[columns].max() for columns in pair.columns])
        for number in pair.groups.unique():
            assert bool((rows[pair.groups == number].diff() >= -1e-9).all())


def test_folded_and_listed_groups_give_the_same_results():
    """An encoder without a head keeps the order of its stream; with one it does not: same hidden states."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        headless = BertModel(tiny_bert().config, add_pooling_layer=False).eval()
    model = tiny_bert()
    model.bert.load_state_dict(headless.state_dict(), strict=False)
    batches = [inputs_for(model, seed=s) for s in range(3)]
    skip = ("bert.pooler.dense",)
    listed, folded = calibrated(headless, batches), calibrated(model, batches, skip=skip)
    assert "returns its residual stream" in run_of(listed).record.steps["0"]["residual_order"]
    assert "residual_order" not in run_of(folded).record.steps["0"]
    layer = "encoder.layer.1.intermediate.dense"
    one, two = listed.get_submodule(layer), folded.get_submodule(f"bert.{layer}")
    assert torch.equal(one.input_scale, two.input_scale)
    assert torch.equal(two.input_group, two.input_group.sort().values)
    assert not torch.equal(one.input_group, one.input_group.sort().values)
    states = logits(listed, batches[0])
    with torch.no_grad():
        permuted = folded.bert(**batches[0]).last_hidden_state
    assert torch.allclose(states.sort(-1).values, permuted.sort(-1).values, atol=2e-2)


@pytest.mark.slow
def test_synthetic_outliers_are_repaired_where_one_grid_breaks():
    def error(**fields):
        model = tiny_llama()
        add_synthetic_outliers(model, channels=2, factor=60.0)
        batches = [inputs_for(model, seed=s, rows=8) for s in range(8)]
        reference = logits(model, batches[0])
        return float((logits(calibrated(model, batches, sums=False, **fields), batches[0]) - reference).norm())

    one_grid = error(groups=1)
    assert error() < 0.2 * one_grid
    assert error() < error(split="even") < one_grid


def test_fields_leave_out_norms_and_linears_outside_the_stream():
    model = calibrated(tiny_llama(), sums=False, sites="residual", groups=4)
    kinds = [type(m).__name__ for m in model.modules()]
    assert "RoundedNorm" not in kinds
    assert model.model.layers[0].mlp.down_proj.groups == 1
    assert model.model.layers[0].mlp.up_proj.groups > 1


def test_the_dense_equivalent_has_stock_modules_and_the_decoded_weights():
    model = calibrated(tiny_gpt2())
    layer = model.transformer.h[0].mlp.c_fc
    decoded = layer.decoded()
    lost = convert_to_dense(model)
    assert "transformer.h.0.mlp.c_fc" in lost
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight.T, decoded)
    assert not any(getattr(m, "holds_codes", False) for m in model.modules())


def test_weights_are_within_half_a_grid_step_and_take_a_byte():
    model = tiny_llama()
    before = copy.deepcopy(model.model.layers[0].self_attn.q_proj.weight)
    made = calibrated(model, permute=False).model.layers[0].self_attn.q_proj
    assert made.weight.dtype == torch.int8
    step = made.weight_scale[:, made.input_group.long()] if made.scales > 1 else made.weight_scale
    assert bool(((made.decoded() - before).abs() <= step / 2 + 1e-6).all())


def test_weights_may_stay_unquantized():
    model = tiny_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    made = calibrated(model, bits=None, permute=False).model.layers[0].self_attn.q_proj
    assert torch.equal(made.weight, weight)


def test_unreached_layers_are_listed_and_infinite_inputs_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.fill_(1e38)
    with pytest.raises(NumericalError, match=r"peg.*model.layers"):
        calibrated(model)


@pytest.mark.real_model
def test_within_a_percent_of_dense_on_a_language_model_with_outliers(shared_models, shared_data):
    home = shared_models / "babyllama-1m"
    calibration, held_out = windows(home, shared_data, "calibration", 16), windows(home, shared_data, "eval", 12)
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    batches = [{"input_ids": part} for part in calibration.split(8)]
    add_synthetic_outliers(model, factor=40.0, sample=batches[0])
    dense = perplexity(model, held_out)
    naive = {"technique": "rtn", "activations": "int8", "dynamic": False, "symmetric_activations": False}
    broken = hf_optim.optimize(copy.deepcopy(model), [naive], calibration=batches)
    assert perplexity(broken, held_out) > 1.1 * dense
    assert perplexity(calibrated(model, batches), held_out) < 1.01 * dense


def test_defaults():
    step = PEG()
    assert (step.groups, step.permute, step.split, step.sites, step.bits) == (6, True, "fitted", "all", 8)
    assert topology.blocks(tiny_llama())

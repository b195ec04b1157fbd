"""OBQ: brute force on small rows, its limits, the zeros it keeps, and real layers against one order for all rows."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from exported import exported
from real_stories import windows
from test_gptq import problem
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from hf_optim import compressed, optimize
from hf_optim.errors import ModelError, NumericalError
from hf_optim.runs.run import run_of
from hf_optim.toolkit.quantization.grids import GridSpec, make_grid, round_codes
from hf_optim.toolkit.quantization.hessian import damp_
from hf_optim.toolkit.quantization.least_squares import output_error
from hf_optim.toolkit.quantization.obq_recursion import expand_grid, quantize_greedily
from hf_optim.toolkit.statistics.second_moment import SecondMoment
from hf_optim.toolkit.topology.block_lists import group_by_block
from hf_optim_plugins.quantization.gptq import quantize_columns

DOUBLE = torch.float64
IDS = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(0))
SPECS = [
    GridSpec(3),
    GridSpec(2, "int", "group", 3),
    GridSpec(4, "int", "group", 2, False),
    GridSpec(3, "int", "tensor"),
]


def by_definition(weight, hessian, grid, damp, outliers_first):
    """Row by row, weight by weight; the Hessian of the remaining weights is inverted again at each step."""
    h = damp_(hessian.clone(), damp)
    scale, zero = expand_grid(grid, *weight.shape, DOUBLE)
    codes = torch.zeros_like(weight)
    for row in range(len(weight)):
        w, free = weight[row].clone(), list(range(weight.shape[1]))
        # A pruned weight stays zero: it is not a variable of the row's problem.
        for q in [q for q in free if weight[row, q] == 0]:
            codes[row, q] = zero[row, q]
            free.remove(q)
        while free:
            inverse = torch.linalg.inv(h[free][:, free])
            code = {q: round_codes(w[q], scale[row, q], zero[row, q], grid.spec) for q in free}
            error = {q: w[q] - (code[q] - zero[row, q]) * scale[row, q] for q in free}
            among = [q for q in free if abs(error[q]) > scale[row, q] / 2] if outliers_first else []
            p = min(among or free, key=lambda q: error[q] ** 2 / inverse[free.index(q), free.index(q)])
            place = free.index(p)
            codes[row, p] = code[p]
            w[free] -= error[p] / inverse[place, place] * inverse[:, place]
            free.remove(p)
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("outliers_first", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_on_rows_of_six_weights(spec, outliers_first, seed):
    weight, hessian = problem(rows=20, columns=6, tokens=40, seed=seed)
    # Ranges that leave weights outside: outliers occur from the beginning.
    grid = make_grid(weight * 0.7, spec)
    codes = quantize_greedily(weight, hessian, grid, outliers_first=outliers_first)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.to(DOUBLE), by_definition(weight, hessian, grid, 0.01, outliers_first))


@pytest.mark.parametrize("memory", [1.0, 1e5, 1e9])
def test_equals_brute_force_beyond_one_block_of_steps(memory):
    weight, hessian = problem(rows=5, columns=70, tokens=300)
    grid = make_grid(weight, GridSpec(3))
    codes = quantize_greedily(weight, hessian, grid, memory=memory)
    assert torch.equal(codes.to(DOUBLE), by_definition(weight, hessian, grid, 0.01, True))


def test_outliers_are_quantized_first():
    weight, hessian = problem(rows=20, columns=24)
    grid = make_grid(weight * 0.5, GridSpec(3))
    found = {
        rule: grid.dequantize(quantize_greedily(weight, hessian, grid, outliers_first=rule)) for rule in (True, False)
    }
    errors = {rule: output_error(weight, value, hessian) for rule, value in found.items()}
    assert errors[True] < errors[False]


@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(4, "int", "group", 16, False)])
def test_with_a_diagonal_hessian_it_rounds_to_nearest(spec):
    weight, hessian = problem()
    grid = make_grid(weight, spec)
    assert torch.equal(quantize_greedily(weight, hessian.diagonal().diag(), grid), grid.quantize(weight))


def test_dead_inputs_round_to_nearest():
    weight, hessian = problem()
    hessian[7], hessian[:, 7] = 0, 0
    grid = make_grid(weight, GridSpec(3))
    assert torch.equal(quantize_greedily(weight, hessian, grid)[:, 7], grid.quantize(weight)[:, 7])


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_are_kept_and_rows_with_different_masks_equal_brute_force(symmetric):
    weight, hessian = problem(rows=7, columns=12)
    weight[weight.abs() < 0.6] = 0.0
    weight[2] = 0.0
    grid = make_grid(weight, GridSpec(3, "int", "group", 4, symmetric))
    codes = quantize_greedily(weight, hessian, grid)
    assert torch.equal(codes.to(DOUBLE), by_definition(weight, hessian, grid, 0.01, True))
    assert bool((grid.dequantize(codes)[weight == 0] == 0).all())


def test_float32_is_near_float64():
    weight, hessian = problem(rows=30)
    grid = make_grid(weight.float(), GridSpec(4))
    wide = make_grid(weight.float().double(), GridSpec(4))
    single = grid.dequantize(quantize_greedily(weight.float(), hessian.float(), grid))
    double = wide.dequantize(quantize_greedily(weight.float().double(), hessian, wide))
    errors = [output_error(weight, value.double(), hessian) for value in (single, double)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_singular_hessian_names_layers_and_step():
    weight, hessian = problem()
    with pytest.raises(NumericalError, match="q_proj is singular"):
        quantize_greedily(weight, -hessian, make_grid(weight, GridSpec(4)), label="q_proj")


def test_progress_counts_rows():
    weight, hessian = problem(rows=10, columns=6)
    told = []
    room = 3 * 2 * 6 * 6 * 8
    quantize_greedily(
        weight, hessian, make_grid(weight, GridSpec(4)), memory=room, progress=lambda *at: told.append(at)
    )
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]


def quantized(model, driver="auto", **fields) -> nn.Module:
    return optimize(model, {"steps": [{"technique": "obq", **fields}], "driver": driver}, calibration=IDS)


def test_drivers_agree_and_every_layer_is_reported():
    models = [
        quantized(tiny_llama(), driver, group_size=16, precision="float64") for driver in ("blockwise", "whole_model")
    ]
    blockwise, whole = (compressed.quantized_modules(model) for model in models)
    assert len(blockwise) == 14
    assert blockwise.keys() == whole.keys()
    assert all(torch.equal(blockwise[name].weight, whole[name].weight) for name in whole)
    figures = run_of(models[0]).record.steps["0"]
    assert figures["relative_error"].keys() == blockwise.keys()
    assert 0 < max(figures["relative_error"].values()) < 0.05


def test_the_card_has_the_mean_error_and_the_worst_layers():
    model = quantized(tiny_llama(), bits=3, group_size=16)
    errors = run_of(model).record.steps["0"]["relative_error"]
    sections = exported(model)
    (text,) = sections.paragraphs.values()
    assert text.startswith("14 linear layers were quantized")
    mean = sum(errors.values()) / 14
    assert f"was {mean:.2e} on average" in text
    assert f"{mean:.2e}" not in {f"{max(errors.values()):.2e}", f"{min(errors.values()):.2e}"}
    ((_, *rows),) = sections.tables.values()
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    assert rows == [[f"`{name}`", f"{error:.2e}"] for name, error in worst]


def test_the_search_for_scales_weights_each_input_by_its_energy():
    model = tiny_llama()
    layers = {name: model.get_submodule(f"model.layers.0.mlp.{name}") for name in ("gate_proj", "down_proj")}
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad(), SecondMoment(layers, "test") as grams:
        model(IDS)
    model = quantized(model, bits=3, group_size=16, observer="mse")
    for name, weight in dense.items():
        spec, energy = GridSpec(3, "int", "group", 16), grams[name].total.diagonal()
        stored = model.get_submodule(f"model.layers.0.mlp.{name}").weight_scale
        assert torch.equal(stored, make_grid(weight, spec, "mse", importance=energy).scale)
        assert not torch.equal(stored, make_grid(weight, spec, "mse").scale)


def test_assigned_bits_are_used():
    model = tiny_llama()
    run = {}

    def plan(steps):
        optimized = optimize(model, steps, calibration=IDS)
        run["plan"] = run_of(optimized).bit_plan
        return optimized

    assigned = {"technique": "qbert", "assign_only": True, "budget": 3.0, "shards": 1, "iterations": 3}
    found = compressed.quantized_modules(plan([assigned, {"technique": "obq", "group_size": 16}]))
    assert len(set(run["plan"].values())) > 1
    assert {name: m.quantization_scheme.weights.num_bits for name, m in found.items()} == run["plan"]


def test_a_layer_that_is_too_wide_is_refused_before_quantizing():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"step 1 \(obq\): .*down_proj has 48 inputs, more than widest: 40"):
        quantized(model, widest=40, driver="whole_model")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_slow_layer_is_announced(monkeypatch, caplog):
    monkeypatch.setattr("hf_optim_plugins.quantization.obq.LONG", 0.0)
    with caplog.at_level(logging.WARNING):
        quantized(tiny_llama(), memory=1e-6)
    told = [record.message for record in caplog.records if "will take about" in record.message]
    assert len(told) == 14
    assert told[0].startswith("step 1 (obq): model.layers.0.self_attn.q_proj, 32 rows")


def test_an_unsupported_model_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"step 1 \(obq\).*Conv1D"):
        quantized(tiny_gpt2())


def test_layers_by_block():
    model = tiny_llama()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    parts = group_by_block(model, linears)
    assert [len(part) for part in parts] == [7, 7, 1]
    assert [name for part in parts for name in part] == list(linears)


@pytest.mark.real_model
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_on_average_better_than_one_order_for_all_rows_on_real_layers(observer, shared_models, shared_data):
    """All linears of babyllama-1m, 3 bits per channel, 24 rows of each, on equal inputs and grids.

    On average over the layers, not in each: see the module's docstring.
    """
    home = shared_models / "babyllama-1m"
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    with SecondMoment(layers) as moments, torch.no_grad():
        model(windows(home, shared_data, "calibration", 12))
    errors = []
    for name, layer in layers.items():
        weight, hessian = layer.weight.detach()[:24], moments[name].mean
        energy = hessian.diagonal() if observer == "mse" else None
        grid = make_grid(weight, GridSpec(3), observer, importance=energy)
        found = (quantize_greedily(weight, hessian, grid), quantize_columns(weight, hessian, grid))
        errors.append([output_error(weight, grid.dequantize(codes), hessian) for codes in found])
    own, fixed = torch.tensor(errors).unbind(1)
    assert len(own) == 35
    assert own.mean() < fixed.mean()
    assert (own < fixed).sum() > 35 / 2

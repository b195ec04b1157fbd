"""Q-BERT: curvature and groups against their definitions, budgets in bytes, and a mixed model against a uniform one."""

from __future__ import annotations

import copy

import pytest
import torch
from exported import exported
from real_stories import perplexity, windows
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_vit
from torch import nn
from transformers import AutoModelForCausalLM, BertModel

from hf_optim import ModelError, RecipeError, compressed, optimize
from hf_optim.runs.run import run_of
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.quantization.grids import GridSpec, make_grid
from hf_optim.toolkit.statistics import calibration_loss, enable_double_backward, gradients
from hf_optim_plugins.quantization.qbert import QBERT, grouped_grid

IDS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
QUICK = {"technique": "qbert", "shards": 2, "rows": 3, "iterations": 2}


def quantized(model, **fields) -> nn.Module:
    return optimize(model, [{**QUICK, **fields}], calibration=[inputs_for(model, seed=s) for s in range(3)])


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_one_group_equals_per_tensor(bits, symmetric, observer):
    w = weight(12, 20)
    grouped = grouped_grid(w, bits, 1, symmetric=symmetric, observer=observer)
    tensor = make_grid(w, GridSpec(bits, "int", "tensor", None, symmetric), observer)
    assert torch.equal(grouped.quantize(w), tensor.quantize(w))
    assert torch.equal(grouped.nearest(w), tensor.nearest(w))


@pytest.mark.parametrize("groups", [None, 12, 500])
def test_a_group_for_every_row_equals_per_channel(groups):
    w = weight(12, 20)
    assert torch.equal(grouped_grid(w, 4, groups).scale, make_grid(w, GridSpec(4)).scale)
    by_input = grouped_grid(w, 4, groups, 5)
    assert torch.equal(by_input.scale, make_grid(w, GridSpec(4, "int", "group", 5)).scale)
    assert torch.equal(by_input.quantize(w), make_grid(w, GridSpec(4, "int", "group", 5)).quantize(w))


@pytest.mark.parametrize("group_size", [None, 5])
def test_exactly_the_rows_of_a_group_share_a_range(group_size):
    w = weight(12, 20)
    grid = grouped_grid(w, 3, 5, group_size, symmetric=False)  # 4 groups of 3 rows: the largest divisor up to 5
    size = group_size or 20
    for group in range(4):
        for part in range(20 // size):
            own = w[3 * group : 3 * group + 3, size * part : size * (part + 1)]
            expected = make_grid(own, GridSpec(3, "int", "tensor", None, False))
            assert torch.equal(grid.scale[3 * group : 3 * group + 3, part], expected.scale.expand(3))
            assert torch.equal(grid.zero_point[3 * group : 3 * group + 3, part], expected.zero_point.expand(3))


def test_metrics_of_a_layer_are_those_of_the_full_hessian():
    """Mean and standard deviation of the top eigenvalue over two parts of the data, Ω, and the quadratic form."""
    model = tiny_llama(hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2).double()
    name = "model.layers.0.mlp.down_proj"

    layer, ids = model.get_submodule(name), IDS[:, :8]
    values, forms = [], []
    change = grouped_grid(layer.weight.detach(), 4, 128, observer="mse").nearest(layer.weight) - layer.weight.detach()
    with enable_double_backward(model, [layer.weight]):
        for part in (ids[:3], ids[3:]):
            gradient = gradients(calibration_loss(model, {"input_ids": part}), {name: layer.weight})[name].flatten()
            rows = [torch.autograd.grad(g, layer.weight, retain_graph=True)[0].flatten() for g in gradient]
            hessian = torch.stack(rows).detach()
            spectrum = torch.linalg.eigvalsh(hessian)
            values.append(float(spectrum[spectrum.abs().argmax()]))
            forms.append(0.5 * float(change.flatten() @ hessian @ change.flatten()))
    step = QBERT(targets=(name,), shards=2, rows=3, iterations=400, tolerance=1e-6, choices=(4,), budget=4.0)
    optimized = optimize(copy.deepcopy(model), [step], calibration=ids)
    row = run_of(optimized).record.steps["0"]["layers"][name]
    mean = sum(values) / 2
    std = abs(values[0] - values[1]) / 2
    assert row["mean"] == pytest.approx(mean, rel=1e-3)
    assert row["std"] == pytest.approx(std, rel=1e-2, abs=1e-3 * abs(mean))
    assert row["omega"] == pytest.approx(abs(mean) + std, rel=1e-3)
    sums = step._measure(run_of(optimized), model, {name: layer}, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}])[
        name
    ]
    assert float(sums[3]) == pytest.approx(sum(forms), rel=1e-6)


@pytest.mark.many
@pytest.mark.parametrize("assign", ["quadratic", "sensitivity", "rank"])
@pytest.mark.parametrize(
    "fields", [{}, {"group_size": 16, "budget": 3.3}, {"groups": 4, "choices": [3, 5], "budget": 4.5}]
)
def test_the_checkpoint_stays_within_the_bytes_allowed(assign, fields, tmp_path):
    model = quantized(tiny_llama(), assign=assign, **fields)
    figures = run_of(model).record.steps["0"]
    assert figures["bytes"] <= figures["bytes_allowed"]
    widths = {name: m.quantization_scheme.weights.num_bits for name, m in compressed.quantized_modules(model).items()}
    assert widths == {name: row["bits"] for name, row in figures["layers"].items()}
    assert set(widths.values()) <= set(fields.get("choices", (2, 4, 8)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = [t for name, t in tensors.items() if name.endswith(("weight_packed", "weight_scale"))]
    assert sum(t.numel() * t.element_size() for t in stored) == figures["bytes"]
    uniform = sum(
        m.weight.numel() * fields.get("budget", 4.0) / 8 for m in compressed.quantized_modules(model).values()
    )
    scales = sum(m.weight_scale.numel() * 4 for m in compressed.quantized_modules(model).values())
    assert figures["bytes_allowed"] == pytest.approx(uniform + scales, rel=0.02)


def test_by_rank_a_larger_omega_never_has_fewer_bits():
    table = run_of(quantized(tiny_llama(), assign="rank")).record.steps["0"]["layers"].values()
    bits = [row["bits"] for row in sorted(table, key=lambda row: row["omega"])]
    assert bits == sorted(bits)


def test_flags_gradients_and_training_mode_are_restored():
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    again = {"technique": "rtn", "targets": ["re:.*layers.1.mlp.up_proj"]}
    optimize(model, [{**QUICK, "assign_only": True}, again], calibration=IDS)
    after = {name: p.requires_grad for name, p in model.named_parameters() if "scale" not in name}
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]  # quantized weights are frozen
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_without_labels_and_without_logits():
    for model in (tiny_vit(), BertModel(tiny_bert().config).eval()):
        table = run_of(quantized(model)).record.steps["0"]["layers"]
        assert len(table) == 12
        assert all(row["mean"] > 0 for row in table.values())  # a Gauss-Newton matrix is positive semidefinite


def test_inputs_are_quantized_on_request():
    schemes = [
        m.quantization_scheme for m in compressed.quantized_modules(quantized(tiny_bert(), activations="int8")).values()
    ]
    assert all(scheme.input_activations.dynamic for scheme in schemes)


def test_impossible_settings_are_refused_with_the_reason():
    for fields, reason in [
        ({"budget": 3.0, "choices": (4, 8)}, "under the smallest of choices"),
        ({"choices": (1, 4)}, "from 2 to 8"),
        ({"choices": (4, 4)}, "twice"),
        ({"assign_only": True, "activations": "int8"}, "assign_only quantizes nothing"),
    ]:
        with pytest.raises(RecipeError, match=reason):
            QBERT(**fields)
    with pytest.raises(ModelError, match=r"step 1 \(qbert\).*Conv1D"):
        quantized(tiny_gpt2())
    with pytest.raises(ModelError, match=r"step 1 \(qbert\).*experts"):
        quantized(tiny_mixtral())


@pytest.mark.real_model
def test_mixed_bits_beat_uniform_ones_at_equal_bytes_on_a_real_model(shared_models, shared_data):
    """babyllama-1m at 4 bits on average, the same rounding in groups of 32: 2, 4 and 8 bits against 4 everywhere."""
    home = shared_models / "babyllama-1m"
    calibration = windows(home, shared_data, "calibration", 4)
    held_out = windows(home, shared_data, "eval", 24)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    grouped = {"technique": "qbert", "groups": None, "group_size": 32, "shards": 1, "rows": 1, "iterations": 2}
    mixed = optimize(copy.deepcopy(dense), [grouped], calibration=calibration)
    uniform = optimize(copy.deepcopy(dense), [{"technique": "rtn", "bits": 4, "group_size": 32, "observer": "mse"}])
    figures = run_of(mixed).record.steps["0"]
    assert {row["bits"] for row in figures["layers"].values()} == {2, 4, 8}
    layers = compressed.quantized_modules(uniform).values()
    assert figures["bytes"] <= sum(m.out_features * (m.in_features // 2 + 4 * m.in_features // 32) for m in layers)
    assert perplexity(mixed, held_out) < perplexity(uniform, held_out)


def test_the_card_and_the_record_have_the_mean_bits_and_the_bytes():
    model = quantized(tiny_llama(), budget=3.3)
    sections, figures = exported(model), run_of(model).record.steps["0"]
    layers = compressed.quantized_modules(model)
    bits = {name: layer.quantization_scheme.weights.num_bits for name, layer in layers.items()}
    weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    mean = sum(weights[name] * bits[name] for name in bits) / sum(weights.values())
    assert abs(mean - sum(bits.values()) / 14) > 0.01  # weighted by the sizes of the layers
    assert figures["mean_bits"] == pytest.approx(mean, abs=5e-5)
    assert figures["bytes"] < figures["bytes_allowed"]
    (text,) = sections.paragraphs.values()
    assert text.startswith(
        f"14 linear layers have {figures['mean_bits']:g} bits per weight on average ({figures['bytes']:,} bytes of "
        f"codes and scales, {figures['bytes_allowed']:,} allowed), assigned by `quadratic`."
    )
    ((header, *rows),) = sections.tables.values()
    assert header == ["layer", "mean λ", "std λ", "Ω", "bits"]
    expected = figures["layers"].items()
    assert rows == [
        [f"`{name}`", *(f"{row[key]:.3g}" for key in ("mean", "std", "omega")), str(bits[name])]
        for name, row in expected
    ]

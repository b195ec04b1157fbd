"""Rounding to nearest: every scheme of the catalogue, its grid, and that stock transformers computes the same."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM

from hf_optim import compressed, optimize
from hf_optim.errors import DataError, ModelError, NumericalError, RecipeError
from hf_optim.recipes.config import OptimConfig
from hf_optim.runs.run import run_of
from hf_optim_plugins.quantization.rtn import RTN

IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))

# name in the field -> fields, format, compressed-tensors strategy of the weights
SCHEMES = {
    "W8A32": ({}, "pack-quantized", "channel"),
    "W8A32 per tensor": ({"strategy": "tensor"}, "pack-quantized", "tensor"),
    "W8A8": ({"activations": "int8"}, "int-quantized", "channel"),
    "W8A8 static": ({"activations": "int8", "dynamic": False}, "int-quantized", "channel"),
    "W8A8 static, zero points": (
        {"activations": "int8", "dynamic": False, "symmetric_activations": False},
        "int-quantized",
        "channel",
    ),
    "W4A16": ({"bits": 4, "group_size": 16}, "pack-quantized", "group"),
    "W4A16 asymmetric": ({"bits": 4, "group_size": 16, "symmetric": False}, "naive-quantized", "group"),
    "W3A16": ({"bits": 3, "group_size": 16, "observer": "mse"}, "pack-quantized", "group"),
    "FP8": ({"format": "fp8", "activations": "fp8"}, "float-quantized", "channel"),
    "FP8 static per tensor": (
        {"format": "fp8", "activations": "fp8", "dynamic": False, "strategy": "tensor"},
        "float-quantized",
        "tensor",
    ),
    "W32A8": ({"bits": None, "activations": "int8"}, "dense", None),
    "W32A8 static": ({"bits": None, "activations": "int8", "dynamic": False}, "dense", None),
}


def rounded(model, **fields) -> nn.Module:
    data = IDS if RTN(**fields).needs_data() else None
    return optimize(model, [{"technique": "rtn", **fields}], calibration=data)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.many
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(tmp_path, name):
    fields, stored, strategy = SCHEMES[name]
    dense, model = tiny_llama(), rounded(tiny_llama(), **fields)
    modules = compressed.quantized_modules(model)
    assert len(modules) == 14
    for key, module in modules.items():
        scheme, before = module.quantization_scheme, dense.get_submodule(key).weight.detach()
        assert str(getattr(scheme.format, "value", scheme.format)) == stored
        if strategy is None:
            assert scheme.weights is None
            assert torch.equal(module.weight, before)
            continue
        assert scheme.weights.strategy == strategy
        zero = getattr(module, "weight_zero_point", None)
        assert torch.equal(module.weight, fake_quantize(before, module.weight_scale, zero, scheme.weights))
    assert not torch.equal(logits(model), logits(dense))
    if fields.get("bits", 8) == 8 and "tensor" not in name:
        assert nn.functional.cosine_similarity(logits(model).flatten(), logits(dense).flatten(), dim=0) > 0.99
    type(model).save_pretrained(model, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_reload_with_equal_logits(tmp_path, dtype):
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    model = rounded(model, bits=4, group_size=16)
    type(model).save_pretrained(model, tmp_path / "packed")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded), logits(model))


def test_the_shortest_recipe():
    recipe = OptimConfig.parse({"technique": "rtn", "bits": 8})
    assert not recipe.stages[0].needs_data
    model = optimize(tiny_llama(), recipe)
    assert model.model.layers[0].mlp.up_proj.weight_scale.shape == (48, 1)


def test_needs_data_only_for_static_activations():
    assert not RTN(activations="int8").needs_data()
    assert RTN(activations="int8", dynamic=False).needs_data()
    assert not RTN(dynamic=False).needs_data()
    with pytest.raises(DataError, match=r"step 1 \(rtn\)"):
        optimize(tiny_llama(), [{"technique": "rtn", "activations": "int8", "dynamic": False}])


def test_static_scales_cover_the_observed_range():
    model = rounded(tiny_llama(), activations="int8", dynamic=False)
    first = model.model.layers[0].self_attn.q_proj
    dense, seen = tiny_llama(), []
    handle = dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(dense)
    handle.remove()
    torch.testing.assert_close(first.input_scale, seen[0].abs().max().reshape(1) / 127.5)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_stay(bits, symmetric):
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[module.weight.abs() < 0.1] = 0.0
    zeros = {name: m.weight == 0 for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in compressed.quantized_modules(rounded(model, bits=bits, symmetric=symmetric)).items():
        assert bool((module.weight[zeros[name]] == 0).all())


def test_synthetic_outliers_hurt_activations_more_than_weights():
    """Survey, figure 2: W8A8 loses much more than W8A32 when one channel is ten times as large as the others."""
    model = tiny_llama()
    for block in model.model.layers:
        block.input_layernorm.weight.data[3] *= 10.0
        block.post_attention_layernorm.weight.data[5] *= 10.0
    state = model.state_dict()
    reference = logits(model)

    def error(**fields) -> float:
        fresh = tiny_llama()
        fresh.load_state_dict(state)
        return float((logits(rounded(fresh, **fields)) - reference).square().mean())

    assert error(activations="int8", dynamic=False) > 10 * error()
    assert error(activations="int8") > 3 * error()


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": None},
        {"format": "fp8", "bits": 4},
        {"format": "fp8", "symmetric": False},
        {"format": "fp8", "group_size": 16},
        {"strategy": "group"},
        {"strategy": "tensor", "group_size": 16},
        {"activations": "fp8", "symmetric_activations": False},
        {"bits": 9},
        {"bits": 1},
    ],
)
def test_contradictory_fields_are_refused(fields):
    with pytest.raises(RecipeError, match="rtn"):
        RTN(**fields)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", sorted(set(TINY) - {"gpt2"}))
def test_families(family):
    model = TINY[family]()
    model = rounded(model)
    assert len(compressed.quantized_modules(model)) >= 4
    model.hf_quantizer.get_state_dict_and_metadata(model)


def test_an_unsupported_model_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"step 1 \(rtn\).*Conv1D"):
        rounded(tiny_gpt2())


def test_experts_are_listed_as_skipped():
    model = rounded(tiny_mixtral(), format="fp8", activations="fp8")
    _, skipped = run_of(model).covered(run_of(model).recipe.steps[0])
    assert any("model.layers.1.mlp.experts" in names for names in skipped.values())


def test_integer_weights_of_a_mixture_without_its_experts_are_refused_since_stock_could_not_reload_them():
    with pytest.raises(ModelError, match=r"step 1 \(rtn\) cannot store integer weights of MixtralForCausalLM"):
        rounded(tiny_mixtral(), skip=["*.experts.*"])


def test_targets_and_skip():
    model = rounded(tiny_bert(), targets=["*.attention.*"], skip=["re:.*layer\\.0\\..*"])
    names = list(compressed.quantized_modules(model))
    assert names
    assert all("layer.1.attention" in name for name in names)


def test_non_finite_weights_are_named():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.up_proj\.weight: the weights of the model hold NaN"):
        rounded(model)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w3a16", "fp8"])
def test_shipped_recipes(recipe):
    parsed = OptimConfig.parse(recipe)
    parsed.check()
    model = optimize(tiny_llama(), parsed, calibration=IDS)
    (module, *_) = compressed.quantized_modules(model).values()
    scheme = module.quantization_scheme
    bits, inputs = scheme.weights.num_bits, scheme.input_activations
    assert (bits, inputs and inputs.type) == {
        "w8a8": (8, "int"),
        "w4a16": (4, None),
        "w3a16": (3, None),
        "fp8": (8, "float"),
    }[recipe]

"""Schemes by the names of the field mean what compressed-tensors' table says, in every step that takes them."""

from __future__ import annotations

import logging

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_optim import OptimConfig, RecipeError, compressed, optimize
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.config import shipped_recipes
from hf_optim.recipes.schemes import REFUSED, SCHEMES
from hf_optim.toolkit.quantization import GridSpec

QUANTIZING = ("rtn", "gptq", "obq", "zeroquant", "lkd", "signround", "qat")
ARGS = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "block_structure", "scale_dtype")


def stored(scheme) -> dict:
    """What a scheme of compressed-tensors stores, and how it rounds inputs; how scales are observed is not part."""
    parts = {"weights": scheme["weights"], "inputs": scheme["input_activations"]}
    return {part: args and {key: getattr(args, key) for key in ARGS} for part, args in parts.items()}


def preset(name: str) -> dict:
    return stored({"weights": None, "input_activations": None, **PRESET_SCHEMES[name]})


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


DATA = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))


def scheme_made(recipe) -> dict:
    found = compressed.scheme_on(optimize(model(), recipe, DATA).model.layers[0].mlp.up_proj)
    return stored({"weights": found.weights, "input_activations": found.input_activations})


def test_every_preset_of_compressed_tensors_is_expressed_or_refused_by_name():
    assert {*SCHEMES, *REFUSED} == set(PRESET_SCHEMES)
    assert not set(SCHEMES) & set(REFUSED)


@pytest.mark.parametrize(
    "name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8", "W4A8", "FP8", "FP8_DYNAMIC", "W4AFP8"]
)
def test_a_scheme_stores_what_the_table_of_compressed_tensors_says(name):
    assert scheme_made(name) == preset(name)


@pytest.mark.parametrize("technique", QUANTIZING)
def test_a_step_takes_a_scheme_or_says_that_it_cannot(technique):
    accepted, refused = [], {}
    for name in sorted(SCHEMES):
        learned = {"learn_scales": True} if technique == "qat" and name == "FP8" else {}
        try:
            step = catalogue().get(technique).from_dict({"scheme": name.lower(), **learned})
        except RecipeError as error:
            refused[name] = str(error)
            continue
        accepted.append(name)
        kind, inputs = getattr(step, "format", "int"), getattr(step, "activations", None)
        if kind in ("nvfp4", "mxfp4"):
            made = compressed.scheme_of(GridSpec(step.bits, kind, "group", step.group_size))
            assert stored({"weights": made.weights, "input_activations": None}) == preset(name)
            continue
        made = compressed.scheme(
            step.bits,
            "float" if kind == "fp8" else "int",
            getattr(step, "strategy", None) or ("group" if step.group_size else "channel"),
            step.group_size,
            getattr(step, "symmetric", True),
            inputs,
            inputs is not None and not getattr(step, "dynamic", True),
        )
        assert stored({"weights": made.weights, "input_activations": made.input_activations}) == preset(name)
    assert {"W4A16", "W3A16", "W8A16"} <= set(accepted)
    assert all(text.startswith(f"{technique} cannot quantize to {name}") for name, text in refused.items())
    assert ("FP8" in accepted) == (technique in ("rtn", "qat"))
    assert ("NVFP4A16" in accepted) == ("MXFP4A16" in accepted) == (technique in ("rtn", "gptq", "signround"))


@pytest.mark.parametrize("technique", ["gobo", "peg", "llm_int8", "mixed_precision", "qbert", "magnitude", "logit_kd"])
def test_a_step_with_a_format_of_its_own_takes_no_scheme(technique):
    with pytest.raises(RecipeError, match=f"{technique} has a format of its own"):
        OptimConfig.parse([{"technique": technique, "scheme": "W8A8"}])


def test_a_scheme_in_a_step_gives_the_weights_of_its_fields():
    by_name = optimize(model(), [{"technique": "gptq", "scheme": "W4A16_ASYM"}], DATA)
    by_hand = optimize(model(), [{"technique": "gptq", "bits": 4, "group_size": 128, "symmetric": False}], DATA)
    for (name, one), (_, other) in zip(by_name.state_dict().items(), by_hand.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert OptimConfig.parse([{"technique": "gptq", "scheme": "W4A16_ASYM"}]).to_dict() == {
        "steps": [{"technique": "gptq", "symmetric": False}]
    }


@pytest.mark.parametrize("name", ["FP8", "W4AFP8", "W4A16_ASYM", "W4A8", "INT8"])
def test_stock_transformers_reloads_a_scheme(name, tmp_path):
    made = optimize(model(), name, DATA)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(DATA).logits, made.eval()(DATA).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_scheme_that_no_format_expresses_is_refused_with_the_reason(name):
    for form in (name, name.lower(), [{"technique": "rtn", "scheme": name}]):
        with pytest.raises(RecipeError, match=f"scheme {name} cannot be written: "):
            OptimConfig.parse(form)


def test_a_field_that_contradicts_the_scheme_is_refused_and_one_that_agrees_is_not():
    with pytest.raises(RecipeError, match="scheme W4A16 means group_size: 128, not 32; leave out group_size"):
        OptimConfig.parse([{"technique": "gptq", "scheme": "w4a16", "group_size": 32}])
    with pytest.raises(RecipeError, match="means activations: null, not 'int8'"):
        OptimConfig.parse([{"technique": "rtn", "scheme": "W8A16", "activations": "int8"}])
    step = OptimConfig.parse([{"technique": "gptq", "scheme": "W4A16", "bits": 4, "observer": "mse"}]).steps[0]
    assert (step.bits, step.group_size, step.observer) == (4, 128, "mse")


def test_an_unknown_scheme_names_the_nearest_and_hostile_values_are_refused():
    with pytest.raises(RecipeError, match="no scheme 'W4A16_ASM'; did you mean 'W4A16_ASYM'"):
        OptimConfig.parse([{"technique": "rtn", "scheme": "W4A16_ASM"}])
    for value in (None, 4, ["W4A16"], {"W4A16": 1}, "W" * 10**6, "\x1b[2J"):
        with pytest.raises(RecipeError, match="no scheme") as error:
            OptimConfig.parse([{"technique": "rtn", "scheme": value}])
        assert len(str(error.value)) < 1000
        assert str(error.value).isprintable()


def test_case_tells_a_scheme_from_the_shipped_recipe_of_the_same_letters(caplog):
    assert {"w4a16", "w8a8", "fp8", "w3a16", "w4a8"} <= set(shipped_recipes())
    assert OptimConfig.parse("w4a16").steps[0].group_size == 32
    with caplog.at_level(logging.INFO, "hf_optim"):
        assert OptimConfig.parse("W4A16").steps[0].group_size == 128
    assert "W4A16 is the scheme (gptq, groups of 128 inputs); the shipped recipe is w4a16" in caplog.text
    with pytest.raises(RecipeError, match="'W4a16' could be the shipped recipe w4a16 or the scheme W4A16"):
        OptimConfig.parse("W4a16")
    # Without a recipe of these letters, case does not matter.
    assert OptimConfig.parse("fp8_dynamic").name == OptimConfig.parse("FP8_DYNAMIC").name == "FP8_DYNAMIC"


def test_a_scheme_may_stand_in_a_list_of_steps():
    recipe = OptimConfig.parse(["smoothquant", "W8A8"])
    recipe.check()
    assert recipe.to_dict()["steps"][1] == {"technique": "rtn", "activations": "int8"}

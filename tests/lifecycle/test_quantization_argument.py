"""``quantization_config=OptimQuantizationConfig(...)`` is ``optim_config=``: the same bits in memory and on disk."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, pipeline

import hf_optim
from hf_optim import CheckpointError, OptimConfig, OptimQuantizationConfig, RecipeError, run_of

IDS = torch.randint(2, 60, (8, 16), generator=torch.Generator().manual_seed(0))
FORMS = {
    "rtn": ([{"technique": "rtn", "bits": 4, "group_size": 32}], None),
    "gptq": ({"technique": "gptq", "group_size": 32}, IDS),
    "a shipped recipe": ("w8a8", None),
    "a scheme": ("FP8_DYNAMIC", None),
    "nm": ([{"technique": "nm", "score": "activation"}], IDS),
    "an OptimConfig": (OptimConfig.load("magnitude50"), None),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "m"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def require_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.many
@pytest.mark.parametrize("form", FORMS)
def test_weights_and_files_are_those_of_optim_config(form, checkpoint, tmp_path):
    recipe, calibration = FORMS[form]
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=recipe, calibration=calibration)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=OptimQuantizationConfig(recipe, calibration=calibration)
    )
    require_equal(theirs, ours)
    assert run_of(theirs).recipe.to_dict() == run_of(ours).recipe.to_dict()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text()).get("quantization_config", {})
    assert stored.get("quant_method", "compressed-tensors") == "compressed-tensors"


def test_auto_runs_a_compressed_checkpoint_on_kernels(checkpoint, tmp_path):
    recipe = [{"technique": "rtn", "bits": 4, "group_size": 32, "skip": ["*.down_proj"]}]
    LlamaForCausalLM.from_pretrained(checkpoint, optim_config=recipe, dtype="bfloat16").save_pretrained(tmp_path / "c")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "c", optim_config="auto")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "c", quantization_config=OptimQuantizationConfig("auto"))
    require_equal(theirs, ours)
    assert str(hf_optim.report(theirs)) == str(hf_optim.report(ours))
    assert theirs.config.quantization_config.quant_method == "compressed-tensors"


def test_a_pipeline_takes_it_as_it_takes_those_of_other_backends(checkpoint):
    config = OptimQuantizationConfig("w8a8")
    made = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    found = pipeline("feature-extraction", model=str(checkpoint), model_kwargs={"quantization_config": config}).model
    assert run_of(found).finished
    assert torch.equal(found.layers[0].mlp.up_proj.weight, made.model.layers[0].mlp.up_proj.weight)


def test_a_recipe_data_or_tokenizer_given_twice_is_refused(checkpoint):
    config = OptimQuantizationConfig("gptq", calibration=IDS)
    with pytest.raises(RecipeError, match="optim_config and quantization_config both hold a recipe"):
        LlamaForCausalLM.from_pretrained(checkpoint, optim_config="w8a8", quantization_config=config)
    with pytest.raises(RecipeError, match="calibration is given both to OptimQuantizationConfig and to"):
        LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=config, calibration=IDS)
    with pytest.raises(RecipeError, match="no recipe 'w4a61'; did you mean"):
        OptimQuantizationConfig("w4a61")
    with pytest.raises(RecipeError, match="not a mapping for 'hf_optim'"):
        LlamaForCausalLM.from_pretrained(checkpoint, quantization_config={"quant_method": "hf_optim", "recipe": "rtn"})


def test_configurations_of_other_backends_are_left_to_transformers(checkpoint):
    with pytest.raises(ImportError, match="bitsandbytes"):
        LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_checkpoint_that_claims_the_method_is_refused_and_its_recipe_not_run(checkpoint, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "evil")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hf_optim", "recipe": "magnitude50"}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    assert OptimQuantizationConfig  # registers the method with transformers
    with pytest.raises(CheckpointError, match="names the method 'hf_optim', which hf_optim never writes"):
        LlamaForCausalLM.from_pretrained(tmp_path / "evil")
    for recipe in ("w8a8", "auto"):
        with pytest.raises((CheckpointError, RecipeError)):
            LlamaForCausalLM.from_pretrained(tmp_path / "evil", optim_config=recipe)


def test_loading_without_the_wrapper_is_an_error_and_not_a_random_model(checkpoint):
    config = OptimQuantizationConfig("w8a8")
    from hf_optim.lifecycle import from_pretrained

    from_pretrained.uninstall()
    try:
        with pytest.raises(RecipeError, match="cannot run a recipe: load with from_pretrained"):
            LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    finally:
        from_pretrained.install()


def test_it_prints_the_recipe_and_not_the_data():
    shown = repr(OptimQuantizationConfig("gptq", calibration=["secret text"]))
    assert '"technique": "gptq"' in shown
    assert "secret" not in shown
    assert dict(OptimQuantizationConfig("auto")) == {"quant_method": "hf_optim", "recipe": "auto"}

"""The entry points: from_pretrained(optim_config=...), optimize, advance, release."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

import hf_optim
from hf_optim import (
    CheckpointError,
    Contract,
    ModelError,
    OptimConfig,
    RecipeError,
    Reload,
    Technique,
    hookimpl,
    technique,
)
from hf_optim.runs.run import find_run

HALF = [{"technique": "magnitude", "sparsity": 0.5}]


@technique("wishful", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Wishful(Technique):
    """Asks for something at load.

    Attributes:
        key: what.
        value: its value.
    """

    key: str = "attn_implementation"
    value: str = "eager"

    @hookimpl
    def prepare_load(self, run, load_kwargs):
        assert run.config.hidden_size == 32
        with pytest.raises(ModelError, match="not loaded yet"):
            run.model  # noqa: B018
        return {self.key: self.value}


@technique("replacing", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Replacing(Technique):
    """Puts another model in the place of the one that was loaded."""

    @hookimpl
    def transform_model(self, run):
        return copy.deepcopy(run.model)


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def zeros(model) -> float:
    weight = model.model.layers[1].mlp.up_proj.weight
    return float((weight == 0).float().mean())


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained_optimizes_a_sharded_checkpoint(checkpoint, cls):
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    model = cls.from_pretrained(checkpoint, optim_config=HALF)
    assert type(model) is LlamaForCausalLM
    assert zeros(model) == 0.5
    assert not model.training
    assert hf_optim.run_of(model).record.base_model["id"] == "model"


def test_arguments_of_the_stock_call_pass_through(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, optim_config=HALF, dtype=torch.bfloat16, output_loading_info=True, revision="main", device_map="cpu"
    )
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert zeros(model) == 0.5
    changed = LlamaForCausalLM.from_pretrained(checkpoint, optim_config=HALF, rms_norm_eps=0.25)
    assert changed.config.rms_norm_eps == 0.25


def test_optimize_takes_a_model_in_memory():
    model = tiny_llama()
    assert hf_optim.optimize(model, HALF) is model
    assert zeros(model) == 0.5


def test_a_replaced_model_carries_the_run():
    model = tiny_llama()
    made = hf_optim.optimize(model, [Replacing(), *OptimConfig.parse(HALF).steps])
    assert made is not model
    assert hf_optim.run_of(made).model is made
    assert find_run(model) is None
    assert zeros(model) == 0.0
    assert zeros(made) == 0.5


def test_prepare_load_reaches_from_pretrained_and_a_model_in_memory(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=Wishful())
    assert model.config._attn_implementation == "eager"
    model = hf_optim.optimize(tiny_llama(), Wishful())
    assert model.config._attn_implementation == "eager"


def test_two_owners_of_a_key_are_both_named(checkpoint):
    with pytest.raises(RecipeError, match=r"step 1 \(wishful\) and step 2 \(wishful\) both set 'attn_implementation'"):
        AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=[Wishful(), Wishful(value="sdpa")])
    with pytest.raises(RecipeError, match="to 'eager', the call to 'sdpa'"):
        AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=Wishful(), attn_implementation="sdpa")


def test_what_can_only_be_set_at_load_says_so():
    with pytest.raises(ModelError, match="use from_pretrained"):
        hf_optim.optimize(tiny_llama(), Wishful(key="quantization_config", value="x"))


def test_a_bad_recipe_is_refused_before_a_weight_is_read(tmp_path):
    (tmp_path / "config.json").write_text(tiny_llama().config.to_json_string())
    with pytest.raises(RecipeError, match="must be followed by a quantization step"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=[{"technique": "smoothquant"}])


def test_a_truncated_shard_is_named(checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{shard.name} of .* is truncated or corrupt"):
        AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=HALF)


def test_pickles_are_refused(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="holds pickle files"):
        LlamaForCausalLM.from_pretrained(tmp_path, optim_config=HALF)
    with pytest.raises(CheckpointError, match="safetensors only"):
        LlamaForCausalLM.from_pretrained(tmp_path, optim_config=HALF, use_safetensors=False)


def test_copies_and_pickles_have_no_run():
    model = hf_optim.optimize(tiny_llama(), HALF)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert find_run(other) is None
        assert zeros(other) == 0.5
    assert find_run(model) is not None


def test_release_leaves_an_ordinary_model(tmp_path):
    model = tiny_llama()
    before = set(vars(model))
    hf_optim.release(hf_optim.optimize(model, HALF))
    assert set(vars(model)) == before
    with pytest.raises(hf_optim.OptimError, match="was not optimized by hf_optim"):
        hf_optim.run_of(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "hf_optim.json").exists()


def test_a_training_stage_waits_and_advance_goes_on():
    model = hf_optim.optimize(tiny_llama(), [{"technique": "gmp", "sparsity": 0.5}, *HALF])
    run = hf_optim.run_of(model)
    assert str(run.stage) == "[gmp]"
    assert not run.finished
    hf_optim.advance(model)
    assert run.finished
    assert zeros(model) == 0.5


# An input that lies near a tie falls to one side or the other with the order of summation: quantized inputs differ.
@pytest.mark.parametrize(
    ("step", "bound"), [({"bits": 4, "group_size": 32}, 1e-6), ({"bits": 8, "activations": "int8"}, 2e-2)], ids=str
)
def test_a_recipe_returns_a_model_that_computes_on_packed_weights(checkpoint, step, bound, tmp_path):
    recipe = [{"technique": "rtn", **step}]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config=recipe)
    in_memory = hf_optim.optimize(LlamaForCausalLM.from_pretrained(checkpoint), recipe)
    rows = {row.name: row for row in hf_optim.report(model)}
    served = [name for name, row in rows.items() if row.kernel]
    assert served, rows
    assert all("weight" not in model.get_submodule(name)._parameters for name in served)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        wanted = in_memory(ids).logits
        assert float((model(ids).logits - wanted).norm() / wanted.norm()) < bound
    model.save_pretrained(tmp_path / "packed")
    in_memory.save_pretrained(tmp_path / "dense")
    name = "model.safetensors"
    assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_auto_on_a_plain_checkpoint_is_the_plain_model(checkpoint):
    ids = torch.arange(3, 20)[None]
    stock = AutoModelForCausalLM.from_pretrained(checkpoint)
    auto = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto")
    assert torch.equal(stock(ids).logits, auto(ids).logits)


def test_a_checkpoint_of_another_class_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"has no weights for .* tensors of GPT2LMHeadModel"):
        GPT2LMHeadModel.from_pretrained(checkpoint, optim_config=[{"technique": "magnitude", "targets": ["Conv1D"]}])


def test_a_new_head_may_be_missing(checkpoint):
    model = LlamaForSequenceClassification.from_pretrained(checkpoint, optim_config=HALF)
    assert zeros(model) == 0.5


def test_a_pruned_float_model_is_not_told_that_its_kernels_are_missing(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, optim_config="nm")
    assert not caplog.records
    with pytest.warns(UserWarning, match="^these layers run on dense kernels, not on compressed ones: model.layers.0"):
        hf_optim.accelerate(model)


@pytest.mark.parametrize("recipe", ["auto", [{"technique": "rtn"}]], ids=["auto", "recipe"])
def test_a_folder_without_a_configuration_is_not_taken_for_a_default_one(recipe, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no model configuration at .*: it has no config\.json"):
        LlamaForCausalLM.from_pretrained(tmp_path, optim_config=recipe)

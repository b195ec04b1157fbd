"""Tensors that a load does not place are an error at every door, not random weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from reference_packers import Grid, gptq, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import hf_optim
from hf_optim.checkpoints import meta_model
from hf_optim.checkpoints.source import ModelSource, load_model
from hf_optim.errors import CheckpointError, ModelError
from hf_optim.testing.models import tiny_llama
from hf_optim.toolkit.distillation import teachers

STEP = {"technique": "rtn", "bits": 4, "group_size": 16}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    home = tmp_path_factory.mktemp("packed") / "llama"
    hf_optim.optimize(tiny_llama(), [STEP]).save_pretrained(home)
    return home


@pytest.fixture
def broken(packed, tmp_path):
    """Return a function that copies the checkpoint and changes its configuration or its tensors."""

    def change(config=None, tensors=None):
        home = tmp_path / "broken"
        shutil.copytree(packed, home)
        if config is not None:
            path = home / "config.json"
            content = json.loads(path.read_text())
            config(content)
            path.write_text(json.dumps(content))
        if tensors is not None:
            path = home / "model.safetensors"
            content = load_file(path)
            tensors(content)
            save_file(content, path, metadata={"format": "pt"})
        return home

    return change


DOORS = {
    "auto": lambda home: AutoModelForCausalLM.from_pretrained(home, optim_config="auto"),
    "recipe": lambda home: AutoModelForCausalLM.from_pretrained(home, optim_config=[STEP]),
    "command": lambda home: load_model(ModelSource(str(home))),
}


@pytest.mark.parametrize("door", DOORS)
def test_codes_without_a_quantization_config_are_refused(broken, door):
    home = broken(config=lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="tensors of quantized layers"):
        DOORS[door](home)


@pytest.mark.parametrize("door", ["auto", "command"])
def test_a_layer_without_its_codes_is_refused(broken, door):
    home = broken(tensors=lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_packed"))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight|quantization_config"):
        DOORS[door](home)


def test_a_config_that_names_no_layer_is_refused(broken):
    home = broken(config=lambda config: config["quantization_config"].update(config_groups={}))
    with pytest.raises(CheckpointError):
        DOORS["auto"](home)


@pytest.mark.parametrize("step", [{"technique": "rtn", "bits": 4, "group_size": 32}, {"technique": "zeroquant"}])
def test_auto_places_renamed_keys(step, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    image = torch.randn(2, 3, 32, 32)
    data = [{"pixel_values": image}]
    hf_optim.optimize(model, [step], calibration=data).save_pretrained(tmp_path)
    with torch.no_grad():
        want = ViTForImageClassification.from_pretrained(tmp_path).eval()(image).logits
        auto = ViTForImageClassification.from_pretrained(tmp_path, optim_config="auto").eval()
        got = auto(image).logits
    assert (got - want).norm() < 0.02 * want.norm()


# -- shards, adapters, GPTQ -------------------------------------------------------------------------------------------
ALL_DOORS = {
    **DOORS,
    "streamed": lambda home: meta_model.build(ModelSource(str(home))),
    "teacher": lambda home: teachers.load(str(home), "step 1"),
}


@pytest.mark.parametrize("door", ALL_DOORS)
@pytest.mark.parametrize("damage", ["missing shard", "not in the index", "in two shards"])
def test_shards_that_do_not_add_up_are_refused_by_name(damage, door, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = tmp_path / index["weight_map"][name]
    if damage == "missing shard":
        shard.unlink()
    elif damage == "not in the index":
        others = {key: file for key, file in index["weight_map"].items() if file != shard.name}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": others}))
    else:
        other = next(path for path in tmp_path.glob("*.safetensors") if path != shard)
        save_file({**load_file(other), name: load_file(shard)[name] * 2}, other, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{shard.name}|layers\.1\."):
        ALL_DOORS[door](tmp_path)


ADAPTERS = {
    "lost": lambda state, key: state.pop(key),
    "another shape": lambda state, key: state.update({key: state[key][:1].clone()}),
    "integers": lambda state, key: state.update({key: state[key].to(torch.int8)}),
    "renamed": lambda state, key: state.update({f"{key}x": state.pop(key)}),
}


@pytest.mark.parametrize("door", ["auto", "recipe"])
@pytest.mark.parametrize("damage", [*ADAPTERS, "base", "whole"])
def test_an_adapter_and_its_base_are_whole(damage, door, tmp_path):
    """The loading info of transformers is that of the adapter, so that the base is looked at on its own."""
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(adapter)
    path = base / "model.safetensors" if damage == "base" else adapter / "adapter_model.safetensors"
    state = load_file(path)
    if damage == "base":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif damage != "whole":
        ADAPTERS[damage](state, min(state))
    save_file(state, path, metadata={"format": "pt"})
    recipe = "auto" if door == "auto" else [{"technique": "magnitude", "sparsity": 0.5}]
    if damage == "whole" and door == "auto":
        assert AutoModelForCausalLM.from_pretrained(adapter, optim_config=recipe)._hf_peft_config_loaded
        return
    if damage == "whole":  # what a recipe makes of the base would not be in the checkpoint, which is an adapter
        with pytest.raises(ModelError, match="q_proj of LlamaForCausalLM holds adapters: merge them first"):
            AutoModelForCausalLM.from_pretrained(adapter, optim_config=recipe)
        return
    with pytest.raises(CheckpointError, match=r"up_proj|q_proj"):
        AutoModelForCausalLM.from_pretrained(adapter, optim_config=recipe)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize("door", ["auto", "command", "teacher"])
@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("damage", ["lost", "floats"])
def test_a_gptq_layer_without_a_tensor_is_refused_by_name(damage, leaf, door, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    layers, rng = {}, np.random.default_rng(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layers[name] = gptq(Grid(rng, module.out_features, module.in_features, 4, 32, True))
    write(model, tmp_path, layers, GPTQ)
    state, key = load_file(tmp_path / "model.safetensors"), f"model.layers.1.mlp.up_proj.{leaf}"
    if damage == "lost":
        del state[key]
    else:
        state[key] = state[key].float() if leaf != "scales" else state[key].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"up_proj\.{leaf}"):
        ALL_DOORS[door](tmp_path)


# -- new heads --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", ["classifier.weight", "classifier.bias", "both"])
@pytest.mark.parametrize("door", ["auto", "recipe"])
def test_the_head_of_the_class_that_saved_it_is_not_new(lost, door, tmp_path):
    model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias") if lost == "both" else (lost,):
        del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="classifier"):
        ViTForImageClassification.from_pretrained(tmp_path, optim_config="auto" if door == "auto" else [STEP])


def test_a_head_for_training_is_new_as_a_whole(tmp_path):
    """A recipe that trains may begin with a new head; half of one is not new."""
    model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    model.vit.save_pretrained(tmp_path)
    ViTForImageClassification.from_pretrained(tmp_path, optim_config=[{"technique": "gmp"}])
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "classifier.bias": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        ViTForImageClassification.from_pretrained(tmp_path, optim_config=[{"technique": "gmp"}])

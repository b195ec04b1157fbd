"""Families whose keys transformers renames while loading: recipe, save, stock reload and auto compute the same.

At every door, a checkpoint whose tensors do not fit is refused by the name of a tensor.
"""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from renamed_families import FAMILIES, build_family
from safetensors.torch import load_file, save_file

import hf_optim
from hf_optim import compressed
from hf_optim.checkpoints import meta_model
from hf_optim.checkpoints.source import ModelSource, load_model
from hf_optim.errors import CheckpointError
from hf_optim.toolkit.distillation import teachers

RECIPES = {
    "w4": [{"technique": "rtn", "bits": 4, "group_size": 16}],
    "w8a8": [{"technique": "rtn", "bits": 8, "activations": "int8"}],
}


@torch.no_grad()
def output(model, inputs):
    return model.eval()(**inputs).to_tuple()[0]


def inputs_of_layers(model, inputs):
    """Return the output of a model, and what each of its quantized linear layers read and returned, by name."""
    seen, hooks = {}, []
    for name, module in compressed.quantized_modules(model).items():
        if isinstance(module, torch.nn.Linear):
            keep = functools.partial(lambda name, module, args, out: seen.update({name: (args[0], out)}), name)
            hooks.append(module.register_forward_hook(keep))
    found = output(model, inputs)
    for hook in hooks:
        hook.remove()
    return found, seen


@pytest.mark.many
@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_save_stock_and_auto_compute_the_same(family, recipe, tmp_path):
    model, inputs = build_family(family)
    kind = type(model)
    model.save_pretrained(tmp_path / "dense")
    model = kind.from_pretrained(tmp_path / "dense", optim_config=RECIPES[recipe], calibration=[inputs])
    model.save_pretrained(tmp_path / "compressed")
    ours = output(hf_optim.restore(model), inputs)
    stock = kind.from_pretrained(tmp_path / "compressed")
    theirs, layers = inputs_of_layers(stock, inputs)
    assert layers
    assert torch.equal(theirs, ours)
    auto = kind.from_pretrained(tmp_path / "compressed", optim_config="auto")
    assert compressed.quantized_modules(auto).keys() >= layers.keys()
    with torch.no_grad():
        for name, (read, returned) in layers.items():
            if recipe == "w8a8" and read.dim() != 3:
                continue  # compressed-tensors takes the first two dimensions for tokens; a kernel all but the last
            # A kernel adds the same products in another order, and scales the sum instead of the terms.
            torch.testing.assert_close(auto.get_submodule(name)(read), returned, rtol=1e-4, atol=1e-5)
    # With int8 inputs, a value between two codes can get the other one: 1/127 of the largest in its row.
    found = output(auto, inputs)
    assert float((found - theirs).norm() / theirs.norm()) <= (0.02 if recipe == "w8a8" else 1e-5)
    assert torch.equal(output(hf_optim.restore(auto), inputs), theirs)


# -- checkpoints that do not fit --------------------------------------------------------------------------------------
def auto(kind, home):
    return kind.from_pretrained(home, optim_config="auto")


QUANTIZED_DOORS = {
    "auto": auto,
    "command": lambda kind, home: load_model(ModelSource(str(home))),
    "teacher": lambda kind, home: teachers.load(str(home), "step 1"),
}
DENSE_DOORS = {
    **QUANTIZED_DOORS,
    "recipe": lambda kind, home: kind.from_pretrained(home, optim_config=RECIPES["w4"]),
    "streamed": lambda kind, home: meta_model.build(ModelSource(str(home))),
}
# family -> the end of the key of a layer in its checkpoint.
LAYERS = {
    "llava": "language_model.model.layers.1.self_attn.q_proj",
    "vit": "encoder.layer.1.attention.attention.query",
    "whisper": "decoder.layers.0.fc1",
    "qwen3-moe": "layers.1.mlp.experts.2.up_proj",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    @functools.cache
    def make(family, recipe):
        model, inputs = build_family(family)
        home = tmp_path_factory.mktemp("family")
        if recipe != "dense":
            model = hf_optim.optimize(model, RECIPES[recipe], calibration=[inputs])
        model.save_pretrained(home)
        return type(model), home

    return make


def damaged(home, tmp_path, layer, change):
    copy = shutil.copytree(home, tmp_path / "damaged")
    state = load_file(copy / "model.safetensors")
    keys = {key.rpartition(".")[2]: key for key in state if key.rpartition(".")[0].endswith(layer)}
    assert keys
    change(state, keys)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, copy / "model.safetensors", {"format": "pt"})
    return copy


def lose(*names):
    return lambda state, keys: [state.pop(keys[name]) for name in names]


def cast(name, dtype):
    return lambda state, keys: state.update({keys[name]: state[keys[name]].to(dtype)})


def halve(name):
    return lambda state, keys: state.update({keys[name]: state[keys[name]][: len(state[keys[name]]) // 2]})


def rename(state, keys):
    for key in keys.values():
        state[key.replace(".1.", ".7.", 1) if ".1." in key else f"x.{key}"] = state.pop(key)


W4_DAMAGES = {
    "no codes": lose("weight_packed"),
    "no scale": lose("weight_scale"),
    "no layer": lose("weight_packed", "weight_scale", "weight_shape"),
    "float codes": cast("weight_packed", torch.float32),
    "float shape": cast("weight_shape", torch.float32),
    "integer scale": cast("weight_scale", torch.int8),
    "half of the codes": halve("weight_packed"),
    "half of the scales": halve("weight_scale"),
    "renamed": rename,
}
DENSE_DAMAGES = {
    "no weight": lose("weight"),
    "integers": cast("weight", torch.int8),
    "half": halve("weight"),
    "renamed": rename,
}


@pytest.mark.many
@pytest.mark.parametrize("damage", W4_DAMAGES)
@pytest.mark.parametrize("family", LAYERS)
def test_damaged_codes_are_refused_by_name(family, damage, checkpoints, tmp_path):
    kind, home = checkpoints(family, "w4")
    copy = damaged(home, tmp_path, LAYERS[family], W4_DAMAGES[damage])
    for door in QUANTIZED_DOORS.values():
        with pytest.raises(CheckpointError, match=r"\w+\.\d+\.\w+"):
            door(kind, copy)


@pytest.mark.many
@pytest.mark.parametrize("damage", DENSE_DAMAGES)
@pytest.mark.parametrize("family", LAYERS)
def test_damaged_weights_are_refused_by_name(family, damage, checkpoints, tmp_path):
    kind, home = checkpoints(family, "dense")
    copy = damaged(home, tmp_path, LAYERS[family], DENSE_DAMAGES[damage])
    for door in DENSE_DOORS.values():
        with pytest.raises(CheckpointError, match=r"\w+\.\d+\.\w+"):
            door(kind, copy)


@pytest.mark.many
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", LAYERS)
def test_a_lost_quantization_config_is_named(family, recipe, checkpoints, tmp_path):
    kind, home = checkpoints(family, recipe)
    copy = shutil.copytree(home, tmp_path / "lost")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    for door in DENSE_DOORS.values():
        with pytest.raises(CheckpointError, match="quantization_config"):
            door(kind, copy)

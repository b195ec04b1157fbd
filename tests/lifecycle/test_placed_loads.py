"""Tensors that a load does not place are an error at every door, not random weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import hf_optim
from hf_optim.checkpoints.source import ModelSource, load_model
from hf_optim.errors import CheckpointError
from hf_optim.testing.models import tiny_llama

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

"""Folders without weights that hf_optim reads: each door names what is there, and the way to safetensors."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from hf_optim import CheckpointError
from hf_optim.cli import main

FORMATS = {
    "model.gguf": "weights of GGUF",
    "tf_model.h5": "weights of TensorFlow",
    "flax_model.msgpack": "weights of Flax",
    "model.onnx": "weights of ONNX",
    "weights.pt": "pickle files",
}
RTN = [{"technique": "rtn", "bits": 8}]


@pytest.fixture(params=FORMATS)
def foreign(request, tmp_path):
    """A configuration beside weights of another format, and how these are named."""
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / request.param).write_bytes(b"x")
    return tmp_path, f"holds {FORMATS[request.param]} ({request.param})"


def test_loading_names_the_format(foreign):
    folder, named = foreign
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, optim_config=RTN)
    assert named in str(caught.value)


def test_check_refuses_what_compress_refuses(foreign, tmp_path, capsys):
    folder, named = foreign
    said = []
    for line in (["check", "w8a8", "--model", str(folder)], ["compress", str(folder), "--recipe", "w8a8", "--output"]):
        assert main([*line, str(tmp_path / "out")] if line[-1] == "--output" else line)
        said.append("".join(capsys.readouterr()))
    assert all(named in text for text in said), said


def test_a_configuration_alone_is_checked(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    assert main(["check", "w8a8", "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["parameters"] > 0


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_a_folder_without_a_configuration_says_so(tmp_path, name, capsys):
    if name:
        (tmp_path / name).write_bytes(b"x")
    other = f"; it holds {FORMATS[name]} ({name})" if name else ": name the directory that save_pretrained wrote"
    assert main(["check", "w8a8", "--model", str(tmp_path)]) == 2
    assert f"it has no config.json{other}" in capsys.readouterr().err


def test_serving_does_not_wait_for_a_hub_that_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["serving", "org/absent"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err

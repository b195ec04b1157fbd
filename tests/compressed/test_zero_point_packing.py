"""Packed zero points: half the bytes, and stock transformers reads them with identical logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import compressed
from hf_optim.errors import CheckpointError
from hf_optim.toolkit.compat import VERSION

IDS = torch.arange(18).view(2, 9) % 64
STOCK = """
import torch, transformers
from safetensors.torch import save_file
from transformers.utils import logging
logging.disable_progress_bar()
ids = torch.arange(18).view(2, 9) % 64
found = {}
for d in directories:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(d).eval()
    except Exception as error:
        print("REFUSED", d, type(error).__name__)
        continue
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, d + "/logits.safetensors")
"""


def write(folder, bits=4, size=32, dtype=torch.float32):
    model = tiny_llama(hidden_size=64, intermediate_size=96).to(dtype)
    step = {"technique": "rtn", "bits": bits, "symmetric": False, **({"group_size": size} if size else {})}
    hf_optim.optimize(model, [step]).save_pretrained(folder)


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_stock_reads_packed_zero_points_with_identical_logits(tmp_path, stock_python):
    cases = {"4": (4, 32, torch.float32), "3": (3, 32, torch.bfloat16), "channel": (4, None, torch.float32)}
    for name, (bits, size, dtype) in cases.items():
        write(tmp_path / name, bits, size, dtype)
        compressed.pack_zero_points(tmp_path / name, tmp_path / f"packed-{name}")
        assert bytes_of(tmp_path / f"packed-{name}") < bytes_of(tmp_path / name)
    # Without the key, the ordinary way of transformers: as llm-compressor writes it.
    plain = tmp_path / "plain"
    compressed.pack_zero_points(tmp_path / "4", plain)
    config = json.loads((plain / "config.json").read_text())
    assert config["quantization_config"].pop("dequantize") is True
    (plain / "config.json").write_text(json.dumps(config))
    homes = [str(tmp_path / f"packed-{name}") for name in cases]
    done = stock_python.copy(f"directories = {[*homes, str(plain)]}\n{STOCK}")
    assert done.status == 0, done.err[-3000:]
    refused = VERSION >= (5, 23)  # 5.17 gives these parameters the shape that the file has
    assert done.out.count("REFUSED") == refused
    assert (f"REFUSED {plain} RuntimeError" in done.out) == refused
    with torch.no_grad():
        unpacked = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name)(IDS).logits for name in cases}
        ours = hf_optim.restore(AutoModelForCausalLM.from_pretrained(plain, optim_config="auto"))(IDS).logits
    assert torch.equal(ours, unpacked["4"])
    wanted = {f"packed-{name}": values for name, values in unpacked.items()}
    wanted |= {} if refused else {"plain": unpacked["4"]}
    for name, values in wanted.items():
        assert torch.equal(load_file(tmp_path / name / "logits.safetensors")["logits"], values)


def test_codes_take_their_bits(tmp_path):
    write(tmp_path / "a")
    compressed.pack_zero_points(tmp_path / "a", tmp_path / "b")
    state = load_file(tmp_path / "b" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj."
    assert state[up + "weight_packed"].shape == (96, 8)
    assert state[up + "weight_zero_point"].shape == (12, 2)
    assert state[up + "weight_zero_point"].dtype == torch.int32


@pytest.mark.parametrize("step", [{"technique": "rtn"}, {"technique": "rtn", "bits": 8, "activations": "int8"}])
def test_other_checkpoints_are_refused(step, tmp_path):
    hf_optim.optimize(tiny_llama(), [step]).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="one scheme of asymmetric integers"):
        compressed.pack_zero_points(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="exists already"):
        compressed.pack_zero_points(tmp_path / "c", tmp_path / "a")

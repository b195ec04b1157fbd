"""The two integrations with optimum: its command line, and its quantizer interface."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_optim.cli import COMMANDS
from hf_optim.errors import ModelError, RecipeError
from hf_optim.runs.record import Record

optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")

STEPS = [{"technique": "rtn", "bits": 4, "group_size": 16}]


@pytest.fixture
def run(monkeypatch):
    """Run ``optimum-cli`` with these arguments, and return the exit status."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            optimum_cli.main()
        return ended.value.code

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=259).save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    return home


def test_optimum_cli_lists_us(run, capsys):
    assert run("--help") == 0
    assert "optim " in capsys.readouterr().out


def test_optim_has_every_command(run, capsys):
    assert run("optim") == 2
    printed = capsys.readouterr().out
    assert all(f"    {name}" in printed for name in COMMANDS)
    for name in COMMANDS:
        assert run("optim", name, "--help") == 0
        assert f"usage: optimum-cli optim {name}" in capsys.readouterr().out


def test_optim_delegates_with_output_and_exit_status(run, capsys, checkpoint, tmp_path):
    assert run("optim", "check", "w8a8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["composes"] is True
    assert run("optim", "check", "smoothquant", "--json") == 1
    assert json.loads(capsys.readouterr().out)["composes"] is False
    assert run("optim", "check", "w8a9") == 2
    assert capsys.readouterr().err.startswith("hf-optim: no recipe 'w8a9'")
    assert run("optim", "compress", checkpoint, "--recipe", "w8a8", "--output", tmp_path / "out") == 0
    assert Record.read(tmp_path / "out").finished


def test_registration_imports_nothing_heavy_and_keeps_namespaces_clean():
    code = """
import sys
import optimum.commands.register.hf_optim as ours
assert ours.REGISTER_COMMANDS[0].COMMAND.name == "optim"
print([name for name in ("torch", "transformers", "hf_optim") if name in sys.modules])
import optimum, optimum.commands
print([getattr(package, "__file__", None) for package in (optimum, optimum.commands)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[None, None]"]


# -- OptimQuantizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantizer_class():
    from optimum.quantization_base import OptimumQuantizer

    from hf_optim.lifecycle.optimum import OptimQuantizer

    assert issubclass(OptimQuantizer, OptimumQuantizer)
    return OptimQuantizer


def test_quantizer_writes_a_checkpoint_from_a_path(quantizer_class, checkpoint, tmp_path):
    quantizer = quantizer_class.from_pretrained(checkpoint)
    saved = quantizer.quantize(tmp_path / "out", recipe=STEPS)
    assert saved == tmp_path / "out"
    assert (saved / "tokenizer.json").is_file()
    assert Record.read(saved).finished
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(saved)(ids).logits
        assert torch.equal(reloaded, quantizer.model(ids).logits)
        assert not torch.equal(reloaded, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits)


def test_quantizer_calibrates_a_model_in_memory_on_texts(quantizer_class, tmp_path):
    model = tiny_llama(vocab_size=259)
    quantizer = quantizer_class.from_pretrained(model, tokenizer=tiny_tokenizer())
    assert quantizer.model is model
    recipe = {
        "steps": [{"technique": "smoothquant"}, {"technique": "rtn", "bits": 8}],
        "calibration": {"samples": 4, "seq_len": 16},
    }
    saved = quantizer.quantize(tmp_path / "out", recipe=recipe, calibration=["what the cat did then"] * 8)
    record = Record.read(saved)
    assert record.calibration["samples"] == 4
    assert record.traits == ["quantized"]


def test_quantizer_refuses_what_it_does_not_support(quantizer_class, checkpoint, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        quantizer_class.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"file_name='model\.onnx'"):
        quantizer_class.from_pretrained(checkpoint, file_name="model.onnx")
    quantizer = quantizer_class.from_pretrained(checkpoint)
    with pytest.raises(RecipeError, match="file_prefix='q'"):
        quantizer.quantize(tmp_path / "out", "q", recipe=STEPS)
    with pytest.raises(RecipeError, match="OptimTrainer"):
        quantizer.quantize(tmp_path / "out", recipe="gmp")
    assert not (tmp_path / "out").exists()

"""REMOTE_CODE: stock transformers refuses, loads right when it is allowed to, and never loads wrong in silence."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2Model

from hf_optim import ModelError, remote_code
from hf_optim.remote_code import RemoteCode
from hf_optim_plugins.attention.local import Local

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
CODE = Local.remote_code

BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_optim", "hf_optim_plugins", "hf_optim_generated"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
"""


def converted(model=None, window=4):
    model = remote_code.convert(model if model is not None else tiny_gpt2(), CODE, window)
    model.config.bound_cache()
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def python(code, tmp_path):
    """Run `code` where hf_optim cannot be imported, with a module cache of its own and nobody to ask."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def checkpoint(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", logits(model)


def test_the_model_keeps_its_parameters_and_its_base_class():
    model = tiny_gpt2()
    kind, parameters = type(model), dict(model.named_parameters())
    new = converted(model)
    assert new is model
    assert type(new).__name__ == "LocalGPT2LMHeadModel"
    assert isinstance(new, kind)
    assert all(value is parameters[name] for name, value in new.named_parameters())
    assert {type(m.config).__name__ for m in new.modules() if hasattr(m, "config")} == {"LocalGPT2Config"}


def test_a_checkpoint_names_its_own_type_and_holds_its_code(checkpoint):
    directory, _ = checkpoint
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "local_gpt2"
    assert config["attention_window"] == 4
    assert config["auto_map"]["AutoConfig"] == "modeling_local_gpt2.LocalGPT2Config"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_local_gpt2.LocalGPT2LMHeadModel"
    assert config["auto_map"]["AutoModel"] == "modeling_local_gpt2.LocalGPT2Model"
    tree = ast.parse((directory / "modeling_local_gpt2.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    standard = {name for name in imported if name.partition(".")[0] in sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in imported - standard} == {"torch", "transformers"}


def test_stock_transformers_refuses_by_every_door(checkpoint, tmp_path):
    directory, _ = checkpoint
    done = python(
        f"""
        for load in (AutoModelForCausalLM.from_pretrained, GPT2LMHeadModel.from_pretrained, GPT2Config.from_pretrained):
            try:
                load({str(directory)!r})
                print("loaded")
            except Exception as error:
                print("refused:", "trust_remote_code" in str(error), "windowed_attention" in str(error))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = [line[line.index("refused") :] for line in done.stdout.splitlines() if "refused" in line]
    assert lines == ["refused: True False", "refused: False True", "refused: False True"]
    assert "loaded" not in done.stdout


def test_with_trust_it_loads_right_and_saves_itself_again(checkpoint, tmp_path):
    directory, expected = checkpoint
    again = tmp_path / "again"
    done = python(
        f"""
        model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
        model.save_pretrained({str(again)!r})
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert (again / "modeling_local_gpt2.py").read_bytes() == (directory / "modeling_local_gpt2.py").read_bytes()
    first, second = (json.loads((d / "config.json").read_text()) for d in (directory, again))
    assert {k: v for k, v in second.items() if k != "auto_map"} == {k: v for k, v in first.items() if k != "auto_map"}
    assert "AutoModelForCausalLM" in second["auto_map"]


def test_in_the_process_that_made_it_no_flag_is_needed(checkpoint):
    directory, expected = checkpoint
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(logits(model), expected)
    assert type(AutoModel.from_pretrained(directory)).__name__ == "LocalGPT2Model"


def test_register_teaches_a_fresh_process_without_running_the_checkpoints_code(checkpoint, tmp_path):
    directory, expected = checkpoint
    (directory / "modeling_local_gpt2.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    code = textwrap.dedent(f"""
        import torch
        from hf_optim import remote_code
        from transformers import AutoModelForCausalLM
        print(remote_code.register("local_gpt2").__name__)
        model = AutoModelForCausalLM.from_pretrained({str(directory)!r}).eval()
        ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LocalGPT2Config"
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_unknown_types_are_refused():
    for model_type in ("gpt2", "local_nothing", "global_gpt2", "smoothquant_gpt2"):
        with pytest.raises(ModelError, match=model_type):
            remote_code.register(model_type)


def test_models_from_elsewhere_are_refused():
    class HomeMade(GPT2Model):
        pass

    with torch.random.fork_rng():
        model = HomeMade(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(ModelError, match="HomeMade is not among the classes"):
        remote_code.convert(model, CODE, 4)
    assert type(model) is HomeMade


def test_two_heads_of_one_architecture_share_one_module():
    bert = converted(tiny_bert())
    assert type(bert).__module__ == "hf_optim_generated.modeling_local_bert"
    module = sys.modules[type(bert).__module__]
    assert remote_code.generate(CODE, type(bert.config).__mro__[2]) is module
    assert issubclass(module.LocalBertForMaskedLM, nn.Module)


def test_source_that_fails_leaves_no_module_behind():
    broken = RemoteCode("broken", "raise RuntimeError('on purpose')", "Base", "number", 1)
    with pytest.raises(RuntimeError, match="on purpose"):
        remote_code.generate(broken, GPT2Config)
    assert "hf_optim_generated.modeling_broken_gpt2" not in sys.modules
    with pytest.raises(ValueError, match="broken_gpt2"):
        AutoConfig.for_model("broken_gpt2")


def test_the_generated_text_is_deterministic():
    texts = {remote_code.write_source(CODE, GPT2Config, "modeling_local_gpt2") for _ in range(2)}
    assert len(texts) == 1
    compile(texts.pop(), "modeling_local_gpt2.py", "exec")

"""Errors of the commands: they name options, not arguments of Python, and come before work is done."""

from __future__ import annotations

import json
import time

import pytest
from tiny_models import tiny_llama, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim.cli import main
from hf_optim.errors import CheckpointError, DataError, ModelError, OptimError, RecipeError, cli_message
from hf_optim.toolkit import topology
from hf_optim.toolkit.checkpoint.model_config import load_config
from hf_optim.trust import hub_access


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    for name in ("model", "bare"):
        tiny_llama(vocab_size=259).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_vit().save_pretrained(folder / "vit")
    rows = [{"title": "a cat", "words": f"the cat sat on mat {n}"} for n in range(8)]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "one.jsonl").write_text("".join(json.dumps({"text": row["words"]}) + "\n" for row in rows))
    code = folder / "code"
    code.mkdir()
    (code / "config.json").write_text(
        json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config", "AutoModel": "odd.Model"}})
    )
    (code / "odd.py").write_text("raise SystemExit('it ran')\n")
    return folder


def line(capsys, *words, status=2):
    assert main([str(word) for word in words]) == status
    (found,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("hf-optim: ")]
    return found.removeprefix("hf-optim: ")


GPTQ = '{"steps": [{"technique": "gptq", "group_size": 16}]}'


@pytest.mark.parametrize(
    ("model", "options", "wanted", "pythonic"),
    [
        ("model", ["--calibration", "two.jsonl"], "name one with --text-column", "text_column"),
        ("model", ["--calibration", "one.jsonl", "--seq-len", "64"], "a --seq-len below 64", "seq_len"),
        ("model", ["--calibration", "one.jsonl", "--seq-len", "16", "--samples", "400"], ", --samples ", "samples="),
        ("model", ["--calibration", "one.jsonl", "--seq-len", "4000"], "--seq-len 4000 is longer", "seq_len"),
        ("bare", ["--calibration", "one.jsonl"], "copy the files of the tokenizer into it", "tokenizer="),
        ("model", [], "pass --calibration DATA", "calibration="),
    ],
)
def test_commands_name_their_options(home, capsys, monkeypatch, model, options, wanted, pythonic):
    monkeypatch.chdir(home)
    (home / "recipe.json").write_text(GPTQ)
    found = line(capsys, "compress", model, "--recipe", "recipe.json", "--output", "out", *options)
    assert wanted in found
    assert pythonic not in found


def test_in_python_the_same_errors_name_arguments():
    model = tiny_llama(vocab_size=259)
    with pytest.raises(DataError, match=r"pass calibration=\.\.\.") as raised:
        hf_optim.optimize(model, "gptq")
    assert "--calibration DATA" in cli_message(raised.value)
    with pytest.raises(DataError, match="tokenizer=AutoTokenizer"):
        hf_optim.optimize(model, "gptq", calibration=["a text"])


def test_an_error_that_repeats_another_repeats_its_wording():
    cause = DataError("pass samples=3", cli="pass --samples 3")
    with pytest.raises(ModelError, match=r"step 1 \(x\): pass samples=3") as raised:
        raise ModelError(f"step 1 (x): {cause}") from cause
    assert cli_message(raised.value) == "step 1 (x): pass --samples 3"
    assert cli_message(RecipeError("plain")) == "plain"


# -- a model that cannot be found -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["/no/such/dir", "./nothere", "../a/b", "a/b/c"])
def test_a_directory_that_does_not_exist(capsys, home, name):
    for words in (
        ("check", "w8a8", "--model", name),
        ("compress", name, "--recipe", "w8a8", "--output", home / "never"),
        ("eval", name, "--data", home / "one.jsonl"),
    ):
        assert line(capsys, *words) == f"no such directory: '{name}'"


def test_a_hub_id_is_not_waited_for(monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(ModelError, match=r"no model 'org/none'.* HF_HUB_OFFLINE is set"):
        load_config("org/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port where nothing answers
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 cannot be reached \(offline\? HF_HUB_OFFLINE=1"):
        load_config("org/none")
    assert time.perf_counter() - started < hub_access.SECONDS + 5


def test_a_name_that_is_neither_a_directory_nor_a_hub_id():
    with pytest.raises(ModelError, match="no such directory, and not a Hub id: 'a:b'"):
        load_config("a:b")
    with pytest.raises(ModelError, match="is a file: name the directory"):
        load_config(__file__)


def test_code_that_needs_a_word_names_the_flag(home, capsys):
    found = line(capsys, "check", "w8a8", "--model", home / "code")
    assert found.endswith("if you trust it, pass --trust-remote-code")
    with pytest.raises(ModelError, match="if you trust it, pass trust_remote_code=True"):
        load_config(str(home / "code"))


def test_eval_looks_for_its_data_before_it_loads_the_model(home, capsys, monkeypatch):
    monkeypatch.setattr("hf_optim.checkpoints.source.load_model", lambda *args: pytest.fail("the model was loaded"))
    assert line(capsys, "eval", home / "model", "--data", "nothere.jsonl") == "no data file 'nothere.jsonl'"


# -- one family of errors ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("technique", ["rtn", "nm", "sr_ste"])
def test_a_pattern_that_selects_nothing_is_an_error_of_ours(technique):
    with pytest.raises(OptimError, match=r"nothing matches '\*\.foo'") as raised:
        hf_optim.optimize(tiny_llama(), [{"technique": technique, "targets": ["*.foo"]}])
    assert isinstance(raised.value, ValueError)
    assert not isinstance(raised.value, CheckpointError)


@pytest.mark.parametrize("pattern", ["c", "re:[", "re:(a+)+b"])
def test_patterns_are_errors_of_ours_in_the_toolkit_too(pattern):
    with pytest.raises(OptimError):
        topology.match(["a", "b"], [pattern])


def test_a_field_of_the_calibration_data_is_explained(home):
    advice = r"OptimConfig\.parse\(recipe\)\.with_calibration\(samples=21\)"
    with pytest.raises(RecipeError, match=f"no argument samples: .*{advice}"):
        AutoModelForCausalLM.from_pretrained(home / "model", optim_config="w4a16", samples=21)
    recipe = hf_optim.OptimConfig.parse("w4a16").with_calibration(samples=2, seq_len=16)
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (2, 16)
    assert recipe.steps == hf_optim.OptimConfig.parse(recipe).steps
    with pytest.raises(RecipeError, match="calibration has no key 'sample'; did you mean 'samples'"):
        recipe.with_calibration(sample=1)


def test_a_recipe_of_another_type():
    with pytest.raises(RecipeError, match="not as a value of type int"):
        hf_optim.OptimConfig.parse(3)

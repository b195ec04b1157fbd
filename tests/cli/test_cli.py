"""The command ``hf-optim``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_optim import Card, Reload
from hf_optim.cli import COMMANDS, main
from hf_optim.recipes.catalogue import GROUP, catalogue
from hf_optim.recipes.config import shipped_recipes
from hf_optim.runs.record import Record

# Name -> family: a plugin lies in the folder of its family.
TECHNIQUES = {entry.name: entry.value.split(".")[1] for entry in entry_points(group=GROUP)}
BLOCKS = 5
# Of the process that times models, where a test is about other figures.
NO_TIMES = subprocess.CompletedProcess([], 0, json.dumps({"times": {}, "timing": {}}), "")


class Workshop:
    """A folder with a model, data and recipes, and arguments of commands that use them."""

    def __init__(self, home):
        self.home = home
        self.model, self.data, self.held_out = home / "model", home / "calibration.jsonl", home / "eval.jsonl"
        tiny_llama(vocab_size=259, num_hidden_layers=BLOCKS).save_pretrained(self.model)
        tiny_tokenizer().save_pretrained(self.model)
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "what", "dog", "had", "done", "to", "it"]
        for path, seed in ((self.data, 0), (self.held_out, 1)):
            order = torch.Generator().manual_seed(seed)
            picks = torch.randint(len(words), (12, 60), generator=order).tolist()
            rows = [{"title": f"{i}", "text": " ".join(words[w] for w in row)} for i, row in enumerate(picks)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.gptq = self.recipe(
            "gptq", [{"technique": "gptq", "bits": 4, "group_size": 16}], {"samples": 8, "seq_len": 32}
        )
        self.rtn = self.recipe("rtn4", [{"technique": "rtn", "bits": 4, "group_size": 16}])

    def recipe(self, name, steps, calibration=None, training=None):
        path = self.home / f"{name}.json"
        path.write_text(json.dumps({"steps": steps, "calibration": calibration or {}, "training": training or {}}))
        return path

    def compress(self, recipe, output, *options):
        return ["compress", self.model, "--recipe", recipe, "--output", self.home / output, *options]

    def calibrated(self, output, *options):
        return self.compress(self.gptq, output, "--calibration", self.data, *options)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("shop"))


def call(argv):
    return main([str(word) for word in argv])


@pytest.fixture(scope="module")
def small(shop):
    """The model in 4 bits, written by the command."""
    assert call(shop.calibrated("small")) == 0
    return shop.home / "small"


def error_line(capsys, argv, status=2):
    """Return the one line that a refused command prints on standard error."""
    assert call(argv) == status
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("hf-optim: ")]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


def logits(home):
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


# -- the parser -------------------------------------------------------------------------------------------------------


def test_python_m_runs_it_and_prints_its_version(python):
    done = python.copy("""
import runpy, sys
sys.argv = ["-m", "--version"]
runpy.run_module("hf_optim.cli", run_name="__main__", alter_sys=True)
""")
    assert (done.status, done.out[:11]) == (0, "hf-optim 0."), done.err


def test_a_reader_that_leaves_is_no_error(python):
    leaves = "import os; reading, writing = os.pipe(); os.close(reading); os.dup2(writing, 1)"
    done = python.command(["list", "rtn"], leaves)
    assert (done.status, done.err) == (0, "")


def test_without_a_command_it_shows_its_help(capsys):
    assert call([]) == 2
    printed = capsys.readouterr().out
    assert all(f"    {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(capsys, name):
    with pytest.raises(SystemExit) as ended:
        call([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"example:\n  hf-optim {name}" in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_are_checked_by_the_parser(capsys, value):
    with pytest.raises(SystemExit) as ended:
        call(["eval", "model", "--data", "d.jsonl", "--samples", value])
    assert ended.value.code == 2
    assert "whole number" in capsys.readouterr().err


# -- list and check ---------------------------------------------------------------------------------------------------


def test_every_plugin_has_an_entry_point():
    plugins = (ROOT / "plugins" / "hf_optim_plugins").glob("*/*.py")
    found = {path.stem: path.parent.name for path in plugins if "def register_techniques" in path.read_text("utf-8")}
    assert found == TECHNIQUES


def test_list_json_has_the_techniques_and_the_recipes(capsys):
    assert call(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {technique["name"]: technique["family"] for technique in listed["techniques"]} == TECHNIQUES
    assert {recipe["name"] for recipe in listed["recipes"]} == set(shipped_recipes())
    for technique in listed["techniques"]:
        assert technique["summary"]
        assert technique["hooks"]
        assert technique["reload"] in {level.name for level in Reload}


def test_list_prints_a_table(capsys):
    assert call(["list"]) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line and line[0] != " "}
    assert words >= {*TECHNIQUES, *shipped_recipes()}


def test_list_groups_families_and_explains_reload_levels(capsys):
    assert call(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [lines.index(line) for line in lines if line.endswith("reload        what it does")]
    assert [lines[head].split()[0] for head in heads] == sorted(set(TECHNIQUES.values()))
    for head in heads:
        members = [line.split()[0] for line in lines[head + 2 : lines.index("", head)] if line[0] != " "]
        assert sorted(members) == sorted(n for n, family in TECHNIQUES.items() if family == lines[head].split()[0])
    words = " ".join(" ".join(lines).split())
    assert [f"{level.name} {level.value}" in words for level in Reload] == [True] * len(Reload)


def test_list_of_a_technique_has_its_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # lines are broken to the width of the terminal
    assert call(["list", "gmp"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gmp\n\nPrune gradually during training, along a cubic ramp.\n\nSteps are optimizer")
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "https://arxiv.org/abs/1710.01878" in printed
    kept = "has weights that were pruned to zero (sparse) and keeps N of every M weights in a row (sparse-nm)"
    assert f"keeps it stays a model that {kept}" in " ".join(printed.split())
    assert rows["needs"].endswith("a model that has floating-point weights (float-weights)")
    assert "yes, in a Trainer with hf_optim.callbacks(model)" in rows["trains"]
    assert "STOCK_DENSE" in rows["reloads as"]
    header = next(line for line in printed.splitlines() if line.startswith("field"))
    assert header.split() == ["field", "type", "default", "description"]
    assert "float, >= 0.0 and < 1.0" in rows["sparsity"]
    assert "share of the weights that is removed at the end" in rows["sparsity"]
    assert "layer | global" in rows["scope"]
    assert "[Linear]" in rows["targets"]
    assert max(map(len, printed.splitlines())) <= 120
    assert call(["list", "logit_kd"]) == 0
    printed = capsys.readouterr().out
    assert "yes, in hf_optim.OptimTrainer" in printed
    assert "int | null, >= 1" in printed


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_every_field_of_every_technique_is_described(capsys, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert call(["list", name, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["techniques"]
    assert one["name"] == name
    assert "Attributes" not in one["description"]
    fields = {f.name for f in dataclasses.fields(catalogue().get(name))}
    assert {field["name"] for field in one["fields"]} == fields
    assert [field["name"] for field in one["fields"] if not field["description"]] == []
    assert [field["name"] for field in one["fields"] if "Literal" in field["type"]] == []
    assert call(["list", name]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert not re.search(r"`|::|\*\w+\*|:\w+:`|\b(None|True|False)\b", printed.split("field  ")[-1])
    assert not re.search(r"``|\*\w+\*|:\w+:`", printed)


def test_list_of_a_recipe_has_its_steps(capsys):
    assert call(["list", "w4a16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("w4a16 (recipe)\n\nGPTQ to 4 bits.")
    assert "- technique: gptq\n  group_size: 32" in printed
    assert f"STOCK_FORMAT: {Reload.STOCK_FORMAT.value}" in " ".join(printed.split())
    assert call(["list", "distilbert", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [one["name"] for kind in ("techniques", "recipes") for one in both[kind]] == ["distilbert", "distilbert"]


def test_list_of_an_unknown_name(capsys):
    line = error_line(capsys, ["list", "gptw"])
    assert line.startswith("hf-optim: no technique, shipped recipe or scheme 'gptw'; did you mean 'gptq'?")
    assert line.endswith(" (`hf-optim list` shows them)")
    assert "did you mean" not in error_line(capsys, ["list", "abacus"])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_composes(capsys, name):
    assert call(["check", name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["composes"] is True
    assert report["stages"]


def test_check_prints_stages_needs_and_result(capsys, shop):
    recipe = shop.recipe("two", [{"technique": "nm"}, {"technique": "logit_kd"}, {"technique": "gptq"}])
    assert call(["check", recipe]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[nm, logit_kd] | [gptq] composes")
    assert "reloads as STOCK_FORMAT" in printed


REFUSED = {
    "smoothquant alone": ([{"technique": "smoothquant"}], ("smoothquant", "quantization step", "add ", "rtn")),
    "rtn before smoothquant": ([{"technique": "rtn"}, {"technique": "smoothquant"}], ("step 2 (smoothquant)", "rtn")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_with_reason_and_remedy(capsys, shop, case):
    steps, parts = REFUSED[case]
    recipe = shop.recipe("refused", steps)
    line = error_line(capsys, ["check", recipe], status=1)
    assert all(part in line for part in parts), line
    assert call(["check", recipe, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["composes"] is False
    assert all(part in report["reason"] for part in parts)


@pytest.mark.parametrize("bits", [4, 8])
def test_check_estimates_the_bytes_that_compress_writes(capsys, shop, bits):
    recipe = shop.recipe(f"bits{bits}", [{"technique": "rtn", "bits": bits, "group_size": 16}])
    assert call(["check", recipe, "--model", shop.model, "--json"]) == 0
    guess = json.loads(capsys.readouterr().out)["model"]
    assert call(shop.compress(recipe, f"bits{bits}")) == 0
    tensors = load_file(shop.home / f"bits{bits}" / "model.safetensors")
    written = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("weight_shape"))
    assert guess["bytes_after"] == written
    assert guess["bytes_before"] == sum(t.nbytes for t in load_file(shop.model / "model.safetensors").values())
    assert guess["calibration_tokens"] == 0


def test_check_prints_estimates_and_counts_calibration_tokens(capsys, shop):
    assert call(["check", shop.gptq, "--model", shop.model]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM:" in printed
    assert "256 tokens" in printed


def test_check_refuses_a_model_that_is_quantized(capsys, small):
    assert "instead of a quantized one" in error_line(capsys, ["check", "w4a16", "--model", small], status=1)


def test_check_of_a_missing_model(capsys, shop):
    line = error_line(capsys, ["check", "w8a8", "--model", shop.home / "nowhere"])
    assert line == f"hf-optim: no such directory: '{shop.home / 'nowhere'}'"


# -- compress ---------------------------------------------------------------------------------------------------------


def test_compress_writes_a_checkpoint_that_stock_transformers_reads(small):
    config = json.loads((small / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    record = Record.read(small)
    assert record.finished
    assert record.base_model["id"] == "model"
    assert record.calibration["dataset"] == "calibration.jsonl"
    assert record.calibration["samples"] == 8
    assert (small / "tokenizer.json").is_file()
    assert str(small.parent) not in (small / "README.md").read_text() + (small / "hf_optim.json").read_text()
    assert not list(small.parent.glob(".small*"))


@pytest.mark.slow
def test_compress_evaluates_before_and_after_in_child_processes(capsys, shop):
    assert call(shop.compress(shop.rtn, "measured", "--eval", shop.held_out, "--device", "cpu")) == 0
    printed = capsys.readouterr().out
    output = shop.home / "measured"
    record = Record.read(output)
    before, after = record.measured["before"], record.measured["after"]
    assert before["bytes_on_disk"] == (shop.model / "model.safetensors").stat().st_size
    assert after["bytes_on_disk"] == (output / "model.safetensors").stat().st_size
    assert after["kl"] > 0
    assert 0 < after["top1_agreement"] < 1
    for key in ("perplexity", "peak_memory_bytes", "ms_per_token"):
        assert before[key] > 0
        assert after[key] > 0
        assert record.measured["accelerated"][key] > 0
    assert before["time_rounds"] == after["time_rounds"] == record.measured["accelerated"]["time_rounds"] >= 5
    assert record.measured["timing"]["in_turn"] is True
    assert record.measured["accelerated"]["kernels"].startswith("dense float32")
    assert "on kernels" in printed.splitlines()[[line[:6] for line in printed.splitlines()].index("metric")]
    table = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert f"{before['perplexity']:.4f}" in table["perplexity"]
    assert f"{after['perplexity']:.4f}" in table["perplexity"]
    assert "step 1 (rtn) changed" in printed
    assert f"{after['perplexity']:.4f}" in (output / "README.md").read_text()
    assert (output / "plots" / "quality_against_bytes.png").is_file()
    assert not list(shop.home.glob(".measured*"))

    assert call(["eval", output, "--data", shop.held_out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(after["perplexity"], rel=1e-6)


def test_eval_prints_a_table(capsys, monkeypatch):
    figures = {"task": "text-generation", "perplexity": 2.25, "tokens": 7, "peak_memory_bytes": None}
    monkeypatch.setattr("hf_optim.cli.eval.measure", lambda args, data: figures)
    assert call(["eval", "model", "--data", "d.jsonl"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert rows["perplexity"].strip() == "2.2500"
    assert rows["tokens scored"].strip() == "7"


def test_eval_takes_a_tokenizer_from_elsewhere(shop, capsys, tmp_path):
    AutoModelForCausalLM.from_pretrained(shop.model).save_pretrained(tmp_path / "bare")
    words = ["--data", shop.held_out, "--samples", "2", "--no-time", "--json", "--device", "cpu"]

    def perplexity(*argv):
        assert call(["eval", *argv, *words]) == 0
        return json.loads(capsys.readouterr().out)["perplexity"]

    assert "its folder has none" in error_line(capsys, ["eval", tmp_path / "bare", *words])
    assert perplexity(tmp_path / "bare", "--tokenizer", shop.model) == perplexity(shop.model)
    missing = ["eval", shop.model, "--tokenizer", tmp_path / "bare", *words]
    assert "bare': there is no tokenizer that transformers can load" in error_line(capsys, missing)


def test_dense_writes_the_same_values_uncompressed(shop, small):
    assert call(shop.calibrated("dense", "--dense")) == 0
    dense = shop.home / "dense"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert torch.equal(logits(dense), logits(small))
    record = Record.read(dense)
    assert record.reload == "STOCK_DENSE"
    assert "quantized" not in record.traits
    assert any("dense equivalent" in note for note in record.notes)


def test_compress_runs_training_stages_and_those_after_them(shop):
    recipe = shop.recipe(
        "retrain",
        [{"technique": "nm", "keep": 2, "group": 4}, {"technique": "logit_kd"}, {"technique": "rtn", "bits": 8}],
        {"dataset": str(shop.data), "samples": 4, "seq_len": 32},
        {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "disable_tqdm": True},
    )
    assert call(shop.compress(recipe, "retrained", "--device", "cpu")) == 0
    record = Record.read(shop.home / "retrained")
    assert record.finished
    assert [stage["steps"] for stage in record.stages if stage["driver"] == "training"] == [["nm", "logit_kd"]]
    assert {"quantized", "sparse-nm"} <= set(record.traits)


def test_a_control_is_evaluated_beside_original_and_result(capsys, shop, monkeypatch):
    figures = {"model": 3.0, "dense-alike": 2.5}
    seen = []

    def measure(command, **kwargs):
        if "eval" not in command:
            return NO_TIMES
        name = Path(command[command.index("eval") + 1]).name
        seen.append(command[command.index("--data") + 1 :])
        out = json.dumps({"perplexity": figures.get(name, 2.75)})
        return subprocess.CompletedProcess([], 0, out, "")

    monkeypatch.setattr("subprocess.run", measure)
    control = shop.home / "dense-alike"
    control.mkdir(exist_ok=True)
    (control / "model.safetensors").write_bytes((shop.model / "model.safetensors").read_bytes())
    recipe = shop.recipe(
        "prune",
        [{"technique": "gmp", "end": 1, "every": 1}],
        {"dataset": str(shop.data), "samples": 4, "seq_len": 32},
        {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True},
    )
    options = ["--device", "cpu", "--eval", shop.held_out]
    assert call(shop.compress(recipe, "alone", *options)) == 0
    assert "no control: a dense model trained alike was not measured" in capsys.readouterr().out
    assert call(shop.compress(recipe, "controlled", *options, "--control", control)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"metric +before +trained alike +after +change", printed)
    assert re.search(r"perplexity +3\.0000 +2\.5000 +2\.7500 +-8\.3 %", printed)
    assert seen[0][0] == str(shop.held_out)
    assert all(words == seen[0] for words in seen)  # on the same data
    record = Record.read(shop.home / "controlled")
    size = (control / "model.safetensors").stat().st_size
    assert record.measured["control"] == {"perplexity": 2.5, "bytes_on_disk": size, "name": "dense-alike"}
    assert "| perplexity | 3.0000 | 2.5000 | 2.7500 |" in (shop.home / "controlled" / "README.md").read_text()
    line = error_line(capsys, shop.compress(recipe, "none", "--control", control))
    assert "--control is evaluated on the data of --eval" in line


def test_card_takes_a_control_that_was_evaluated_on_the_same_data(capsys, tmp_path):
    data = {"dataset": "eval.jsonl", "split": "train", "seq_len": 64}
    homes = {}
    for name, dataset, perplexity in (
        ("result", "eval.jsonl", 2.5),
        ("dense", "eval.jsonl", 2.25),
        ("other", "x", 2.0),
    ):
        homes[name] = tmp_path / name
        homes[name].mkdir()
        made = Record(recipe={"steps": [{"technique": "gmp"}]}, finished=True)
        made.measured = {"before": {"perplexity": 3.0}, "after": {"perplexity": perplexity, "kl": 0.1}}
        made.measured["evaluation"] = {**data, "dataset": dataset}
        made.write(homes[name])
    assert call(["card", homes["result"], "--control", homes["dense"]]) == 0
    assert Record.read(homes["result"]).measured["control"] == {"perplexity": 2.25, "name": "dense"}
    assert "| perplexity | 3.0000 | 2.2500 | 2.5000 |" in (homes["result"] / "README.md").read_text()
    before = (homes["result"] / "hf_optim.json").read_text()
    line = error_line(capsys, ["card", homes["result"], "--control", homes["other"]])
    assert "were evaluated on different data (they differ in dataset)" in line
    assert (homes["result"] / "hf_optim.json").read_text() == before
    Record(finished=True).write(homes["other"])
    assert "was not evaluated" in error_line(capsys, ["card", homes["result"], "--control", homes["other"]])
    assert "is for the card of one checkpoint" in error_line(capsys, ["card", tmp_path, "--control", homes["dense"]])


def test_compress_replaces_an_earlier_checkpoint_and_keeps_other_files(shop):
    output = shop.home / "twice"
    assert call(shop.compress("w8a8", "twice")) == 0
    (output / "notes.txt").write_text("mine")
    assert call(shop.compress(shop.rtn, "twice")) == 0
    assert Record.read(output).recipe["steps"][0]["bits"] == 4
    assert (output / "notes.txt").read_text() == "mine"


# -- card -------------------------------------------------------------------------------------------------------------


def test_card_is_rendered_from_the_record(capsys, shop, small):
    card = small / "README.md"
    before = card.read_text()
    card.write_text("scribbled over")
    assert call(["card", small]) == 0
    assert card.read_text() == before
    assert capsys.readouterr().out.strip() == str(card)


def test_card_of_a_folder_is_its_index(capsys, tmp_path, small):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "hf_optim.json").write_text((small / "hf_optim.json").read_text())
    assert call(["card", tmp_path]) == 0
    assert "(one" in (tmp_path / "README.md").read_text()


def test_card_without_a_record(capsys, tmp_path):
    assert "has no hf_optim.json" in error_line(capsys, ["card", tmp_path])


def test_card_of_a_broken_record(capsys, tmp_path):
    (tmp_path / "hf_optim.json").write_text('{"schema": 99}')
    assert "schema 99" in error_line(capsys, ["card", tmp_path])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_recipe_suggests_the_nearest(capsys, shop):
    assert "'w4a16'" in error_line(capsys, shop.compress("w4a61", "none"))
    assert "no recipe file" in error_line(capsys, shop.compress("missing.yaml", "none"))


def test_yaml_that_constructs_objects_is_refused(capsys, shop):
    path = shop.home / "evil.yaml"
    path.write_text("steps: !!python/object/apply:os.system ['touch evil']\n")
    assert "not a plain YAML or JSON recipe" in error_line(capsys, shop.compress(path, "none"))


def test_missing_calibration_data(capsys, shop):
    assert "--calibration" in error_line(capsys, shop.compress(shop.gptq, "none"))
    recipe = shop.recipe("ramp", [{"technique": "gmp"}])
    assert "--train" in error_line(capsys, shop.compress(recipe, "none"))


def test_a_missing_text_column(capsys, shop):
    line = error_line(capsys, shop.calibrated("none", "--text-column", "body"))
    assert "'body'" in line
    assert "title, text" in line


def test_data_that_is_too_short(capsys, shop):
    line = error_line(capsys, shop.calibrated("none", "--samples", "4000"))
    assert "4000 sequences of 32 tokens" in line
    assert "use more text" in line


def test_a_sequence_longer_than_the_context(capsys, shop):
    assert "context of 64" in error_line(capsys, shop.calibrated("none", "--seq-len", "128"))


def test_missing_evaluation_data(capsys, shop):
    assert "no.jsonl" in error_line(capsys, shop.compress(shop.rtn, "none", "--eval", shop.home / "no.jsonl"))


def test_the_error_of_the_evaluating_process_is_passed_on(capsys, shop, monkeypatch):
    done = subprocess.CompletedProcess([], 2, "", "noise\nhf-optim: the data is odd\nlate noise\n")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: done)
    line = error_line(capsys, shop.compress(shop.rtn, "none", "--eval", shop.held_out))
    assert line == "hf-optim: could not measure the original: the data is odd"


def test_a_result_that_cannot_be_measured_is_written_before_the_error(capsys, shop, monkeypatch):
    def measure(command, **kwargs):
        if "eval" not in command:
            return NO_TIMES
        original = command[command.index("eval") + 1] == str(shop.model)
        out = json.dumps({"perplexity": 2.0})
        return subprocess.CompletedProcess([], 0, out, "") if original else failed

    failed = subprocess.CompletedProcess([], 2, "", "hf-optim: the data is odd\n")
    monkeypatch.setattr("subprocess.run", measure)
    line = error_line(capsys, shop.compress(shop.rtn, "unmeasured", "--eval", shop.held_out))
    assert line == "hf-optim: could not measure the result: the data is odd"
    record = json.loads((shop.home / "unmeasured" / "hf_optim.json").read_text())
    assert record["finished"]
    assert "perplexity" not in record["measured"]["after"]
    assert logits(shop.home / "unmeasured").isfinite().all()


def test_record_and_card_of_a_measured_result_are_written_once(shop, monkeypatch):
    """The result is measured before it takes its name: nothing in it is replaced afterwards."""
    seen = []

    def measure(command, **kwargs):
        if "eval" not in command:
            return NO_TIMES
        home = Path(command[command.index("eval") + 1])
        seen.append((home.name, (shop.home / "once").exists(), (home / "README.md").exists()))
        return subprocess.CompletedProcess([], 0, json.dumps({"perplexity": 2.5}), "")

    monkeypatch.setattr("subprocess.run", measure)
    cards = []
    write = Card.write
    monkeypatch.setattr(Card, "write", lambda self, directory: cards.append(directory) or write(self, directory))
    assert call(shop.compress(shop.rtn, "once", "--eval", shop.held_out)) == 0
    assert len(cards) == 1
    (original, _, _), (result, named, carded) = seen
    assert (original, named, carded) == ("model", False, False)
    assert result != "once"
    record = json.loads((shop.home / "once" / "hf_optim.json").read_text())
    assert record["measured"]["after"]["perplexity"] == 2.5
    assert "2.5" in (shop.home / "once" / "README.md").read_text()


def test_an_output_that_is_a_file(capsys, shop):
    assert "is a file" in error_line(capsys, shop.compress(shop.rtn, "eval.jsonl"))


def test_an_output_that_is_the_model(capsys, shop):
    assert "is the model itself" in error_line(capsys, shop.compress(shop.rtn, "model"))


def test_an_unknown_training_argument(capsys, shop):
    recipe = shop.recipe("typo", [{"technique": "gmp"}], {"samples": 4, "seq_len": 32}, {"max_step": 2})
    line = error_line(capsys, shop.compress(recipe, "none", "--train", shop.data))
    assert "'max_step'" in line
    assert "'max_steps'" in line


def test_a_missing_device(capsys, shop):
    assert "'abacus'" in error_line(capsys, shop.compress(shop.rtn, "none", "--device", "abacus"))


@pytest.fixture
def copy_of_model(shop, tmp_path):
    import shutil

    shutil.copytree(shop.model, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("spoil", ["truncated", "garbage"])
def test_a_broken_shard_is_named(capsys, shop, copy_of_model, spoil):
    AutoModelForCausalLM.from_pretrained(shop.model).save_pretrained(copy_of_model, max_shard_size="60KB")
    (copy_of_model / "model.safetensors").unlink()
    shard = sorted(copy_of_model.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] if spoil == "truncated" else b"\xff" * len(content))
    line = error_line(capsys, ["compress", copy_of_model, "--recipe", shop.rtn, "--output", copy_of_model / "out"])
    assert shard.name in line
    assert "truncated or corrupt" in line
    assert not (copy_of_model / "out").exists()


def test_a_pickle_checkpoint_is_refused(capsys, shop, copy_of_model):
    (copy_of_model / "model.safetensors").rename(copy_of_model / "pytorch_model.bin")
    line = error_line(capsys, ["compress", copy_of_model, "--recipe", shop.rtn, "--output", copy_of_model / "out"])
    assert "pytorch_model.bin" in line
    assert "only safetensors" in line


def test_verbose_shows_the_traceback(capsys, shop):
    assert call([*shop.compress("w4a61", "none"), "-v"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith("hf-optim: no recipe 'w4a61'")


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr("hf_optim.cli.list.describe", lambda cls: 1 / 0)
    assert error_line(capsys, ["list"]) == "hf-optim: ZeroDivisionError: division by zero (-v shows the traceback)"


# -- a full disk, and kill -9 -----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint_complete(shop, small, python):
    # RLIMIT_FSIZE simulates a full disk: writing beyond it fails. One block fits, all weights do not.
    before = {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    done = python.command(shop.compress(shop.rtn, "small"), before=limit)
    assert done.status == 2
    error_lines = [line for line in done.err.splitlines() if line.startswith("hf-optim: ")]
    assert len(error_lines) == 1
    assert "small" in error_lines[0]
    assert "untouched" in error_lines[0]
    assert {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()} == before
    assert not list(shop.home.glob(".small.saving-*"))


def test_a_killed_run_resumes_bit_exact(capsys, shop, small, python):
    # Kills itself with SIGKILL once the third block has been saved.
    kill = """
import os, signal
from hf_optim.calibration.block_journal import BlockJournal
kept, stock = [], BlockJournal.save
def save(self, run, first, name):
    stock(self, run, first, name)
    kept.append(name)
    if len(kept) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
BlockJournal.save = save
"""
    assert python.command(shop.calibrated("killed"), before=kill).status == -signal.SIGKILL
    journal = shop.home / ".killed.journal"
    assert len(list(journal.glob("step-*.safetensors"))) == 3
    assert not (shop.home / "killed").exists()

    other_recipe = shop.recipe("gptq3", [{"technique": "gptq", "bits": 3}], {"samples": 8, "seq_len": 32})
    refused = shop.compress(other_recipe, "killed", "--calibration", shop.data, "--resume")
    line = error_line(capsys, refused)
    assert "another recipe" in line
    assert "start without --resume" in line
    assert len(list(journal.glob("step-*.safetensors"))) == 3

    assert call(shop.calibrated("killed", "--resume")) == 0
    for name in ("model.safetensors", "config.json"):
        assert (shop.home / "killed" / name).read_bytes() == (small / name).read_bytes(), name
    steps, undisturbed = (Record.read(home).steps for home in (shop.home / "killed", small))
    assert steps == undisturbed
    assert not journal.exists()


def test_a_run_killed_in_training_resumes_bit_exact(shop, python):
    steps = [{"technique": "gmp", "sparsity": 0.5}, {"technique": "logit_kd"}, {"technique": "gptq", "group_size": 16}]
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    recipe = shop.recipe("ramp6", steps, {"dataset": str(shop.data), "samples": 8, "seq_len": 32}, training)
    assert call(shop.compress(recipe, "unbroken", "--device", "cpu")) == 0
    kill = """
import os, signal, hf_optim.training
stock = hf_optim.training.OptimTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args, **kwargs)
hf_optim.training.OptimTrainer.training_step = step
"""
    assert python.command(shop.compress(recipe, "broken", "--device", "cpu"), before=kill).status == -signal.SIGKILL
    journal = shop.home / ".broken.journal"
    checkpoints = {path.name for path in journal.glob("training-1/trainer/checkpoint-*")}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}
    assert call(shop.compress(recipe, "broken", "--device", "cpu", "--resume")) == 0
    for name in ("model.safetensors", "config.json"):
        assert (shop.home / "broken" / name).read_bytes() == (shop.home / "unbroken" / name).read_bytes(), name
    assert not journal.exists()

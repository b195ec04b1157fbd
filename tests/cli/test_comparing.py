"""``hf-optim compare``: a table, JSON and a plot of several checkpoints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim import OptimError
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli import main
from hf_optim.cli.jobs import comparing
from hf_optim.errors import ModelError
from hf_optim.recipes.config import DataConfig

WORDS = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    path.write_text('{"text": "the cat sat on the mat, and the dog saw it all the time"}\n' * 8)
    return path


def pruned():
    model = tiny_llama(vocab_size=WORDS)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model


def test_labels_are_as_short_as_they_can_be():
    assert comparing.short_labels(["out/w4", "out/w8", "org/w8"]) == {
        "out/w4": "w4",
        "out/w8": "out/w8",
        "org/w8": "org/w8",
    }


def test_the_reference_comes_first_and_no_model_twice():
    assert comparing.require_models(["a", "b"], "b") == ("b", "a")
    assert comparing.require_models(["a", "b"], "c") == ("c", "a", "b")
    for given in (["a"], ["a", "b", "a"]):
        with pytest.raises(ModelError):
            comparing.require_models(given, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for name, model in {
        "dense": tiny_llama(vocab_size=WORDS),
        "pruned": pruned(),
        "wider": tiny_llama(vocab_size=WORDS + 8),
    }.items():
        model.save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    pruned().save_pretrained(home / "mute")  # as a data-free recipe writes it from Python
    return home


def test_the_command_prints_a_table_and_draws_the_models(saved, data, in_this_process, tmp_path, capsys):
    plot = tmp_path / "plots" / "sizes.png"
    words = ["compare", saved / "dense", saved / "pruned", "--data", data, "--seq-len", 16, "--device", "cpu"]
    assert main([str(word) for word in [*words, "--plot", plot]]) == 0
    printed = capsys.readouterr().out
    header, _, first, second, *_ = printed.splitlines()
    for title in ("perplexity", "agreement", "KL", "on disk", "peak memory", "ms/token", "time"):
        assert title in header
    assert first.startswith("dense (reference)")
    assert first.rstrip().endswith("100 %")
    assert second.startswith("pruned")
    assert "in turn in one process" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
def test_the_command_prints_json(saved, data, in_this_process, capsys):
    words = ["compare", saved / "dense", saved / "pruned", "--data", data, "--seq-len", 16, "--device", "cpu"]
    assert main([str(word) for word in [*words, "--json", "--no-time", "--auto", "--reference", saved / "pruned"]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == str(saved / "pruned")
    one = found["models"][str(saved / "dense")]
    assert set(one) >= {"perplexity", "top1_agreement", "kl", "bytes_on_disk", "peak_memory_bytes"}
    assert "ms_per_token" not in one
    assert all("--auto" in command for command in in_this_process)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["dense", "wider"], "vocabularies"),
        (["dense", "mute"], "comparing mute needs the model's tokenizer, and its folder has none"),
        (["mute", "dense"], "comparing mute needs the model's tokenizer, and its folder has none"),
        (["dense", "nothing"], "there is no such directory"),
        (["dense"], "at least two"),
        (["dense", "dense"], "given twice"),
        (["dense", "pruned", "--plot", "sizes.svg"], "PNG"),
        (["dense", "pruned", "--data", "nothing.jsonl"], "no data file"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_is_measured(words, reason, saved, data, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "json_of", None)
    monkeypatch.chdir(saved)
    assert main(["compare", "--data", str(data), "--device", "cpu", *words]) == 2
    printed = capsys.readouterr()
    assert reason in printed.err
    assert "evaluating" not in printed.err


def test_a_plot_of_models_without_quality(tmp_path):
    found = {"models": {"a": {"bytes_on_disk": 1.0}, "b": {"bytes_on_disk": 2.0}}}
    with pytest.raises(OptimError, match="quality"):
        comparing.plot(found, {"a": "a", "b": "b"}, tmp_path / "x.png")


def test_the_measuring_processes_load_the_revision(monkeypatch):
    started = []

    def run(command, what, *, own_code):
        started.append(command)
        return {}

    monkeypatch.setattr(comparing, "json_of", run)
    source = ModelSource("", revision="v2")
    job = comparing.Comparison(("a/one", "a/two"), source, DataConfig(dataset="eval.jsonl"))
    comparing._figures(job, "a/one", False)
    comparing._times(job)
    evaluated, timed = started
    assert evaluated[evaluated.index("--revision") + 1] == "v2"
    assert {one["revision"] for one in json.loads(timed[3])["candidates"]} == {"v2"}

"""``hf-optim compare --record``: figures of checkpoints that a Trainer or save_pretrained wrote, on record and card."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaForCausalLM, TrainingArguments

import hf_optim
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli import main
from hf_optim.cli.jobs import comparing, recording
from hf_optim.evaluation import latency, timings
from hf_optim.evaluation.cards.index import render_index
from hf_optim.runs.record import FILE_NAME, Record

GMP = {"steps": [{"technique": "gmp", "sparsity": 0.5, "end": 2, "every": 1}]}
RTN = {"steps": [{"technique": "rtn", "bits": 4, "group_size": 32}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense original, what OptimTrainer made of it, and a quantized one that was saved from Python."""
    home = tmp_path_factory.mktemp("recording")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), intermediate_size=64).save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    (home / "eval.jsonl").write_text('{"text": "the cat sat on the mat, and the dog saw it all the time"}\n' * 8)
    ids = torch.arange(16) % len(tokenizer)
    args = TrainingArguments(output_dir=str(home / "runs"), max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = hf_optim.OptimTrainer(
        model=LlamaForCausalLM.from_pretrained(home / "dense", optim_config=GMP),
        args=args,
        train_dataset=[{"input_ids": ids, "labels": ids}] * 4,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(home / "made" / "trained"))
    LlamaForCausalLM.from_pretrained(home / "dense", optim_config=RTN).save_pretrained(home / "made" / "quantized")
    tokenizer.save_pretrained(home / "made" / "quantized")
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of these, as the current directory; times take few rounds."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "ROUND_SECONDS", 0)
    monkeypatch.setattr(timings, "ENOUGH_SECONDS", 0)
    return tmp_path


def record(*models, words=()):
    return main(["compare", *models, "--data", "eval.jsonl", "--seq-len", "16", "--device", "cpu", "--record", *words])


@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
def test_record_card_and_index_get_the_figures(home, in_this_process, capsys):
    assert "Not measured" in (home / "made/trained/README.md").read_text()
    weights = (home / "made/trained/model.safetensors").stat().st_ino
    assert record("dense", "made/trained", "made/quantized", words=["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["recorded"] == ["made/trained", "made/quantized"]
    for name in ("trained", "quantized"):
        measured = Record.read(home / "made" / name).measured
        assert measured["evaluation"] == {"dataset": "eval.jsonl", "samples": None, "seq_len": 16}
        assert measured["before"]["perplexity"] == printed["models"]["dense"]["perplexity"]
        own = printed["models"][f"made/{name}"]
        assert {key: measured["after"][key] for key in own} == own
        assert {"top1_agreement", "kl", "ms_per_token", "peak_memory_bytes", "bytes_on_disk"} <= set(own)
        assert measured["timing"]["in_turn"]
        card = (home / "made" / name / "README.md").read_text()
        assert "Not measured" not in card
        assert "Evaluated on eval.jsonl of 16 tokens" in card
        assert "before it was saved" not in card
        assert f"{measured['after']['perplexity']:.4f}" in card
    # On kernels, what runs there.
    assert "accelerated" not in Record.read(home / "made/trained").measured
    assert Record.read(home / "made/quantized").measured["accelerated"]["perplexity"] > 0
    assert (home / "made/trained/model.safetensors").stat().st_ino == weights
    assert f"{Record.read(home / 'made/trained').measured['after']['perplexity']:.4f}" in render_index(home / "made")
    assert record("dense", "made/trained", words=["--no-time"]) == 0  # again: what was measured before is replaced
    assert "wrote the figures into made/trained" in capsys.readouterr().out
    assert "ms_per_token" not in Record.read(home / "made/trained").measured["after"]


def changed(home):
    path = home / "made/trained/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def unfinished(home):
    held = json.loads((home / "made/trained" / FILE_NAME).read_text())
    (home / "made/trained" / FILE_NAME).write_text(json.dumps({**held, "finished": False}))


def renamed(home):
    (home / "dense").rename(home / "other")


@pytest.mark.parametrize(
    ("models", "change", "words", "reason"),
    [
        (["dense", "made/trained"], changed, [], "are not those that its hf_optim.json was written with"),
        (["dense", "made/trained"], unfinished, [], "before its recipe was finished"),
        (["other", "made/trained"], renamed, [], "made/trained was made from dense"),
        (["made/trained", "dense"], None, [], "dense has no hf_optim.json"),
        (["dense", "made/trained"], None, ["--auto"], "leave out --auto"),
        (["dense", "made/trained"], None, ["--dtype", "float16"], "leave out --dtype"),
    ],
)
def test_what_is_refused_before_it_is_measured(models, change, words, reason, home, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "json_of", None)
    if change is not None:
        change(home)
    before = {path: path.read_bytes() for path in (home / "made/trained").iterdir() if path.is_file()}
    assert record(*models, words=words) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert all(path.read_bytes() == content for path, content in before.items())


def test_weights_that_change_while_they_are_measured(home):
    found = {"reference": "dense", "models": {"dense": {}, "made/trained": {}}, "timing": {}}
    before = (home / "made/trained" / FILE_NAME).read_bytes()
    with recording.recordable(["made/trained"], ModelSource("dense")) as targets:
        changed(home)
        with pytest.raises(hf_optim.OptimError, match="changed while they were measured"):
            recording.record_comparison(targets, found, hf_optim.DataConfig(dataset="eval.jsonl"))
    assert (home / "made/trained" / FILE_NAME).read_bytes() == before


def test_a_control_on_the_same_data_stays(home):
    found = {"reference": "dense", "models": {"dense": {}, "made/trained": {}}, "timing": {}}
    for dataset, stays in (("eval.jsonl", True), ("other.jsonl", False)):
        held = Record.read(home / "made/trained")
        held.measured |= {"control": {"perplexity": 2.0}, "evaluation": {"dataset": "eval.jsonl"}}
        held.write(home / "made/trained")
        with recording.recordable(["made/trained"], ModelSource("dense")) as targets:
            recording.record_comparison(targets, found, hf_optim.DataConfig(dataset=dataset))
        assert ("control" in Record.read(home / "made/trained").measured) is stays

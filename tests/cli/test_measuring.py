"""How ``compress --eval`` measures: times in turn, on kernels, on part of the data, and beside a control."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

import hf_optim
from hf_optim import DataConfig
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli import main
from hf_optim.cli.jobs import timed_models
from hf_optim.cli.jobs.timed_models import Candidate, kernels_of, load_on_kernels, time_candidates
from hf_optim.evaluation import latency
from hf_optim.runs.memory import free_memory
from hf_optim.runs.record import Record
from hf_optim.training.arguments import training_arguments
from hf_optim.training.fit import train_dense, training_rows

CPU = torch.device("cpu")
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("measuring")
    tiny_llama(vocab_size=259).save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    rows = [{"text": f"the cat sat on a mat and saw {i} dogs " * 6} for i in range(12)]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = {
        "rtn": [{"technique": "rtn", "bits": 4, "group_size": 16}],
        "gmp": [{"technique": "gmp", "end": 2, "every": 1}],
    }
    for name, recipe in steps.items():
        data = {"dataset": str(home / "data.jsonl"), "samples": 6, "seq_len": 32}
        (home / f"{name}.json").write_text(json.dumps({"steps": recipe, "calibration": data, "training": TRAINING}))
    model = tiny_llama(vocab_size=259, intermediate_size=64).bfloat16()
    model = hf_optim.optimize(model, {"steps": [{"technique": "rtn", "bits": 4, "group_size": 32}]})
    model.save_pretrained(home / "packed")
    return home


@pytest.fixture
def called(monkeypatch):
    """The models that generate, in their order; each stands for one generation."""
    seen = []
    monkeypatch.setattr(latency, "ROUND_SECONDS", 0)
    monkeypatch.setattr(latency, "_generate", lambda model, ids, new_tokens: seen.append(model.name))
    load = Candidate.load

    def named(self, device):
        model = load(self, device)
        model.name = self.name
        return model

    monkeypatch.setattr(Candidate, "load", named)
    return seen


def candidates(home):
    return [
        Candidate("before", str(home / "model")),
        Candidate("after", str(home / "packed")),
        Candidate("accelerated", str(home / "packed"), kernels=True),
    ]


def test_original_result_and_result_on_kernels_are_timed_in_turn(home, called, monkeypatch):
    found = time_candidates(candidates(home), CPU)
    turn = ["before", "after", "accelerated"]
    assert called == [*turn, "before", *turn * 15]  # a warm-up, a call that is counted, and fifteen rounds
    assert list(found["times"]) == turn
    assert all(one["ms_per_token"] >= 0 and one["time_rounds"] == 15 for one in found["times"].values())
    assert found["timing"]["in_turn"] is True
    assert found["timing"]["what"] == "32 tokens generated greedily after a prompt of 16, batch 1"
    assert "kernels" not in found["times"]["after"]
    assert found["times"]["accelerated"]["kernel_layers"] == 14
    assert found["times"]["accelerated"]["kernels"] == "PyTorch int4 (CPU), 4-bit codes: 14; not compressed: 1"


@pytest.mark.slow
def test_models_that_do_not_fit_together_are_timed_one_after_the_other(home, called, monkeypatch):
    monkeypatch.setattr(timed_models, "free_memory", lambda device: 1000)
    found = time_candidates(candidates(home), CPU)
    assert called == [name for name in ("before", "after", "accelerated") for _ in range(17)]
    assert found["timing"]["in_turn"] is False
    assert set(found["times"]) == {"before", "after", "accelerated"}


def test_free_memory_is_at_most_what_the_machine_has():
    from hf_optim.runs.memory import host_memory

    free = free_memory(CPU)
    assert free is None or 0 < free <= host_memory()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_kernels_are_loaded_for_the_class_that_the_checkpoint_names(home, dtype):
    model = load_on_kernels(ModelSource(str(home / "packed"), dtype=dtype), CPU)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert kernels_of(model)["kernel_layers"] == 14
    dense = load_on_kernels(ModelSource(str(home / "model")), CPU)
    assert kernels_of(dense) == {"kernels": "not compressed: 15", "kernel_layers": 0}


@pytest.mark.parametrize("config", ["auto", {"steps": [{"technique": "magnitude"}]}])
def test_a_class_that_is_named_takes_dtype_auto(home, config):
    source = home / ("packed" if config == "auto" else "model")
    model = LlamaForCausalLM.from_pretrained(source, optim_config=config, dtype="auto")
    assert model.dtype == (torch.bfloat16 if config == "auto" else torch.float32)
    assert LlamaForCausalLM.from_pretrained(home / "model", optim_config=config, dtype=torch.bfloat16).dtype == (
        torch.bfloat16
    )


# -- the command -------------------------------------------------------------------------------------------------------
class Children:
    """Stands for the processes that measure; keeps their commands."""

    def __init__(self):
        self.commands, self.times, self.status = [], {}, 0
        self.weights = {}

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if "eval" not in command:
            out = {"times": self.times, "timing": {"what": "w", "in_turn": True} if self.times else {}}
            return subprocess.CompletedProcess([], self.status, json.dumps(out), "hf-optim: no clock\n")
        path = Path(command[command.index("eval") + 1])
        self.weights[path.name] = AutoModelForCausalLM.from_pretrained(path).state_dict()
        quality = {"perplexity": 2.0 if "--auto" in command else 2.5, "tokens": 100}
        return subprocess.CompletedProcess([], 0, json.dumps(quality), "")

    def options(self, name):
        return [command[command.index(name) + 1] for command in self.commands if name in command]


@pytest.fixture
def children(monkeypatch):
    made = Children()
    monkeypatch.setattr("subprocess.run", made)
    return made


def compress(home, recipe, output, *options):
    words = ["compress", home / "model", "--recipe", home / f"{recipe}.json", "--output", output, "--device", "cpu"]
    return main([str(word) for word in (*words, "--eval", home / "data.jsonl", *options)])


def test_eval_samples_limits_every_evaluation_and_is_on_record_and_card(home, children, tmp_path):
    assert compress(home, "rtn", tmp_path / "out", "--eval-samples", 5, "--seq-len", 32) == 0
    assert children.options("--samples") == ["5", "5"]
    assert Record.read(tmp_path / "out").measured["evaluation"]["samples"] == 5
    assert "Evaluated on data.jsonl, 5 samples of 32 tokens (100 tokens scored)." in (
        tmp_path / "out" / "README.md"
    ).read_text().replace("\\", "")


def test_eval_samples_needs_eval(home, tmp_path, capsys):
    words = ["compress", home / "model", "--recipe", home / "rtn.json", "--output", tmp_path / "out"]
    assert main([str(word) for word in (*words, "--eval-samples", 5)]) == 2
    assert "--eval-samples is for the data of --eval" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    assert "number of sequences or examples for evaluation (default: all of the data)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_result_on_kernels_is_evaluated_too_and_shown_with_both_times(home, children, tmp_path, capsys):
    timed = {"ms_per_token": 9.0, "ms_per_token_iqr": 0.2, "time_rounds": 15}
    children.times = {
        "before": {**timed, "ms_per_token": 4.0},
        "after": timed,
        "accelerated": {**timed, "ms_per_token": 3.0, "kernel_layers": 14, "kernels": "int4: 14"},
    }
    assert compress(home, "rtn", tmp_path / "out") == 0
    request = json.loads(next(command for command in children.commands if "eval" not in command)[-1])
    assert [one["name"] for one in request["candidates"]] == ["before", "after", "accelerated"]
    assert [one["kernels"] for one in request["candidates"]] == [False, False, True]
    assert [one["trust_remote_code"] for one in request["candidates"]] == [False] * 3
    assert sum("--auto" in command for command in children.commands) == 1
    assert all("--no-time" in command for command in children.commands if "eval" in command)
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in capsys.readouterr().out.splitlines()
            if "  " in line}  # fmt: skip
    assert rows["perplexity"] == ["2.5000", "2.5000", "+0.0", "%", "2.0000", "-20.0", "%"]
    assert " ".join(rows["ms per token (greedy, batch 1)"]) == "4.00 ± 0.10 9.00 ± 0.10 +125.0 % 3.00 ± 0.10 -25.0 %"
    assert (
        "| 4.00 ± 0.10 | 9.00 ± 0.10 | +125.0 % | 3.00 ± 0.10 | -25.0 % |"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_result_without_layers_on_kernels_has_no_column_for_them(home, children, tmp_path):
    children.times = {"accelerated": {"ms_per_token": 3.0, "kernel_layers": 0, "kernels": "not compressed: 15"}}
    assert compress(home, "rtn", tmp_path / "out") == 0
    assert not any("--auto" in command for command in children.commands)
    assert "accelerated" not in Record.read(tmp_path / "out").measured


def test_figures_are_kept_if_times_cannot_be_measured(home, children, tmp_path, capsys):
    children.status = 2
    assert compress(home, "rtn", tmp_path / "out") == 2
    assert "hf-optim: could not measure the times: no clock" in capsys.readouterr().err
    record = Record.read(tmp_path / "out")
    assert record.measured["after"]["perplexity"] == 2.5
    assert record.finished


def test_the_coverage_of_a_step_is_printed_once_in_one_format(home, children, tmp_path, capsys):
    assert compress(home, "rtn", tmp_path / "out") == 0
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "weights (" in line]
    changed = "15,360 of 32,096 weights (47.9 %)"
    assert lines == [f"step 1 (rtn) changed {changed}"]
    assert "| step 1 (rtn) | 15,360 | 32,096 | 47.9 % |" in (tmp_path / "out" / "README.md").read_text()


def test_a_control_is_trained_alike_on_the_word_train(home, children, tmp_path, capsys):
    assert compress(home, "gmp", tmp_path / "out", "--control", "train") == 0
    record = Record.read(tmp_path / "out")
    assert record.measured["control"]["perplexity"] == 2.5
    assert record.measured["control"]["trained"] is True
    assert "trained alike" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "original, trained alike" in text
    assert "with the same seed and no technique" in text
    # The control is what a stock Trainer makes of the original with the same rows and arguments.
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    data = DataConfig(str(home / "data.jsonl"), samples=6, seq_len=32)
    rows, collator = training_rows(model, tiny_tokenizer(), data)
    arguments = training_arguments(str(tmp_path / "training"), {"use_cpu": True, **TRAINING})
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    control = children.weights["control"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, control[name]), name
    assert not torch.equal(control["lm_head.weight"], children.weights["model"]["lm_head.weight"])
    assert all(bool(weight.all()) for name, weight in control.items() if "proj" in name)


def test_a_control_that_cannot_be_trained_is_refused_before_the_work(home, children, tmp_path, capsys):
    assert compress(home, "rtn", tmp_path / "out", "--control", "train") == 2
    assert "no step of this recipe trains, so the original is the control already" in capsys.readouterr().err
    assert compress(home, "gmp", tmp_path / "out", "--control", "train", "--train", "random") == 2
    assert "random data has no labels" in capsys.readouterr().err
    assert children.commands == []
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    assert "costs as much again as the training of the recipe" in " ".join(capsys.readouterr().out.split())


def test_a_dense_model_is_trained_without_a_run(home):
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    before = model.lm_head.weight.detach().clone()
    data = DataConfig(str(home / "data.jsonl"), samples=4, seq_len=32)
    assert train_dense(model, tiny_tokenizer(), data, {**TRAINING, "max_steps": 1, "use_cpu": True}) is model
    assert not torch.equal(model.lm_head.weight, before)
    with pytest.raises(hf_optim.OptimError):
        hf_optim.run_of(model)

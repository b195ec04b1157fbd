"""Tasks of lm-eval: what reaches it, what comes back, and names that would run somebody's code."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim import OptimError
from hf_optim.cli import main
from hf_optim.errors import DataError, ModelError
from hf_optim.evaluation import harness

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


class Manager:
    """Knows two tasks, as lm-eval's ``TaskManager`` does."""

    all_tasks = ("arc_easy", "arc_challenge")

    def __init__(self, include_path=None):
        self.include_path = include_path

    def match_tasks(self, names):
        import fnmatch

        return [task for name in names for task in self.all_tasks if fnmatch.fnmatch(task, name)]


@pytest.fixture
def stub(monkeypatch):
    """A stand-in for lm-eval that returns what it was given."""
    seen = {}

    class HFLM:
        def __init__(self, **kwargs):
            seen["model"] = kwargs

    def simple_evaluate(**kwargs):
        seen.update({key: value for key, value in kwargs.items() if key != "model"})
        seen["training"] = seen["model"]["pretrained"].training
        return {"results": {task: {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.1} for task in kwargs["tasks"]}}

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    package, models, hf, tasks = (types.ModuleType(name) for name in names)
    package.simple_evaluate, hf.HFLM, tasks.TaskManager = simple_evaluate, HFLM, Manager
    package.models, models.huggingface, package.tasks = models, hf, tasks
    for module in (package, models, hf, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_it_is_optional(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptimError, match=r"hf-optim\[lm-eval\]"):
        harness.lm_eval_tasks(tiny_llama(), None, ["arc_easy"])
    assert main(["eval", str(tmp_path / "not read"), "--tasks", "arc_easy"]) == 2
    assert "hf-optim[lm-eval]" in capsys.readouterr().err


def test_the_model_and_the_options_reach_it(stub, tmp_path):
    model = tiny_llama().train()
    options = {"limit": 3, "num_fewshot": 2, "include_path": tmp_path}
    found = harness.lm_eval_tasks(model, tiny_tokenizer(), ["arc_*"], **options)
    assert list(found) == ["arc_easy", "arc_challenge"]
    assert found["arc_easy"]["acc,none"] == 0.5
    assert stub["model"]["pretrained"] is model
    assert (stub["limit"], stub["num_fewshot"], stub["training"]) == (3, 2, False)
    assert stub["task_manager"].include_path == str(tmp_path)
    assert model.training
    assert "confirm_run_unsafe_code" not in stub  # lm-eval then refuses tasks that run what a model writes


@pytest.mark.parametrize("name", ["arc_eazy", "folder/task.yaml", "/tmp/task.yaml", "../task", ""])
def test_only_known_tasks_run(name, stub):
    with pytest.raises(DataError, match="no task"):
        harness.lm_eval_tasks(tiny_llama(), tiny_tokenizer(), ["arc_easy", name])
    assert "tasks" not in stub


def test_what_it_cannot_run(stub, monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="language model"):
        harness.lm_eval_tasks(tiny_bert(), tiny_tokenizer(), ["arc_easy"])
    with pytest.raises(DataError, match="tokenizer"):
        harness.lm_eval_tasks(tiny_llama(), None, ["arc_easy"])
    with pytest.raises(DataError, match="not a folder"):
        harness.lm_eval_tasks(tiny_llama(), tiny_tokenizer(), ["arc_easy"], include_path=tmp_path / "nothing")

    def unreachable(**kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", unreachable)
    with pytest.raises(DataError, match="reach the Hub"):
        harness.lm_eval_tasks(tiny_llama(), tiny_tokenizer(), ["arc_easy"])


def test_rows_have_the_names_of_lm_eval_and_its_standard_errors():
    found = {
        "arc_easy": {"alias": "arc_easy", "sample_len": 4, "acc,none": 0.52, "acc_stderr,none": 0.0112},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
    }
    assert harness.task_rows(found) == [
        ("arc_easy acc", "0.5200 ± 0.0112"),
        ("gsm8k exact_match (strict-match)", "0.2500"),
    ]


def test_the_command(stub, tmp_path, capsys):
    tiny_llama(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["eval", str(tmp_path / "model"), "--tasks", "arc_easy, arc_challenge", "--device", "cpu"]
    assert main([*words, "--limit", "5", "--num-fewshot", "0"]) == 0
    assert "arc_challenge acc" in capsys.readouterr().out
    assert (stub["limit"], stub["num_fewshot"]) == (5, 0)
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["arc_easy"]["acc_stderr,none"] == 0.1
    for wrong in (["eval", str(tmp_path / "model")], [*words, "--num-fewshot", "-1"]):
        assert main(wrong) == 2


@needs_lm_eval
def test_a_task_made_from_local_data(tmp_path):
    """The accuracy is that of the sums of log-probabilities of each ending after its context."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "saw", "it"]
    rows = []
    for _ in range(24):
        endings = [" ".join(draw.sample(words, 4)) for _ in range(2)]
        rows.append({"context": " ".join(draw.sample(words, 4)), "endings": endings, "label": draw.randint(0, 1)})
    data = tmp_path / "endings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "endings.yaml").write_text(TASK.replace("DATA", str(data)))
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    found = harness.lm_eval_tasks(model, tokenizer, ["endings"], include_path=tmp_path)["endings"]
    right = 0
    for row in rows:
        sums = []
        for ending in row["endings"]:
            context = tokenizer(row["context"]).input_ids
            ids = torch.tensor([tokenizer(f"{row['context']} {ending}").input_ids])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            sums.append(float(logs[len(context) - 1 :].sum()))
        right += sums.index(max(sums)) == row["label"]
    assert found["acc,none"] == pytest.approx(right / len(rows))
    assert 0 < right < len(rows)
    assert found["acc_stderr,none"] > 0


def test_data_is_looked_for_before_the_model_is_loaded(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "no model"), "--data", str(tmp_path / "nothing.jsonl")]) == 2
    assert "no data file" in capsys.readouterr().err

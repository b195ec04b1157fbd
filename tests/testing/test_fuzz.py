"""The fuzzer: it reports each kind of fault, and finds none. ``make fuzz`` runs it for hours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import transformers

from hf_optim.errors import DataError, OptimError
from hf_optim.testing.fuzz.checkpoint_doors import _as_user, require_like_stock
from hf_optim.testing.fuzz.door import Door, StockError, WrongResult, frames_of_ours
from hf_optim.testing.fuzz.doors import DOORS
from hf_optim.testing.fuzz.examples import Examples
from hf_optim.testing.fuzz.runner import FINE, run, run_input
from hf_optim.testing.models import tiny_llama

SEED = 2026
# Inputs of each kind: about a minute on one core, with the examples.
INPUTS = {
    "recipe": 40,
    "training": 12,
    "config": 32,
    "tokenizer": 10,
    "index": 24,
    "safetensors": 20,
    "quantization": 24,
    "record": 32,
    "journal": 20,
    "data": 40,
    "batches": 20,
    "command": 40,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    made = Examples(tmp_path_factory.mktemp("examples"))
    yield made
    made.close()


@pytest.mark.many
@pytest.mark.parametrize("kind", INPUTS)
def test_every_input_is_refused_in_our_words_or_gives_the_right_result(kind, examples):
    doors = [door for door in DOORS if door.kind == kind]
    report = run(INPUTS[kind], SEED, doors, examples=examples)
    assert [f"{found.door.name} {found.seed} {found.outcome}: {found.text}" for found in report.findings] == []
    assert sum(report.counts.values()) == INPUTS[kind]


def test_every_kind_is_tested():
    assert {door.kind for door in DOORS} == set(INPUTS)


# -- the fuzzer itself ------------------------------------------------------------------------------------------------
def _raises(error):
    def enter(examples, home, random):
        raise error

    return enter


def _spins(examples, home, random):
    while True:
        pass


def _sleeps(examples, home, random):
    time.sleep(60)


@pytest.mark.parametrize(
    ("enter", "outcome"),
    [
        (_raises(DataError("the file is empty")), "refused"),
        (_raises(KeyError("weight_map")), "raw"),
        (_raises(WrongResult("logits differ")), "wrong"),
        (_raises(OptimError()), "message"),
        (_raises(StockError("no such class")), "stock"),
        (_spins, "hang"),
        (_sleeps, "hang"),
        (lambda examples, home, random: None, "read"),
    ],
)
def test_an_outcome_is_named(enter, outcome, examples):
    found, _ = run_input(Door("x", "y", enter), "1", examples, seconds=0.1)
    assert found == outcome
    assert (outcome in FINE) == (outcome in ("read", "refused", "stock"))


def test_the_same_seed_gives_the_same_inputs(examples):
    doors = [door for door in DOORS if (door.kind, door.name) == ("recipe", "parse")]
    first, second = (run(30, 5, doors, examples=examples).counts for _ in range(2))
    assert first == second
    assert first != run(30, 6, doors, examples=examples).counts


def test_an_error_that_hf_optim_raised_or_led_to_is_not_one_of_stock(examples, tmp_path):
    (tmp_path / "config.json").write_text("{")
    cls = transformers.AutoModelForCausalLM
    with pytest.raises(StockError):  # the auto class reads the configuration itself
        _as_user(examples, tmp_path, cls, optim_config=["rtn"])
    examples_of_others = Examples(tmp_path)
    examples_of_others.stock_error = lambda home, name: ""  # a process without hf_optim loads it
    with pytest.raises(OSError) as raised:
        _as_user(examples_of_others, tmp_path, cls, optim_config=["rtn"])
    assert not frames_of_ours(raised.value)

    def fails():
        try:
            tiny_llama(hidden_size=-1)
        except Exception as error:
            raise ValueError("in other words") from error

    with pytest.raises(ValueError) as raised:
        fails()
    assert frames_of_ours(raised.value)


def test_weights_that_differ_from_those_of_stock_are_wrong(examples, tmp_path):
    import torch

    from hf_optim.testing.fuzz.checkpoint_doors import logits

    model = tiny_llama()
    original = logits(model)
    require_like_stock(model, examples.dense, original)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    with pytest.raises(WrongResult, match="logits differ from stock transformers"):
        require_like_stock(model, examples.dense, original)
    (Path(tmp_path) / "config.json").write_text("{}")
    with pytest.raises(WrongResult, match="logits differ from the original, and stock does not load it"):
        require_like_stock(model, tmp_path, original)
    require_like_stock(tiny_llama(), tmp_path, original)

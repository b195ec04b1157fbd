"""Doors for data: files of datasets, and batches in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from ...data.calibration_set import build_calibration_data
from ...evaluation.evaluate import evaluate
from ...lifecycle.loading import optimize
from ...recipes.config import DataConfig
from ...training.fit import training_rows
from ..models import tiny_llama
from .door import Door
from .examples import IDS, STEPS, Examples
from .mutations import mutate_bytes, mutate_json


def mutated_data(examples: Examples, home: Path, random: Random) -> Path:
    """Write a mutated data file of some format."""
    suffix = random.choice(sorted(examples.data))
    raw, path = examples.data[suffix], home / f"data{suffix}"
    if not suffix.endswith(".jsonl") or random.random() < 0.4:
        path.write_bytes(mutate_bytes(raw, random))
        return path
    lines = raw.splitlines()
    for _ in range(random.choice((1, 1, len(lines)))):
        at = random.randrange(len(lines))
        lines[at] = mutate_json(lines[at], random) if _is_json(lines[at]) else mutate_bytes(lines[at], random)
    path.write_bytes(b"\n".join(lines))
    return path


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _config(examples: Examples, home: Path, random: Random) -> DataConfig:
    column = random.choice((None, None, None, "text", "label", "nothing"))
    return DataConfig(
        dataset=str(mutated_data(examples, home, random)),
        samples=random.choice((1, 2, None)),
        seq_len=random.choice((4, 8)),
        text_column=column,
    )


def _calibrate(examples: Examples, home: Path, random: Random) -> None:
    model, data = tiny_llama(), _config(examples, home, random)
    batches = build_calibration_data(None, model_config=model.config, tokenizer=examples.tokenizer, data=data)
    optimize(model, STEPS[4], batches, tokenizer=examples.tokenizer)


def _evaluate_lm(examples: Examples, home: Path, random: Random) -> None:
    evaluate(tiny_llama(), examples.tokenizer, _config(examples, home, random), speed=False)


def _evaluate_classifier(examples: Examples, home: Path, random: Random) -> None:
    evaluate(examples.classifier, examples.tokenizer, _config(examples, home, random), speed=False)


def _train(examples: Examples, home: Path, random: Random) -> None:
    model = random.choice((tiny_llama(), examples.classifier))
    rows, collator = training_rows(model, examples.tokenizer, _config(examples, home, random))
    model(**collator(rows[:2]))


_TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: IDS,
    lambda: IDS[:0],
    lambda: IDS[:, :0],
    lambda: IDS[:, :5],
    lambda: IDS[0],
    lambda: IDS[0, 0],
    lambda: IDS[None],
    lambda: IDS.float(),
    lambda: IDS.bool(),
    lambda: IDS.to(torch.complex64),
    lambda: IDS + 1000,
    lambda: -IDS,
    lambda: torch.full((2, 10), float("nan")),
    lambda: torch.ones_like(IDS),
    lambda: torch.zeros_like(IDS),
    lambda: torch.full_like(IDS, -100),
    lambda: IDS.tolist(),
    lambda: IDS.numpy(),
    lambda: IDS.to_sparse(),
    lambda: IDS.to("meta"),
    lambda: [IDS, IDS],
    lambda: [[1, 2], [3]],
    lambda: {"a": IDS},
    list,
    lambda: None,
    lambda: "text",
    lambda: 5,
)
_KEYS = ("input_ids", "attention_mask", "labels", "position_ids", "inputs_embeds", "pixel_values", "nothing", "", 3)


def _in_memory(examples: Examples, home: Path, random: Random) -> None:
    chosen = ("input_ids", *random.sample(_KEYS, random.randrange(3)))
    batch = {key: random.choice(_TENSORS)() for key in chosen}
    values: tuple[Any, ...] = (
        [batch],
        [{"input_ids": IDS}, batch],
        batch,
        batch["input_ids"],
        (each for each in [batch]),
        [],
        [[]],
        [{}],
        [""],
        ["the cat"],
        ["the cat", None],
        [b"the"],
        5,
        [None],
        "x.jsonl",
        home,
    )
    optimize(tiny_llama(), random.choice(STEPS), random.choice(values), tokenizer=examples.tokenizer)


DOORS = (
    Door("data", "calibration", _calibrate),
    Door("data", "evaluate", _evaluate_lm),
    Door("data", "classify", _evaluate_classifier),
    Door("data", "train", _train),
    Door("batches", "optimize", _in_memory),
)

"""The two models of the pruning sweep, with their training settings and their metrics."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from methods import Shape
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_optim import DataConfig
from hf_optim.evaluation.evaluate import evaluate
from hf_optim.training.fit import training_rows

LABELLED = 38_400  # labelled sentences that the encoder trains on


@dataclass
class Subject:
    """A model with its data.

    Attributes:
        name: as printed.
        metric: key in the result of ``hf_optim.evaluation.evaluate.evaluate``.
        lower_is_better: True if a lower metric is better.
        load: loads the model, before any training.
        tokenizer: its tokenizer.
        data: texts or labelled sentences to train on; several files.
        evaluation: the data of the metric.
        training: arguments of ``TrainingArguments``.
        shape: the weights of the blocks.
    """

    name: str
    metric: str
    lower_is_better: bool
    load: Callable[[], Any]
    tokenizer: Any
    data: list[DataConfig]
    evaluation: DataConfig
    training: dict[str, Any]
    shape: Shape

    @cached_property
    def training_data(self) -> tuple[list[dict[str, Any]], Any]:
        """Training examples and their collator."""
        model, examples, collator = self.load(), [], None
        for data in self.data:
            rows, collator = training_rows(model, self.tokenizer, data)
            examples += rows
        return examples, collator

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        return float(evaluate(model.eval(), self.tokenizer, self.evaluation, speed=False)[self.metric])


def babyllama(models: Path, data: Path) -> Subject:
    path, stories = models / "babyllama-1m", data / "tinystories"
    return Subject(
        "babyllama-1m",
        "perplexity",
        True,
        lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
        [DataConfig(str(stories / f"{part}.jsonl"), samples=None) for part in ("train", "calibration")],
        DataConfig(str(stories / "eval.jsonl"), samples=None),
        {"per_device_train_batch_size": 16, "learning_rate": 5e-4, "weight_decay": 0.01},
        Shape(layers=5, attention=49_152, feed_forward=135_168, heads=4, neurons=352),
    )


def minilm(encoder: Path, data: Path) -> Subject:
    """Return the pretrained encoder with a new head: it is pruned during fine-tuning, as is usual for tickets."""

    def load() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=torch.float32)

    return Subject(
        "MiniLM, SST-2",
        "accuracy",
        False,
        load,
        AutoTokenizer.from_pretrained(encoder),
        [DataConfig(str(data / "sst2" / "train.tsv"), samples=LABELLED)],
        DataConfig(str(data / "sst2" / "dev.tsv"), samples=None),
        {"per_device_train_batch_size": 32, "learning_rate": 1e-4, "weight_decay": 0.01},
        Shape(layers=6, attention=589_824, feed_forward=1_179_648, heads=0, neurons=1536),
    )


def calibration_batches(examples: list[dict[str, Any]], collator: Any, seed: int) -> list[dict[str, Any]]:
    """Return four batches of training examples without labels, for methods that rank by activations."""
    chosen = random.Random(seed).sample(examples, 64)
    batches = [collator([dict(example) for example in chosen[at : at + 16]]) for at in range(0, 64, 16)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

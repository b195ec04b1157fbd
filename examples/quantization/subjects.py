"""The models of the quantization table, with their data for calibration, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from hf_optim import DataConfig, OptimTrainer
from hf_optim.data.datasets import load_examples
from hf_optim.evaluation.evaluate import evaluate, mean_pool
from hf_optim.training.fit import train_stage, training_arguments

SENTENCES = 512  # calibration examples of an encoder
SEQUENCES = 240  # calibration examples of a language model
TRAINING = {"max_steps": 200, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "warmup_steps": 10}


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        name: the column of the table.
        path: the checkpoint.
        auto_class: the class of transformers that loads it.
        metric: key in the result of ``hf_optim.evaluation.evaluate.evaluate``.
        lower_is_better: True if a lower metric is better.
        calibration, training, evaluation: the data.
    """

    name: str
    path: Path
    auto_class: str
    metric: str
    lower_is_better: bool
    calibration: DataConfig
    training: DataConfig
    evaluation: DataConfig

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def supports(self, steps: Sequence[dict[str, Any]]) -> bool:
        """Return True if the recipe applies to the model: a bare encoder has no logits to distil."""
        return self.metric != "spearman" or all(step["technique"] != "logit_kd" for step in steps)

    def load(self, device: torch.device) -> Any:
        return getattr(transformers, self.auto_class).from_pretrained(self.path, dtype=torch.float32).to(device)

    def calibration_data(self) -> Any:
        """Return the calibration data: the name of a dataset for a language model, batches of sentences for an encoder.

        Each batch has sentences of one length, so that none is padded.
        """
        if self.metric == "perplexity":
            return self.calibration.dataset
        examples = self._tokenize(self.calibration, SENTENCES)
        examples.sort(key=lambda example: len(example["input_ids"]))
        return [_stack(list(part)) for _, part in groupby(examples, key=lambda example: len(example["input_ids"]))]

    def _tokenize(self, data: DataConfig, count: int) -> list[dict[str, Any]]:
        examples = []
        for row in load_examples(data, limit=count):
            ids = self.tokenizer(row[data.text_column], truncation=True, max_length=128)["input_ids"]
            # Some techniques calibrate with the loss, which needs the labels.
            examples.append({"input_ids": ids, **({"labels": int(row["label"])} if "label" in row else {})})
        return examples

    def train(self, model: Any, learning_rate: float) -> Any:
        """Train the current stage, and continue with the recipe; return the model."""
        arguments = {**TRAINING, "learning_rate": learning_rate}
        if self.metric != "spearman":
            return train_stage(model, self.tokenizer, self.training, arguments)
        return self._train_on_vectors(model, arguments)

    def _train_on_vectors(self, model: Any, arguments: dict[str, Any]) -> Any:
        """Train a bare encoder, which has no loss, on the sentence vectors of the dense model."""
        teacher = self.load(next(model.parameters()).device).eval()
        examples = [{"input_ids": example["input_ids"]} for example in self._tokenize(self.training, 10_000)]
        trainer = VectorTrainer(
            model=model,
            args=training_arguments("training", {**arguments, "remove_unused_columns": False}),
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=transformers.DataCollatorWithPadding(self.tokenizer),
        )
        trainer.teacher = teacher
        trainer.train()
        return trainer.run.model

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        return float(evaluate(model.eval(), self.tokenizer, self.evaluation, speed=False)[self.metric])


class VectorTrainer(OptimTrainer):
    """Trains on the sentence vectors of ``teacher``: the loss is the squared distance of the unit vectors."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = torch.nn.functional.normalize(mean_pool(self.teacher, inputs), dim=-1)
        loss = (torch.nn.functional.normalize(mean_pool(model, inputs), dim=-1) - target).square().sum(-1).mean()
        return (loss, {}) if return_outputs else loss


def _stack(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def subjects(models: Path, minilm: Path | None, classifier: Path | None, data: Path) -> Iterator[Subject]:
    """Yield the models of the table: the two language models, and the encoder and the classifier if they are given."""
    stories = data / "tinystories"
    for name in ("babyllama-1m", "stories260k"):
        yield Subject(
            name,
            models / name,
            "AutoModelForCausalLM",
            "perplexity",
            True,
            DataConfig(str(stories / "calibration.jsonl"), samples=SEQUENCES),
            DataConfig(str(stories / "train.jsonl"), samples=None),
            DataConfig(str(stories / "eval.jsonl"), samples=None),
        )
    if minilm is not None:
        yield Subject(
            "MiniLM, STS-B",
            minilm,
            "AutoModel",
            "spearman",
            False,
            DataConfig(str(data / "stsb" / "train.tsv"), text_column="sentence1"),
            DataConfig(str(data / "stsb" / "train.tsv"), text_column="sentence2"),
            DataConfig(str(data / "stsb" / "test.tsv"), samples=None),
        )
    if classifier is not None:
        yield Subject(
            "SST-2 classifier",
            classifier,
            "AutoModelForSequenceClassification",
            "accuracy",
            False,
            DataConfig(str(data / "sst2" / "train.tsv"), text_column="sentence"),
            DataConfig(str(data / "sst2" / "train.tsv"), samples=12_800),
            DataConfig(str(data / "sst2" / "dev.tsv"), samples=None),
        )

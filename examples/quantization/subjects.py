"""The models of the quantization table: what each is calibrated on, trained on and measured by."""

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

SENTENCES = 512  # of an encoder's calibration
WINDOWS = 240  # of a language model's
TRAINING = {"max_steps": 200, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "warmup_steps": 10}


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        name: the column of the table.
        path: the checkpoint.
        auto_class: the class of transformers that loads it.
        figure: the figure of merit, as ``hf_optim.evaluation.evaluate`` names it.
        lower_is_better: of that figure.
        calibration, training, evaluation: the data.
    """

    name: str
    path: Path
    auto_class: str
    figure: str
    lower_is_better: bool
    calibration: DataConfig
    training: DataConfig
    evaluation: DataConfig

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def takes(self, steps: Sequence[dict[str, Any]]) -> bool:
        """Whether a recipe means something here: a bare encoder has no logits to distil."""
        return self.figure != "spearman" or all(step["technique"] != "logit_kd" for step in steps)

    def load(self, device: torch.device) -> Any:
        return getattr(transformers, self.auto_class).from_pretrained(self.path, dtype=torch.float32).to(device)

    def batches(self) -> Any:
        """Calibration data: windows of text for a language model; sentences, by length and unpadded, for an encoder."""
        if self.figure == "perplexity":
            return self.calibration.dataset
        rows = self._rows(self.calibration, SENTENCES)
        rows.sort(key=lambda row: len(row["input_ids"]))
        return [_stacked(list(part)) for _, part in groupby(rows, key=lambda row: len(row["input_ids"]))]

    def _rows(self, data: DataConfig, count: int) -> list[dict[str, Any]]:
        found = []
        for row in load_examples(data, limit=count):
            encoded = self.tokenizer(row[data.text_column], truncation=True, max_length=128)
            found.append(
                {"input_ids": encoded["input_ids"], **({"labels": int(row["label"])} if "label" in row else {})}
            )
        return found

    def train(self, model: Any, learning_rate: float) -> Any:
        """Train the stage in work; the model that comes out."""
        arguments = {**TRAINING, "learning_rate": learning_rate}
        if self.figure != "spearman":
            return train_stage(model, self.tokenizer, self.training, arguments)
        return self._teach_vectors(model, arguments)

    def _teach_vectors(self, model: Any, arguments: dict[str, Any]) -> Any:
        """A bare encoder has no loss of its own: it learns the sentence vectors that it had."""
        teacher = self.load(next(model.parameters()).device).eval()
        rows = [{"input_ids": row["input_ids"]} for row in self._rows(self.training, 10_000)]
        trainer = VectorTrainer(
            model=model,
            args=training_arguments("training", {**arguments, "remove_unused_columns": False}),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=transformers.DataCollatorWithPadding(self.tokenizer),
        )
        trainer.teacher = teacher
        trainer.train()
        return trainer.run.model

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        figures = evaluate(model.eval(), self.tokenizer, self.evaluation, speed=False)
        return float(figures[self.figure])


class VectorTrainer(OptimTrainer):
    """Trains towards the sentence vectors of ``teacher``: the squared distance of unit vectors."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = torch.nn.functional.normalize(mean_pool(self.teacher, inputs), dim=-1)
        loss = (torch.nn.functional.normalize(mean_pool(model, inputs), dim=-1) - wanted).square().sum(-1).mean()
        return (loss, {}) if return_outputs else loss


def _stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def subjects(models: Path, minilm: Path | None, classifier: Path | None, data: Path) -> Iterator[Subject]:
    """The four models, those that are at hand."""
    stories = data / "tinystories"
    for name in ("babyllama-1m", "stories260k"):
        yield Subject(
            name,
            models / name,
            "AutoModelForCausalLM",
            "perplexity",
            True,
            DataConfig(str(stories / "calibration.jsonl"), samples=WINDOWS),
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

"""What killed runs leave: a journal, the work folder of a streamed run, and the checkpoints of a training."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from ...calibration.block_journal import BlockJournal
from ...checkpoints import meta_model
from ...checkpoints.source import ModelSource
from ...cli.jobs.streamed import StreamedJob
from ...data.calibration_set import CalibrationData
from ...lifecycle.loading import optimize
from ...recipes.config import DataConfig, OptimConfig
from ...training.fit import train_stage
from ...training.trainer import OptimTrainer
from ..models import tiny_llama
from .examples import IDS, STEPS, TRAINING_STEPS, Examples


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a decoder on fixed token ids, float32."""
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


class KilledRuns:
    """Runs that can be continued, each made once.

    Args:
        examples: models and data; files go into its folder.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.home = examples.home / "killed"
        self.data = CalibrationData(examples.batches, {"dataset": "x"})

    # -- a journal of blocks ------------------------------------------------------------------------------------------
    @cached_property
    def journal(self) -> tuple[Path, torch.Tensor]:
        """The journal of a finished calibration, and the logits of its result."""
        return self.home / "journal", self.resume(self.home / "journal", False)

    def resume(self, journal: Path, resume: bool) -> torch.Tensor:
        """Calibrate the decoder with a journal. Returns logits."""
        kept = BlockJournal(journal, resume=resume)
        return logits(optimize(tiny_llama(), {"steps": STEPS[4], "driver": "blockwise"}, self.data, journal=kept))

    # -- a streamed run -----------------------------------------------------------------------------------------------
    @cached_property
    def streamed(self) -> tuple[Path, torch.Tensor]:
        """The work folder of a streamed run, and the logits of its result."""
        return self.home / "streamed", self.stream(self.home / "streamed", self.home / "out", False)

    def stream(self, work: Path, output: Path, resume: bool) -> torch.Tensor:
        """Run the streamed driver on the dense checkpoint. Returns the logits of what it wrote."""
        source = ModelSource(str(self.examples.dense))
        recipe = OptimConfig.parse({"steps": STEPS[4], "driver": "streamed"})
        job = StreamedJob(recipe, meta_model.build(source), source, work, resume, self.data)
        job.calibrate()
        job.save(output)
        return logits(transformers.AutoModelForCausalLM.from_pretrained(output))

    # -- a training ---------------------------------------------------------------------------------------------------
    @cached_property
    def _trained(self) -> tuple[Path, torch.Tensor]:
        found = self.train(self.home / "training", False)
        shutil.copytree(self.home / "training", self.home / "training-copy")
        return self.home / "training", found

    def new_training(self) -> tuple[Path, torch.Tensor]:
        """Return the journal of a training as it was made, and the logits of its result. It names paths in itself."""
        home, found = self._trained
        shutil.rmtree(home)
        shutil.copytree(self.home / "training-copy", home)
        return home, found

    def train(self, journal: Path, resume: bool) -> torch.Tensor:
        """Train the decoder for four steps with a journal. Returns logits."""
        kept = BlockJournal(journal, resume=resume)
        model = optimize(tiny_llama(), {"steps": TRAINING_STEPS[0]}, journal=kept)
        data = DataConfig(dataset=str(self.examples.texts), samples=8, seq_len=8)
        arguments = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
        return logits(train_stage(model, self.examples.tokenizer, data, arguments))

    @cached_property
    def checkpoint(self) -> Path:
        """A checkpoint of a Trainer after two steps."""
        self.train_from(None, self.home / "checkpoints")
        return self.home / "checkpoints" / "checkpoint-2"

    def train_from(self, checkpoint: Path | None, output: Path) -> Any:
        """Train up to the second step, from a checkpoint if one is given. Returns the model."""
        model = optimize(tiny_llama(), {"steps": TRAINING_STEPS[0]})
        rows = [{"input_ids": row, "labels": row} for row in torch.arange(32).reshape(4, 8)]
        arguments = transformers.TrainingArguments(
            str(output), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = OptimTrainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        return model

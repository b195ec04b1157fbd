"""A job of ``hf-optim compress`` under the streamed driver: from a checkpoint on disk to one on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...calibration.streamed.driver import StreamedDriver
from ...calibration.streamed.finished_model import finished_weights
from ...calibration.streamed.output import INDEX, StreamedOutput
from ...checkpoints import saving
from ...checkpoints.atomic import replace_directory
from ...checkpoints.meta_model import MetaModel
from ...checkpoints.reader import Checkpoint, read_sample
from ...compressed.quantization_config import quantization_config, stored_schemes
from ...errors import CheckpointError
from ...lifecycle.loading import apply_prepared, begin
from ...lifecycle.stages import complete_stage, staged, start_run
from ...recipes.config import OptimConfig
from ...recipes.drivers import refuse_streamed
from ...runs.record import versions
from ...toolkit import topology


class StreamedJob:
    """One run of the streamed driver.

    Args:
        recipe: what to do; ``recipe.spill`` is where activations go.
        skeleton: the model.
        work: the directory of finished blocks, beside the output.
        resume: go on with what is in ``work``.
        data: calibration data, or None.
        tokenizer, device: as in ``optimize``.
    """

    def __init__(
        self,
        recipe: OptimConfig,
        skeleton: MetaModel,
        source: Any,
        work: Path,
        resume: bool,
        data: Any = None,
        tokenizer: Any = None,
        device: Any = None,
    ) -> None:
        refuse_streamed(recipe)
        self.run = start_run(recipe, skeleton.model.config)
        self.run.tokenizer, self.run.device, self.run.data = tokenizer, device, data
        apply_prepared(self.run, skeleton.model)
        begin(self.run, skeleton.model, source.model, source.revision)
        self.checkpoint = Checkpoint(skeleton.files, skeleton.model)
        self.names = [block.name for block in topology.blocks(skeleton.model)]
        self.output = StreamedOutput(work, self.names, self._identity(), resume)
        self.loose: list[str] = []

    def calibrate(self) -> None:
        """Do all blocks. What is finished is on disk, whatever happens afterwards."""
        run = self.run
        if run.data is not None:
            run.record.calibration = run.data.description
        spill = Path(tempfile.mkdtemp(prefix="activations-", dir=run.recipe.spill)) if run.recipe.spill else None
        try:
            with staged(run) as entry:
                steps = [step for step in run.recipe.steps if step.implements("calibrate")]
                driver = StreamedDriver(run, steps, self.checkpoint, self.output, spill)
                driver.drive()
                entry |= {"driver": "streamed", **driver.metrics()}
        finally:
            if spill is not None:
                shutil.rmtree(spill, ignore_errors=True)
        self.loose = driver.loose
        with finished_weights(run, self.output):
            complete_stage(run)

    def save(self, directory: Path) -> None:
        """Put the shards, the configuration, the record and the card in the place of ``directory``, at once."""
        run, model = self.run, self._described()
        with replace_directory(directory, stale=saving.is_weights) as beside:
            self._write_config(model, beside)
            for path in self.output.shards:
                _link(path, beside / path.name)
            index = self.output.index(model.num_parameters())
            (beside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            with finished_weights(run, self.output):
                saving.describe(run, beside)

    def _described(self) -> Any:
        """The model, with the configuration that tells what was really written."""
        model: Any = self.run.model
        if getattr(model, "hf_quantizer", None) is not None:
            schemes = stored_schemes(model, set(self.loose))
            if schemes:
                model.config.quantization_config = quantization_config(model, schemes)
            else:
                vars(model.config).pop("quantization_config", None)
        return model

    def _write_config(self, model: Any, beside: Path) -> None:
        """What ``save_pretrained`` writes beside the weights: configurations, and code that came with the model."""
        quantizer = model.__dict__.pop("hf_quantizer", None)
        try:
            type(model).save_pretrained(model, beside, state_dict={})
        finally:
            if quantizer is not None:
                model.hf_quantizer = quantizer
        for path in beside.glob("*.safetensors"):
            path.unlink()

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.run.config.to_dict(), sort_keys=True, default=str).encode())
        for key, entry in sorted(self.checkpoint.listing.entries.items()):
            digest.update(f"{key} {entry.type} {entry.shape}".encode())
            digest.update(read_sample(entry))
        packages = versions()
        recipe = self.run.recipe.to_dict()
        recipe.pop("spill", None)
        return {
            "recipe": recipe,
            "model": digest.hexdigest(),
            "data": self.run.data.description if self.run.data is not None else None,
            "versions": {name: packages.get(name) for name in ("hf-optim", "torch", "transformers")},
        }


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise CheckpointError(f"cannot write {target.name}: {error.strerror}") from error

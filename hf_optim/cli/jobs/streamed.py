"""A job of ``hf-optim compress`` under the streamed driver: from a checkpoint on disk to one on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from ...calibration.block_journal import hash_config, run_identity
from ...calibration.streamed.driver import StreamedDriver
from ...calibration.streamed.finished_model import finished_weights
from ...calibration.streamed.output import INDEX, StreamedOutput
from ...calibration.streamed.spill import spill_folder
from ...checkpoints import saving
from ...checkpoints.atomic import replace_directory
from ...checkpoints.meta_model import MetaModel
from ...checkpoints.read_errors import readable_errors
from ...checkpoints.reader import Checkpoint
from ...compressed.quantization_config import quantization_config, stored_schemes
from ...lifecycle.load_arguments import apply_prepared
from ...lifecycle.stages import attach_model, complete_stage, enter_stage, start_run
from ...recipes.composition import Stage
from ...recipes.config import OptimConfig
from ...runs.run import Run
from ...runs.work_files import digest_file
from ...toolkit import topology
from ...toolkit.exits import copy_exits


class StreamedJob:
    """One run of the streamed driver.

    Args:
        recipe: what to do; ``recipe.spill`` is where activations go.
        meta_model: the model on the meta device.
        work: the directory of completed blocks, beside the output.
        resume: continue from what is in ``work``.
        data: calibration data, or None.
        tokenizer, device: as in ``optimize``.
    """

    def __init__(
        self,
        recipe: OptimConfig,
        meta_model: MetaModel,
        source: Any,
        work: Path,
        resume: bool,
        data: Any = None,
        tokenizer: Any = None,
        device: Any = None,
    ) -> None:
        self.run = start_run(recipe, meta_model.model.config)
        self.run.tokenizer, self.run.device, self.run.data = tokenizer, device, data
        apply_prepared(self.run, meta_model.model)
        attach_model(self.run, meta_model.model, source.model, source.revision)
        self.files = meta_model.files
        self.checkpoint = Checkpoint(meta_model.files, meta_model.model)
        self.names = [block.name for block in topology.blocks(meta_model.model)]
        self.output = StreamedOutput(work, self.names, self._identity(), resume)
        self.off_grid: list[str] = []

    def calibrate(self) -> None:
        """Calibrate all blocks. Completed blocks are on disk, whatever happens afterwards."""
        run = self.run
        if run.data is not None:
            run.record.calibration = run.data.description
        with spill_folder(run.recipe.spill) as spill:
            enter_stage(run, partial(self._stream, spill))
        with finished_weights(run, self.output):
            complete_stage(run)

    def _stream(self, spill: Path | None, run: Run, stage: Stage) -> dict[str, Any]:
        steps = [step for step in stage.steps if step.implements("calibrate")]
        driver = StreamedDriver(run, steps, self.checkpoint, self.output, spill)
        driver.calibrate()
        self.off_grid = driver.off_grid
        return {"driver": "streamed", **driver.metrics()}

    def save(self, directory: Path, measure: saving.Measure | None = None) -> None:
        """Replace ``directory`` atomically by the shards, the configuration, the record and the card.

        ``measure`` is as in ``saving.save``.
        """
        run, model = self.run, self._described()
        with replace_directory(directory, stale=saving.is_weights) as beside:
            self._write_config(model, beside)
            copy_exits(model.config, self.files[0].parent, beside)
            for path in self.output.shards:
                _link(path, beside / path.name)
            index = self.output.index(model.num_parameters())
            (beside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            with finished_weights(run, self.output):
                saving.describe(run, beside, measure)

    def _described(self) -> Any:
        """Return the model, with the configuration that describes what was written."""
        model: Any = self.run.model
        if getattr(model, "hf_quantizer", None) is not None:
            schemes = stored_schemes(model, set(self.off_grid))
            if schemes:
                model.config.quantization_config = quantization_config(model, schemes)
            else:
                vars(model.config).pop("quantization_config", None)
        return model

    def _write_config(self, model: Any, beside: Path) -> None:
        """Write what ``save_pretrained`` writes beside weights: configurations, and code that came with the model."""
        quantizer = model.__dict__.pop("hf_quantizer", None)
        try:
            saving.save_plain(model, beside, state_dict={})
        finally:
            if quantizer is not None:
                model.hf_quantizer = quantizer
        for path in beside.glob("*.safetensors"):
            path.unlink()

    def _identity(self) -> dict[str, Any]:
        """Identify the run: the model by its configuration, its dtypes and every byte of its shards."""
        digest = hashlib.sha256(hash_config(self.run.config).encode())
        digest.update(json.dumps({name: str(dtype) for name, dtype in self.checkpoint.dtypes.items()}).encode())
        for path in sorted(self.files, key=lambda path: path.name):
            with readable_errors(path.parent):
                digest.update(digest_file(path, path.name).encode())
        return run_identity(self.run, digest.hexdigest())


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)

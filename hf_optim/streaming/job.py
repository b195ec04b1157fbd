"""A job of ``hf-optim compress`` under the streamed driver: from a checkpoint on disk to one on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import saving
from ..atomic import replaced_directory
from ..config import OptimConfig
from ..errors import CheckpointError, RecipeError
from ..lifecycle import staged
from ..loading import apply_prepared, begin
from ..packing import quantization_config, stored_schemes
from ..record import versions
from ..run import Run
from ..techniques import Reload
from ..toolkit import topology
from .driver import Streamed
from .finished import readable
from .output import INDEX, Output
from .reader import Checkpoint, read_sample
from .skeleton import Skeleton

REMEDY = "use driver: blockwise, on a machine with room for the model"


def refuse(recipe: OptimConfig, dense: bool = False) -> None:
    """Raise ``RecipeError`` for a recipe that needs more of a model than one block at a time."""
    for position, step in enumerate(recipe.steps):
        label = f"step {position + 1} ({step.name})"
        if step.spec.trains:
            raise RecipeError(f"{label} trains, and the streamed driver has one block in memory at a time; {REMEDY}")
        if step.implements("transform_model"):
            raise RecipeError(
                f"{label} changes the architecture with all weights in memory, and the streamed driver has one block "
                f"at a time; {REMEDY}"
            )
        if step.implements("calibrate") and step.needs_whole_model():
            raise RecipeError(
                f"{label} compares all blocks with each other, and the streamed driver has one in memory at a time; "
                f"{REMEDY}"
            )
        if step.reload() == Reload.REMOTE_CODE:
            raise RecipeError(
                f"{label} writes a model of another class, which the streamed driver does not write block by block; "
                f"{REMEDY}"
            )
    if len(recipe.stages) > 1:
        raise RecipeError(f"the recipe has {len(recipe.stages)} stages, and the streamed driver does one; {REMEDY}")
    if dense:
        raise RecipeError(f"the streamed driver writes compressed checkpoints, not their dense equivalent; {REMEDY}")


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
        skeleton: Skeleton,
        source: Any,
        work: Path,
        resume: bool,
        data: Any = None,
        tokenizer: Any = None,
        device: Any = None,
    ) -> None:
        refuse(recipe)
        self.run = Run(recipe, skeleton.model.config)
        self.run.tokenizer, self.run.device, self.run.data = tokenizer, device, data
        apply_prepared(self.run, skeleton.model)
        begin(self.run, skeleton.model, source.model, source.revision)
        self.checkpoint = Checkpoint(skeleton.files, skeleton.model)
        self.names = [block.name for block in topology.blocks(skeleton.model)]
        self.output = Output(work, self.names, self._identity(), resume)
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
                driver = Streamed(run, steps, self.checkpoint, self.output, spill)
                driver.drive()
                entry |= {"driver": "streamed", **driver.figures()}
        finally:
            if spill is not None:
                shutil.rmtree(spill, ignore_errors=True)
        self.loose = driver.loose
        with readable(run, self.output):
            run.complete_stage()

    def save(self, directory: Path) -> None:
        """Put the shards, the configuration, the record and the card in the place of ``directory``, at once."""
        run, model = self.run, self._described()
        with replaced_directory(directory, stale=saving.is_weights) as beside:
            self._write_config(model, beside)
            for path in self.output.shards:
                _link(path, beside / path.name)
            index = self.output.index(model.num_parameters())
            (beside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            with readable(run, self.output):
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

"""A journal of finished blocks: a killed calibration goes on where it was, with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..compressed import state
from ..errors import CheckpointError
from ..recipes.technique import Technique
from ..runs import snapshot
from ..runs.distributed import barrier, is_main
from ..runs.record import versions
from ..runs.resume_header import is_begun, write_json
from ..runs.run import Run
from ..toolkit.distributed import collectives

HEADER = "journal.json"
SET_ON_THE_WAY = ("use_cache", "architectures", "dtype", "transformers_version")


class BlockJournal:
    """Finished blocks of a blockwise calibration, in a directory of their own. Of several ranks, the first writes it.

    Args:
        directory: where; made when the first block is kept.
        resume: True to go on with what is there, False to start anew (what is there is removed).

    Raises:
        CheckpointError: when resuming and the journal belongs to another recipe, model, data or version.
    """

    def __init__(self, directory: Path, resume: bool) -> None:
        self.directory = Path(directory)
        self._mine: dict[str, Any] = {}
        if not resume and is_main():
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()

    def restore(self, run: Run, first: Technique, name: str) -> bool:
        """Put a block that the steps from ``first`` on have finished back into the model and the run.

        False if it is not in the journal.
        """
        self._check(run)
        path = self._path(run, first, name)
        if not collectives.agreed(path.is_file()):
            return False
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["hf_optim"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the journal's {path.name} cannot be read ({error}); start without --resume"
            ) from error
        block = run.model.get_submodule(name)
        state.load_module_state(block, _strip(tensors, "module."), meta["module"])
        snapshot.restore(run, _strip(tensors, "run."), meta["run"])
        return True

    def keep(self, run: Run, first: Technique, name: str) -> None:
        """Write a finished block; the file appears whole or not at all."""
        self._check(run)
        if not is_main():
            return
        module_tensors, module_meta = state.dump_module_state(run.model.get_submodule(name))
        run_tensors, run_meta = snapshot.take(run, inside=name + ".")
        tensors = {f"module.{k}": v for k, v in module_tensors.items()} | {
            f"run.{k}": v for k, v in run_tensors.items()
        }
        path = self._path(run, first, name)
        beside = path.with_suffix(".writing")
        save_file(
            {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
            beside,
            metadata={"hf_optim": json.dumps({"module": module_meta, "run": run_meta})},
        )
        os.replace(beside, path)

    def remove(self) -> None:
        """The run is over: the journal goes."""
        if is_main():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, run: Run, first: Technique, name: str) -> Path:
        return self.directory / f"step-{run.index(first) + 1}-{name}.safetensors"

    def _check(self, run: Run) -> None:
        # Taken once, while the weights are still those that were loaded.
        mine = self._mine = self._mine or run_identity(run)
        header = self.directory / HEADER
        if is_begun(header, mine, f"the journal in {self.directory.name} was made with") or not is_main():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(header, mine)


def run_identity(run: Run) -> dict[str, Any]:
    """What must be the same for a journal to go on: recipe, model, data and versions, as JSON types."""
    # A Trainer and saving set these; whether they did before this moment depends on where the run goes on.
    config = {key: value for key, value in run.model.config.to_dict().items() if key not in SET_ON_THE_WAY}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for parameter in run.model.parameters():
        # A thousand values of each: enough to tell two trainings apart, and quick on any size.
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 1000)]
        digest.update(sample.float().cpu().numpy().tobytes())
    packages = versions()
    return {
        "recipe": run.recipe.to_dict(),
        "model": digest.hexdigest(),
        "data": run.data.description if run.data is not None else None,
        "versions": {name: packages.get(name) for name in ("hf-optim", "torch", "transformers")},
    }


def _strip(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

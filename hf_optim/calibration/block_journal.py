"""A journal of completed blocks: a killed calibration resumes where it stopped, with bit-exact results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
FORMAT = 2  # of the state of a run in journals; another one is not resumed
VOLATILE_CONFIG_KEYS = ("use_cache", "architectures", "dtype", "transformers_version")


class BlockJournal:
    """The completed blocks of a blockwise calibration, one file each in a directory. Only the main rank writes.

    Args:
        directory: where the files go; created with the first block.
        resume: True to reuse the blocks in ``directory``, False to remove them and start over.

    ``restore`` and ``save`` raise ``CheckpointError`` if the journal belongs to another recipe, model, data or version.
    """

    def __init__(self, directory: Path, resume: bool) -> None:
        self.directory = Path(directory)
        self._identity: dict[str, Any] = {}
        if not resume and is_main():
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()

    def restore(self, run: Run, first: Technique, name: str) -> bool:
        """Restore the block ``name``, and the run as it was after the steps from ``first`` on completed that block.

        Returns False if the block is not in the journal. Raises ``CheckpointError`` if its file cannot be read.
        """
        self._check(run)
        path = self._path(run, first, name)
        if not collectives.is_true_on_all_ranks(path.is_file()):
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

    def save(self, run: Run, first: Technique, name: str) -> None:
        """Write a completed block and the state of the run; the file is moved into place once it is complete."""
        self._check(run)
        if not is_main():
            return
        module_tensors, module_meta = state.dump_module_state(run.model.get_submodule(name))
        run_tensors, run_meta = snapshot.take(run, inside=name + ".")
        tensors = {f"module.{k}": v for k, v in module_tensors.items()} | {
            f"run.{k}": v for k, v in run_tensors.items()
        }
        path = self._path(run, first, name)
        partial = path.with_suffix(".writing")
        save_file(
            {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
            partial,
            metadata={"hf_optim": json.dumps({"module": module_meta, "run": run_meta})},
        )
        os.replace(partial, path)

    def remove(self) -> None:
        """Remove the journal, once the run has finished."""
        if is_main():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, run: Run, first: Technique, name: str) -> Path:
        return self.directory / f"step-{run.index(first) + 1}-{name}.safetensors"

    def _check(self, run: Run) -> None:
        # Computed once, while the weights are still those of the original checkpoint.
        identity = self._identity = self._identity or run_identity(run)
        header = self.directory / HEADER
        if is_begun(header, identity, f"the journal in {self.directory.name} was made with") or not is_main():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(header, identity)


def run_identity(run: Run, model_hash: str | None = None) -> dict[str, Any]:
    """Return what must be equal for a run to resume: recipe, model, data and versions, in JSON types.

    Args:
        model_hash: identifies the model; None hashes its configuration and a sample of its parameters.
    """
    packages = versions()
    return {
        "format": FORMAT,
        "recipe": run.recipe.to_dict(),
        "model": model_hash or _hash_model(run),
        "data": run.data.description if run.data is not None else None,
        "versions": {name: packages.get(name) for name in ("hf-optim", "torch", "transformers")},
    }


def _hash_model(run: Run) -> str:
    # A Trainer and saving set these keys; whether they did so yet depends on where the run resumes.
    config = {key: value for key, value in run.model.config.to_dict().items() if key not in VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for parameter in run.model.parameters():
        # About a thousand values of each: enough to distinguish two trainings, and fast for any model size.
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 1000)]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

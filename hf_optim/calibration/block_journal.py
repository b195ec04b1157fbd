"""A journal of completed blocks: a killed calibration resumes where it stopped, with bit-exact results."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.reader import byte_view
from ..compressed import state
from ..errors import CheckpointError
from ..recipes.technique import Technique
from ..runs import folder_lock, snapshot, work_files
from ..runs.disk_errors import readable_disk_errors
from ..runs.distributed import barrier, is_main
from ..runs.record import versions
from ..runs.resume_header import HEADER, is_begun, remove_work_folder, require_work_folder, write_json
from ..runs.run import Run
from ..toolkit.distributed import collectives

FORMAT = 3  # of work folders; another one is not resumed
# A Trainer and saving set some of these keys; whether they did so yet depends on where the run resumes. The name is a
# path as the caller wrote it.
VOLATILE_CONFIG_KEYS = ("use_cache", "architectures", "dtype", "transformers_version", "_name_or_path")
PATH_FIELDS = ("output_dir", "logging_dir", "cache")  # of training arguments and steps; they need not exist


class BlockJournal:
    """The completed blocks of a blockwise calibration, one file each in a directory. Only the main rank writes.

    The directory is locked until ``remove``, or until the journal is dropped.

    Args:
        directory: where the files go; created with the first block.
        resume: True to reuse the blocks in ``directory``, False to remove them and start over.

    Raises ``CheckpointError`` if another process has the directory, or if it is not a work folder. ``restore`` and
    ``save`` raise it if the journal belongs to another recipe, model, data or version, or if writing fails.
    """

    def __init__(self, directory: Path, resume: bool) -> None:
        self.directory = Path(directory)
        self._identity: dict[str, Any] = {}
        self._release = lambda: None
        if is_main():
            require_work_folder(self.directory)
            real = folder_lock.acquire(self.directory)
            self._release = weakref.finalize(self, folder_lock.release, real)  # type: ignore[assignment]
            if not resume:
                remove_work_folder(self.directory)
        barrier()

    def restore(self, run: Run, first: Technique, name: str) -> bool:
        """Restore the block ``name``, and the run as it was after the steps from ``first`` on completed that block.

        Returns False if the block is not in the journal, or if its file is damaged.
        """
        self._check(run)
        path = self._path(run, first, name)
        if not collectives.is_true_on_all_ranks(work_files.is_intact(path, self._digest)):
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
        partial = path.with_name(path.name + work_files.WRITING)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with readable_disk_errors(self.directory, f"the block {name}", needed, "free some space and add --resume"):
            try:
                work_files.unseal(path)
                save_file(
                    {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
                    partial,
                    metadata={"hf_optim": json.dumps({"module": module_meta, "run": run_meta})},
                )
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            work_files.seal(path, self._digest)

    def remove(self) -> None:
        """Remove the journal, once the run has finished."""
        if is_main():
            remove_work_folder(self.directory)
        self._release()

    @property
    def _digest(self) -> str:
        return work_files.digest_json(self._identity)

    def _path(self, run: Run, first: Technique, name: str) -> Path:
        return self.directory / f"step-{run.index(first) + 1}-{name}.safetensors"

    def _check(self, run: Run) -> None:
        # Computed once, while the weights are still those of the original checkpoint.
        identity = self._identity = self._identity or run_identity(run)
        header = self.directory / HEADER
        if is_begun(header, identity, f"the journal in {self.directory.name} was made with") or not is_main():
            return
        with readable_disk_errors(self.directory, "the journal"):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_json(header, identity)


def run_identity(run: Run, model_hash: str | None = None) -> dict[str, Any]:
    """Return what must be equal for a run to resume: format, recipe, model, data and versions, in JSON types.

    Paths are left out or made absolute, so that a folder may be named in another way: the data is identified by the
    hash of its tensors, and the model by its bytes.

    Args:
        model_hash: identifies the model; None hashes its configuration and the bytes of every tensor.
    """
    packages = versions()
    recipe = run.recipe.to_dict()
    recipe.pop("spill", None)  # where activations are kept does not change the result
    return {
        "format": FORMAT,
        "recipe": _with_real_paths({**recipe, "calibration": _without_name(recipe.get("calibration"))}),
        "model": model_hash or hash_model(run),
        "data": _without_name(run.data.description) if run.data is not None else None,
        "versions": {name: packages.get(name) for name in ("hf-optim", "torch", "transformers", "compressed-tensors")},
    }


def _without_name(described: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {key: value for key, value in described.items() if key != "dataset"} if described is not None else None


def _with_real_paths(value: Any, key: str = "") -> Any:
    """Return JSON types with the paths of this machine made absolute, and local teachers identified by their bytes."""
    if isinstance(value, Mapping):
        return {name: _with_real_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_real_paths(inner, key) for inner in value]
    if not isinstance(value, str) or "\0" in value or len(value) > 4096:
        return value
    if key == "teacher" and os.path.isdir(value):
        shards = sorted(Path(value).glob("*.safetensors"))
        return [os.path.realpath(value), *(work_files.digest_file(path, path.name) for path in shards)]
    is_path = key in PATH_FIELDS or (os.sep in value and os.path.exists(value))
    return os.path.realpath(value) if is_path else value


def hash_config(config: Any) -> str:
    """Return the SHA-256 of a configuration without its ``VOLATILE_CONFIG_KEYS``, at any depth."""
    return work_files.digest_json(_without_volatile(config.to_dict()))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_volatile(inner) for key, inner in value.items() if key not in VOLATILE_CONFIG_KEYS}
    return value


def hash_model(run: Run) -> str:
    """Return the SHA-256 of the configuration of ``run.model`` and of the bytes of its parameters and buffers."""
    digest = hashlib.sha256(hash_config(run.model.config).encode())
    seen: set[int] = set()
    for name, tensor in run.model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if id(tensor) in seen or tensor.is_meta or not tensor.numel():
            continue
        seen.add(id(tensor))
        digest.update(byte_view(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

"""Checkpoints of a training stage in the journal: a killed training resumes bit-exactly."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..calibration.block_journal import BlockJournal, run_identity
from ..errors import CheckpointError
from ..runs import work_files
from ..runs.disk_errors import readable_disk_errors
from ..runs.resume_header import is_begun, write_json
from ..runs.run import Run

log = logging.getLogger(__name__)

HEADER, PROGRESS = "training.json", "progress.json"
# Five checkpoints per training. Of the two that are kept, one is complete while the other is being written.
OFTEN: Mapping[str, Any] = {"save_strategy": "steps", "save_steps": 0.2}
FEW: Mapping[str, Any] = {"save_total_limit": 2}
# Weights and the two moments of Adam, in the two checkpoints that are kept and the one that is being written.
COPIES = 3 * 3


class TrainJournal:
    """The resume state of the current training stage, in a folder of the journal; it is removed with the journal.

    Args:
        journal: the journal of the run; one that does not resume has removed earlier content.
        run: a run whose stage waits for training.
    """

    def __init__(self, journal: BlockJournal, run: Run) -> None:
        self.home = journal.directory / f"training-{run.stage_index + 1}"
        self.run = run
        self._identity = ""

    @property
    def output_dir(self) -> Path:
        """The folder of the Trainer's checkpoints, unless the recipe names another."""
        return self.home / "trainer"

    def checkpoint_arguments(self, own_place: bool) -> dict[str, Any]:
        """Return default training arguments about checkpoints.

        ``own_place``: the recipe names an ``output_dir``; nothing there is removed.
        """
        needed = COPIES * sum(p.numel() * p.element_size() for p in self.run.model.parameters())
        self.home.mkdir(parents=True, exist_ok=True)
        if not own_place and shutil.disk_usage(self.home).free < needed:
            log.warning(
                "no room for training checkpoints next to the output: a killed training would start from the beginning"
            )
            return {"save_strategy": "no"}
        return {**OFTEN} if own_place else {**OFTEN, **FEW}

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """Return the checkpoint to resume from, or None to start.

        Args:
            rows: the training data.

        Raises ``CheckpointError`` if another training was begun here.
        """
        mine = {**run_identity(self.run), "training data": _digest(rows)}
        header = self.home / HEADER
        what = f"the training of {self.run.stage} in {self.home.parent.name} was begun with"
        self._identity = work_files.digest_json(mine)
        if is_begun(header, mine, what) and (found := self._last_complete()) is not None:
            return found
        # A kill during the first checkpoint leaves nothing to resume from.
        shutil.rmtree(self.home, ignore_errors=True)
        with readable_disk_errors(self.home, "the journal of the training"):
            self.home.mkdir(parents=True)
        write_json(header, mine)
        return None

    def callback(self) -> TrainerCallback:
        """Return a callback that records each complete checkpoint; add it after the callbacks that write into them."""
        return _CompletedCheckpointCallback(self.home / PROGRESS, self._identity)

    def _last_complete(self) -> str | None:
        """Return the last complete checkpoint; others in the folder may be partial, damaged, or of another training."""
        entries = _completed(self.home / PROGRESS, self._identity)
        while entries:
            folder = Path(entries[-1]["checkpoint"])
            if folder.is_dir() and _digest_folder(folder) == entries[-1]["sha256"]:
                self._remove_others([entry["checkpoint"] for entry in entries])
                return str(folder)
            log.warning("%s is missing or damaged: training does not resume from it", folder)
            entries.pop()
        return None

    def _remove_others(self, kept: list[str]) -> None:
        """Remove partial and damaged checkpoints of this journal, which the training would write into."""
        names = {os.path.realpath(folder) for folder in kept}
        for path in self.output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if os.path.realpath(path) not in names:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


class _CompletedCheckpointCallback(TrainerCallback):
    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not folder.is_dir():
            return
        entry = {"checkpoint": os.path.realpath(folder), "sha256": _digest_folder(folder)}
        before = [other for other in _completed(self.path, self.identity) if other["checkpoint"] != entry["checkpoint"]]
        checkpoints = [*before[-1:], entry]
        write_json(self.path, {"checkpoints": checkpoints, "sha256": _digest_progress(checkpoints, self.identity)})


def _completed(path: Path, identity: str) -> list[dict[str, str]]:
    """Return the completed checkpoints, the latest last; none if the file is missing, damaged or of another run."""
    if not path.is_file():
        return []
    try:
        found = work_files.read_json(path, "training starts from the beginning")
        if found.get("sha256") == _digest_progress(found.get("checkpoints"), identity):
            return found["checkpoints"]
    except CheckpointError as error:
        log.debug("%s", error)
    log.warning("%s is damaged or of another run: training starts from the beginning", path)
    return []


def _digest_progress(checkpoints: Any, identity: str) -> str:
    return work_files.digest_json({"identity": identity, "checkpoints": checkpoints})


def _digest_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return work_files.digest_json({str(path.relative_to(folder)): work_files.digest_file(path) for path in files})


def _digest(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = torch.as_tensor(row[key]).contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Checkpoints of a training stage beside the journal of blocks: a killed training goes on, with the same bits."""

from __future__ import annotations

import hashlib
import json
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
from ..runs.resume_header import is_begun, write_json
from ..runs.run import Run

log = logging.getLogger(__name__)

HEADER, PROGRESS = "training.json", "progress.json"
# Five checkpoints a training. Of two that are kept, one is whole while the other is being written.
OFTEN: Mapping[str, Any] = {"save_strategy": "steps", "save_steps": 0.2}
FEW: Mapping[str, Any] = {"save_total_limit": 2}
# Weights and the two moments of Adam, in the two checkpoints that are kept and the one that is being written.
COPIES = 3 * 3


class TrainJournal:
    """What is left of the training of the stage in work, in a folder of the journal's; it goes with the journal.

    Args:
        journal: the run's; one that does not resume has removed what was there.
        run: a run whose stage waits for training.
    """

    def __init__(self, journal: BlockJournal, run: Run) -> None:
        self.home = journal.directory / f"training-{run.stage_index + 1}"
        self.run = run

    @property
    def output_dir(self) -> Path:
        """Where the Trainer's checkpoints go, unless the recipe names another place."""
        return self.home / "trainer"

    def habits(self, own_place: bool) -> dict[str, Any]:
        """Arguments of the training about its checkpoints, unless the recipe has others.

        ``own_place``: the recipe names an ``output_dir``; nothing there is removed.
        """
        needed = COPIES * sum(p.numel() * p.element_size() for p in self.run.model.parameters())
        self.home.mkdir(parents=True, exist_ok=True)
        if not own_place and shutil.disk_usage(self.home).free < needed:
            log.warning("no room for checkpoints of the training beside the output: killed, it would begin anew")
            return {"save_strategy": "no"}
        return {**OFTEN} if own_place else {**OFTEN, **FEW}

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """The checkpoint to go on from; None to begin.

        Args:
            rows: what is trained on.

        Raises ``CheckpointError`` if another training was begun here.
        """
        mine = {**run_identity(self.run), "training data": _digest(rows)}
        header = self.home / HEADER
        what = f"the training of {self.run.stage} in {self.home.parent.name} was begun with"
        if is_begun(header, mine, what) and (found := self._whole()) is not None:
            return found
        # What a kill left of a checkpoint that it was the first to write is of no use.
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        write_json(header, mine)
        return None

    def keeper(self) -> TrainerCallback:
        """Notes each checkpoint that is whole; belongs behind the callbacks that write into checkpoints."""
        return _Keeper(self.home / PROGRESS)

    def _whole(self) -> str | None:
        """The last checkpoint that was finished. Others of the folder may be in pieces, or of another training."""
        progress = self.home / PROGRESS
        if not progress.is_file():
            return None
        folder = json.loads(progress.read_text(encoding="utf-8"))["checkpoint"]
        return folder if Path(folder).is_dir() else None


class _Keeper(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir():
            write_json(self.path, {"checkpoint": os.path.abspath(folder)})


def _digest(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            value = torch.as_tensor(row[key]).contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

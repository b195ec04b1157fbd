"""Doors for what a killed run leaves: journals, work folders, training checkpoints and locks.

A run that resumes gives the same weights as one that was not killed, or it is refused.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from ...runs import folder_lock
from .checkpoint_doors import WEIGHTS
from .door import Door, WrongResult
from .examples import Examples
from .killed_runs import KilledRuns
from .mutations import mutate_bytes, mutate_json, mutate_safetensors


@cache
def killed_runs(examples: Examples) -> KilledRuns:
    """Return the killed runs of these examples, made once."""
    return KilledRuns(examples)


def damage(folder: Path, random: Random) -> Path:
    """Mutate a file of a folder, or put something else in its place. Returns its path."""
    path = random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = random.random()
    if kind < 0.8:
        raw = path.read_bytes()
        json, tensors = path.suffix == ".json", path.suffix == ".safetensors"
        path.write_bytes((mutate_safetensors if tensors else mutate_json if json else mutate_bytes)(raw, random))
        return path
    path.unlink()
    if kind < 0.85:
        path.mkdir()
    elif kind < 0.9:
        os.mkfifo(path)
    elif kind < 0.95:
        path.symlink_to(random.choice(("nowhere", "/dev/zero", str(folder), path.name)))
    return path


def _require_same(ours: torch.Tensor, original: torch.Tensor) -> None:
    if not torch.equal(ours, original):
        raise WrongResult(f"a resumed run gave other weights: logits differ by {(ours - original).abs().max():.3g}")


def _blockwise(examples: Examples, home: Path, random: Random) -> None:
    runs = killed_runs(examples)
    journal, original = runs.journal
    shutil.copytree(journal, home / "journal")
    damage(home / "journal", random)
    _require_same(runs.resume(home / "journal", True), original)


def _streamed(examples: Examples, home: Path, random: Random) -> None:
    runs = killed_runs(examples)
    work, original = runs.streamed
    shutil.copytree(work, home / "work")
    damage(home / "work", random)
    _require_same(runs.stream(home / "work", home / "out", True), original)


def _training(examples: Examples, home: Path, random: Random) -> None:
    runs = killed_runs(examples)
    work, original = runs.new_training()
    damage(work, random)
    _require_same(runs.train(work, True), original)


def _checkpoint(examples: Examples, home: Path, random: Random) -> None:
    """A checkpoint of a Trainer, which may be a stranger's."""
    runs = killed_runs(examples)
    shutil.copytree(runs.checkpoint, home / "checkpoint-2")
    path = damage(home / "checkpoint-2", random)
    model = runs.train_from(home / "checkpoint-2", home / "out")
    if path.name != WEIGHTS:
        return
    stored = load_file(path)
    for name, parameter in model.named_parameters():
        if name not in stored or not torch.equal(stored[name], parameter):
            raise WrongResult(f"{name} is not what the checkpoint has")


def _lock(examples: Examples, home: Path, random: Random) -> None:
    path = home / ".out.lock"
    kind = random.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(random.choice(("nowhere", "/dev/full", ".")))
    else:
        path.write_bytes(mutate_json(b'{"process": 1, "host": "x", "since": "y"}', random))
    names: tuple[Any, ...] = ("out", "out", "out", "a/out", "\0", "x" * 300, "\n", "", ".", "/", "a/../out", "out/")
    with folder_lock.locked(os.path.join(home, random.choice(names))):
        pass


DOORS = (
    Door("journal", "blockwise", _blockwise),
    Door("journal", "streamed", _streamed),
    Door("journal", "training", _training),
    Door("journal", "checkpoint", _checkpoint),
    Door("journal", "lock", _lock),
)

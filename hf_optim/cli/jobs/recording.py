"""Write the figures of a comparison into the records and cards of the checkpoints that were compared.

The same figures as those of ``hf-optim compress --eval``, for checkpoints that were written otherwise: by a Trainer, or
by ``save_pretrained``. A record that is not that of the weights beside it gets none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import replace_directory, require_replaceable
from ...checkpoints.hub import commit_of
from ...checkpoints.source import ModelSource
from ...errors import CheckpointError
from ...evaluation.comparison import ACCELERATED, AFTER, BEFORE, CONTROL
from ...evaluation.reported import short_id
from ...evaluation.sizes import bytes_on_disk
from ...recipes.config import DataConfig
from ...runs.folder_lock import locked
from ...runs.record import FILE_NAME, Record, public_name
from ...runs.weight_digests import changed_weights, weight_digests, weight_stamps
from .comparing import Comparison
from .measuring import add_figures, may_have_kernels


@dataclass(frozen=True)
class Recordable:
    """A checkpoint whose record may get figures, as it was when measuring began."""

    home: Path
    record: Record
    stamps: Mapping[str, tuple[int, int, int]]


@contextlib.contextmanager
def recordable(models: Sequence[str], base: ModelSource) -> Iterator[dict[str, Recordable]]:
    """Lock the checkpoints, check that their records are those of their weights, and yield them by name.

    ``base`` is the original that they are compared with. Raises ``CheckpointError`` for a model without a record or
    from the middle of a recipe, for one that was made of another original, and if its weights are not those that its
    record was written with.
    """
    with contextlib.ExitStack() as locks:
        found = {}
        for model in models:
            if not os.path.isdir(model):
                raise CheckpointError(f"--record writes into checkpoints on disk: {model} is not a directory")
            locks.enter_context(locked(model))
            found[model] = _checked(Path(model), base)
        yield found


def with_kernels(job: Comparison, targets: Mapping[str, Recordable]) -> Comparison:
    """Return the comparison that also measures, on kernels, the targets that may run there."""
    able = (name for name, one in targets.items() if may_have_kernels(one.record, job.source_of(name).config))
    return replace(job, also_on_kernels=tuple(able))


def _checked(home: Path, base: ModelSource) -> Recordable:
    if not os.path.lexists(home / FILE_NAME):
        raise CheckpointError(
            f"{home} has no {FILE_NAME} that could get the figures: --record is for checkpoints that hf_optim wrote, "
            "as OptimTrainer.save_model and save_pretrained do"
        )
    record = Record.read(home)
    if not record.finished:
        raise CheckpointError(
            f"{home} was saved before its recipe was finished: save the model when training has ended, and record that"
        )
    _require_original(home, record, base)
    require_replaceable(home)
    stamps = weight_stamps(home)
    _require_own_weights(home, record)
    return Recordable(home, record, stamps)


def _require_original(home: Path, record: Record, base: ModelSource) -> None:
    stated, given = str(record.base_model.get("id") or ""), public_name(base.model)
    # A folder that was downloaded from the Hub has the last part of the id as its name.
    names = {stated, given} if "/" in stated and "/" in given else {short_id(stated), short_id(given)}
    if stated and len(names) > 1:
        raise CheckpointError(
            f"{home} was made from {stated}, and its card compares it with that, not with {given}: name {stated} "
            "first, or with --reference"
        )
    revision, own = record.base_model.get("revision"), commit_of(base.model, base.revision)
    if revision and own and revision != own:
        raise CheckpointError(
            f"{home} was made from {stated} at {revision}, and {given} is at {own}: pass --revision {revision}"
        )


def _require_own_weights(home: Path, record: Record) -> None:
    if record.weights:
        differing = changed_weights(home, record.weights)
    else:  # of a version that recorded only the size
        size = record.measured.get(AFTER, {}).get("bytes_on_disk")
        differing = [] if size == bytes_on_disk(home) else ["their bytes"]
    if differing:
        raise CheckpointError(
            f"the weights in {home} are not those that its {FILE_NAME} was written with ({', '.join(differing)}): the "
            "card would give their figures to the recipe. Save the model again with save_pretrained, which writes the "
            "record with the weights"
        )


def record_comparison(targets: Mapping[str, Recordable], found: Mapping[str, Any], data: DataConfig) -> list[str]:
    """Write a comparison (``comparing.compare_checkpoints``) into record and card of each target; return the folders.

    Each folder is replaced atomically, by one with the same weights. What was measured before is replaced; a control
    stays if it was measured on the same data. Raises ``CheckpointError`` if weights changed while they were measured.
    """
    from ...evaluation.cards.card import Card

    for name, target in targets.items():
        if weight_stamps(target.home) != target.stamps:
            raise CheckpointError(f"the weights in {name} changed while they were measured: compare it again")
    for name, target in targets.items():
        record, former = target.record, target.record.measured
        record.measured = {}
        figures = {
            BEFORE: found["models"][found["reference"]],
            # The models are loaded from their files to be compared, unlike that of a run that is still in memory.
            AFTER: {**found["models"][name], "compared_reloaded": True},
            ACCELERATED: found.get("accelerated", {}).get(name, {}),
            "timing": found["timing"],
        }
        add_figures(record, data, figures)
        if former.get(CONTROL) and former.get("evaluation") == record.measured["evaluation"]:
            record.measured[CONTROL] = former[CONTROL]
        record.weights = record.weights or weight_digests(target.home)
        with replace_directory(target.home, stale=lambda file: False) as beside:
            record.write(beside)
            Card(record, target.home).write(beside)
    return [str(target.home) for target in targets.values()]

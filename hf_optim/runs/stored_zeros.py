"""Zeros that an earlier recipe left in a model: found again by its record and by the tensors, and kept as masks.

A checkpoint has no masks. Its record (``Record.pruned``) says of which parameters how many weights were pruned, and
its tensors show which. Weights that are zero by chance are none of them: only recorded parameters are looked at, and
a parameter with fewer zeros than were recorded has been changed since.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, OptimError
from ..recipes.config import OptimConfig
from ..recipes.technique import Technique
from ..recipes.traits import SPARSE, SPARSE_NM, Trait
from ..toolkit.distributed import fsdp
from ..toolkit.modules.replace import find_submodule, names_in
from ..toolkit.pruning import masks
from ..toolkit.pruning.matrices import locate
from ..trust.lookup import Where
from .record import FILE_NAME, Record
from .run import Run, find_run

log = logging.getLogger(__name__)


@dataclass
class KnownZeros:
    """What is known of the zeros of a model before its run.

    Attributes:
        masks: parameter name -> mask, as ``Run.masks``.
        nm_patterns: as ``Run.nm_patterns``.
        pending: parameter name -> entry of ``Record.pruned``, of parameters that have no values yet: they are on the
            meta device, or stock transformers decodes them in the first forward.
        lost: names of parameters that have fewer zeros than were recorded.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    nm_patterns: dict[str, tuple[int, int]] = field(default_factory=dict)
    pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def traits(self) -> set[Trait]:
        """The traits that the zeros give the model."""
        return ({SPARSE} if self.masks or self.pending else set()) | ({SPARSE_NM} if self.nm_patterns else set())

    def give(self, run: Run) -> None:
        """Give a run the masks, patterns and traits; note on its record what is no longer zero."""
        run.masks.update(self.masks)
        run.nm_patterns.update(self.nm_patterns)
        run.pending_zeros = dict(self.pending)
        run.traits |= self.traits
        if self.lost:
            _note_lost(run, self.lost)


def describe_masks(run: Run) -> dict[str, dict[str, Any]]:
    """Return what ``Record.pruned`` says of the masks of a run."""
    found: dict[str, dict[str, Any]] = dict(run.pending_zeros)
    for name, mask in run.masks.items():
        found[name] = {"weights": mask.numel(), "zeros": mask.numel() - int(mask.count_nonzero())}
        if name in run.nm_patterns:
            found[name]["pattern"] = list(run.nm_patterns[name])
    return found


def known_zeros(model: nn.Module, where: Where | None = None) -> KnownZeros:
    """Return the zeros of a model that an earlier run has pruned: one that it still has, or that of its checkpoint.

    Args:
        model: the model; its weights may be on the meta device.
        where: where its checkpoint is; None for the one that its configuration names, if it is on this machine.
    """
    if (run := find_run(model)) is not None:
        return KnownZeros(dict(run.masks), dict(run.nm_patterns), dict(run.pending_zeros))
    record = _record_at(_place_of(model) if where is None else where)
    found = KnownZeros()
    if record is None or not (entries := _recorded(record, model)):
        return found
    for name, entry in entries.items():
        weight = _values(model, name)
        if weight is None:
            found.pending[name] = entry
        elif (mask := _mask(model, name, weight, entry)) is not None:
            found.masks[name] = mask
        else:
            found.lost.append(name)
            continue
        if (pattern := entry.get("pattern")) is not None:
            found.nm_patterns[name] = (pattern[0], pattern[1])
    return found


def find_pending(run: Run, inside: str = "") -> None:
    """Make the masks of parameters named ``inside...`` whose values have been read or decoded since the run began."""
    lost = []
    for name in [name for name in run.pending_zeros if name.startswith(inside)]:
        if (weight := _values(run.model, name)) is None:
            continue
        if (mask := _mask(run.model, name, weight, run.pending_zeros.pop(name))) is not None:
            run.masks[name] = mask
        else:
            run.nm_patterns.pop(name, None)
            lost.append(name)
    if lost:
        _note_lost(run, lost)


def _place_of(model: Any) -> Where:
    """Return where the checkpoint of a model in memory is; on the Hub, its cached files of the commit that was read."""
    config = getattr(model, "config", None)
    commit = getattr(config, "_commit_hash", None)
    return Where(str(getattr(config, "_name_or_path", "") or ""), "", {"revision": commit, "local_files_only": True})


def _record_at(where: Where) -> Record | None:
    """Return the record beside the weights of a checkpoint, if there is one that can be read."""
    if not where.source or os.path.isfile(where.source):
        return None
    try:
        path = where.find(FILE_NAME)
    except CheckpointError:  # not on this machine, or no checkpoint: there is nothing to find zeros by
        return None
    try:
        return Record.read(path.parent) if path is not None else None
    except CheckpointError as error:
        log.warning("%s; if an earlier recipe pruned its weights, further steps do not know of their zeros", error)
        return None


def _recorded(record: Record, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entries of ``Record.pruned`` by the names that the parameters have in this model."""
    entries = record.pruned or _counted(record)
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        for other in names_in(model, name):
            if entry["zeros"] and (own := _parameter_name(model, other)) is not None:
                former = found.get(own, {"zeros": 0})
                found[own] = {**entry, "zeros": entry["zeros"] + former["zeros"]}
                break
    return found


def _counted(record: Record) -> dict[str, dict[str, Any]]:
    """Return the entries of a record of an earlier version, which has zeros of layers among the metrics of steps."""
    found: dict[str, dict[str, Any]] = {}
    if str(SPARSE) not in record.traits:
        return found
    try:
        steps: tuple[Technique, ...] = OptimConfig.parse(record.recipe).steps
    except OptimError:  # a technique that is not installed
        steps = ()
    for number, metrics in record.steps.items():
        step = steps[int(number)] if int(number) < len(steps) else None
        pattern = [getattr(step, "keep", None), getattr(step, "group", None)]
        counted = metrics.get("counted")
        for layer, counts in counted.items() if isinstance(counted, Mapping) else ():
            if not (isinstance(counts, list) and len(counts) == 2 and all(type(count) is int for count in counts)):
                continue
            found[layer] = {"weights": counts[0], "zeros": counts[1]}
            if step is not None and SPARSE_NM in step.contract().adds and all(type(size) is int for size in pattern):
                found[layer]["pattern"] = pattern
    return found


def _parameter_name(model: nn.Module, name: str) -> str | None:
    """Return the parameter of a name in a record: of a parameter, a layer or a matrix of an expert; None without one.

    A layer that holds codes has no parameter, and the name that it would have.
    """
    for candidate in (name, f"{name}.weight"):
        try:
            return locate(model, candidate)[0]
        except AttributeError:
            owner, _, own = candidate.rpartition(".")
            if own == "weight" and _coded(find_submodule(model, owner)):
                return candidate
    return None


def _coded(module: nn.Module | None) -> bool:
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[union-attr, assignment]
    attributes = ("decoded", "quantization_scheme", "holds_codes")
    return any(getattr(module, attribute, None) for attribute in attributes)


def _values(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the values of a weight, decoded if it is on a kernel; None as long as it has none."""
    owner, _, own = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    while own not in module._parameters and hasattr(module, "base_layer"):  # inside of adapters
        module = module.base_layer
    parameter = module._parameters.get(own)
    if getattr(getattr(module, "quantization_status", None), "value", None) == "compressed":
        return None
    if parameter is None:
        return module.decoded() if own == "weight" and hasattr(module, "decoded") else None
    return None if parameter.is_meta else fsdp.full_tensor(parameter.detach())


def _mask(model: nn.Module, name: str, weight: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the mask of a weight, or None if it has not the zeros that were recorded."""
    mask = weight != 0
    if mask.numel() - int(mask.count_nonzero()) < entry["zeros"]:
        return None
    pattern = entry.get("pattern")
    if pattern is not None and not masks.mask_has_nm_pattern(model, name, mask, *pattern):
        return None
    return mask


def _note_lost(run: Run, names: list[str]) -> None:
    few = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    sentence = f"An earlier recipe pruned {few}, which no longer has those zeros: nothing keeps what is left of them."
    # The streamed driver keeps the masks of completed blocks on disk.
    if not run.masks and not run.pending_zeros and run.recipe.driver != "streamed":
        run.traits -= {SPARSE}
    if not run.nm_patterns:
        run.traits -= {SPARSE_NM}
    run.record.note(sentence)
    log.warning(sentence)

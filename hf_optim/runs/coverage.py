"""How much of the model a step worked on: recorded and logged, so partial coverage is always visible."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..toolkit import topology
from ..toolkit.pruning import sparsity
from ..toolkit.topology.experts import expert_linears

if TYPE_CHECKING:
    from ..recipes.technique import Technique
    from .run import Run

log = logging.getLogger(__name__)


def note_left_alone(run: Run, steps: Iterable[Technique]) -> None:
    """Keep which layers each step leaves alone because of their role, by role: before it changes the model.

    Roles are found on the model as the step receives it; a model whose layers were replaced may not show them.
    """
    for step in steps:
        targets, skip = getattr(step, "targets", ()), getattr(step, "skip", ())
        if isinstance(targets, tuple) and isinstance(skip, tuple):
            found = topology.left_alone(run.model, targets, skip)
            run.left_alone[run.index(step)] = {role: set(names) for role, names in found.items()}


def record_coverage(run: Run, steps: Iterable[Technique]) -> None:
    """Put the coverage of each step that reported one (``Run.cover``) on the record, and log it."""
    for step in steps:
        if (covered := run.covered(step)) is not None:
            _record(run, step, *covered)


def recount_zeros(run: Run) -> None:
    """Count the zeros that steps have reported (``counted``) again, if a later step renamed, copied or removed layers.

    Record and card then describe the layers of the model that is saved. All ranks must call this.
    """
    for step in run.recipe.steps:
        entry, names = run.reported(step), (run.covered(step) or (set(), {}))[0]
        if "counted" not in entry or set(entry["counted"]) == names:
            continue
        # Layers that hold codes have no weight to count; their record stays that of their stage.
        views = expert_linears(run.model)
        if all(name in views or _has_weight(run.model, name) for name in names):
            entry.update(sparsity.metrics(run.model, names))


def _has_weight(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return isinstance(module._parameters.get("weight"), nn.Parameter) and not getattr(module, "holds_codes", False)


def _record(run: Run, step: Technique, names: set[str], skipped: dict[str, set[str]]) -> None:
    coverage = topology.coverage(run.model, names)
    total = coverage.total - _scales(run.model)
    share = coverage.covered / total if total else 0.0
    alone = {role: left - names for role, left in run.left_alone.get(run.index(step), {}).items() if left - names}
    run.record.coverage[run.label(step)] = {
        "weights_touched": coverage.covered,
        "weights_total": total,
        "share": round(share, 6),
        "skipped": {reason: sorted(left_out) for reason, left_out in sorted({**alone, **skipped}.items())},
    }
    log.info("%s: %d of %d weights (%.1f %%)", run.label(step), coverage.covered, total, 100 * share)
    for role, layers in sorted(alone.items()):
        first = ", ".join(sorted(layers)[:5])
        log.info("%s leaves %d modules alone (%s): %s", run.label(step), len(layers), role, first)
    for reason, left_out in sorted(skipped.items()):
        first = ", ".join(sorted(left_out)[:5])
        log.warning("%s skipped %d modules (%s): %s", run.label(step), len(left_out), reason, first)


def _scales(model: nn.Module) -> int:
    """Count scales and zero points, which quantization adds as parameters but which are not weights."""
    quantized = (module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None)
    return sum(
        parameter.numel()
        for module in quantized
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith(("_scale", "_zero_point"))
    )

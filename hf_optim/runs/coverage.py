"""How much of the model a step worked on: recorded and logged, so partial coverage is always visible."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelError
from ..toolkit import topology
from ..toolkit.pruning import sparsity
from ..toolkit.quantization import adjusted_message, stored_bits
from ..toolkit.quantization.grids import fit_group_size
from ..toolkit.quantization.group_fit import LARGE
from ..toolkit.topology.experts import expert_linears
from ..toolkit.topology.selection import PatternError
from ..trust.text import one_line

if TYPE_CHECKING:
    from ..recipes.technique import Technique
    from .run import Run

log = logging.getLogger(__name__)

NO_TARGETS = "this step does not change it"
TOWERS = (topology.Role.VISION_TOWER, topology.Role.AUDIO_TOWER)


def note_left_alone(run: Run, steps: Iterable[Technique]) -> None:
    """Keep the roles of the layers as each step finds them, before it changes the model; check its patterns first.

    A model whose layers were replaced may not show their roles. Raises ``ModelError`` for a pattern of ``targets`` or
    ``skip`` that matches nothing, or has no effect.
    """
    for step in steps:
        require_effective(step, run.model, run.label(step))
        number = run.index(step)
        run.roles[number] = {name: str(role) for name, role in topology.roles(run.model).items()}
        if (patterns := patterns_of(step)) is not None:
            found = topology.left_alone(run.model, *patterns)
            run.left_alone[number] = {role: set(names) for role, names in found.items()}


def patterns_of(step: Technique) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the ``targets`` and ``skip`` of a step; None if it has no targets."""
    targets, skip = getattr(step, "targets", None), getattr(step, "skip", ())
    if not isinstance(targets, tuple) or not isinstance(skip, tuple):
        return None
    return targets, skip


def require_effective(step: Technique, model: nn.Module, label: str) -> None:
    """Raise ``ModelError`` for a pattern of a step that matches nothing in a model, or has no effect on it.

    Args:
        step: the step.
        model: the model as the step finds it; its weights are not read.
        label: the beginning of the message.
    """
    patterns = patterns_of(step)
    if patterns is None:
        return
    kind = type(model).__name__
    try:
        why = topology.ineffective_pattern(model, *patterns, step.takes)
    except PatternError as error:
        raise ModelError(f"{label}: {error} in {kind}") from error
    if why:
        raise ModelError(f"{label}: in {kind}, {why}")


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
    label, number = run.label(step), run.index(step)
    coverage = topology.coverage(run.model, names)
    share = coverage.covered / coverage.total if coverage.total else 0.0
    alone = {role: left - names for role, left in run.left_alone.get(number, {}).items() if left - names}
    rest = topology.weights_left_alone(run.model, names, run.roles.get(number), skipped)
    has_targets = patterns_of(step) is not None
    run.record.coverage[label] = {
        "weights_touched": coverage.covered,
        "weights_total": coverage.total,
        "share": round(share, 6),
        "skipped": {reason: sorted(left_out) for reason, left_out in sorted({**alone, **skipped}.items())},
        "left_alone": {
            role: {
                "reason": part.reason if has_targets or part.is_own_reason else NO_TARGETS,
                "names": sorted(part.names),
                "weights": part.weights,
            }
            for role, part in rest.items()
        },
    }
    _note_groups(run, step, names, run.record.coverage[label])
    log.info("%s: %s of %s weights (%.1f %%)", label, f"{coverage.covered:,}", f"{coverage.total:,}", 100 * share)
    for role, line in left_alone_lines(run.record.coverage[label]).items():
        # The class name Linear does not say that half of a model stays as it is; who named the rest knows.
        log.log(logging.WARNING if role in alone and role in TOWERS else logging.INFO, "%s: %s", label, line)
    for reason, left_out in sorted(skipped.items()):
        log.warning("%s skipped %s (%s): %s", label, _modules(left_out), reason, ", ".join(sorted(left_out)[:5]))


def _note_groups(run: Run, step: Technique, names: set[str], entry: dict[str, Any]) -> None:
    """Put the layers whose groups are not of the size that was asked for on the record, with the bits of a weight."""
    asked = getattr(step, "group_size", None)
    if not isinstance(asked, int):
        return
    found: dict[tuple[int, int, int, float], list[str]] = {}
    modules = dict(run.model.named_modules())
    for name in sorted(names):
        module: Any = modules.get(name)
        weights: Any = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        size, width = getattr(weights, "group_size", None), getattr(module, "in_features", None)
        scale = getattr(module, "weight_scale", None)
        if getattr(weights, "type", None) == "float":
            continue  # groups of a format, not of the step
        # A step that stores no codes may have groups of its own, other than those that a later step stores.
        if size and width and scale is not None and size == fit_group_size(width, asked) != min(asked, width):
            packed = str(getattr(module.quantization_scheme.format, "value", module.quantization_scheme.format))
            stored = stored_bits(
                weights.num_bits,
                width,
                size,
                8 * scale.element_size(),
                packed=packed == "pack-quantized",
                zero_point=not weights.symmetric,
            )
            found.setdefault((width, size, weights.num_bits, round(stored, 3)), []).append(name)
    if not found:
        return
    entry["groups"] = [
        {"layers": layers, "inputs": width, "group_size": size, "bits_per_weight": stored}
        for (width, size, _, stored), layers in sorted(found.items())
    ]
    for (width, size, bits, stored), layers in sorted(found.items()):
        sentence = f"{run.label(step)}: {adjusted_message(layers, width, size, asked, bits, stored)}"
        run.record.note(sentence)
        log.log(logging.WARNING if stored > LARGE >= 2 * bits else logging.INFO, "%s", sentence)


def left_alone_lines(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each role of an entry of ``Record.coverage``: weights, share, names, and why; printable."""
    total = entry["weights_total"] or 1
    lines = {}
    for role, part in entry.get("left_alone", {}).items():
        names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", one_line(name)) for name in part["names"]))
        few = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        size = f"{part['weights']:,} weights ({100 * part['weights'] / total:.1f} %)"
        lines[role] = f"left alone: {one_line(role)}, {size}: {few} ({one_line(part['reason'])})"
    return lines


def _modules(names: Collection[str]) -> str:
    return f"{len(names)} {'module' if len(names) == 1 else 'modules'}"

"""Run the calibration generator of a step over a scope, and check what it covered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..errors import ModelError, NumericalError, RecipeError
from ..recipes.technique import Technique
from ..recipes.traits import QUANTIZED, SPARSE
from ..runs.acceptance import require_finite
from ..runs.coverage import patterns_of
from ..runs.run import Run
from ..runs.scope import Scope
from .forward import Batch

NONE_SELECTED = "its skip leaves out every layer that its targets select"


def run_calibration(run: Run, step: Technique, scope: Scope, run_batches: Callable[[Technique], None]) -> None:
    """Run the ``calibrate`` generator of one step over one scope, and close it whatever happens.

    Args:
        run: the run of the step.
        step: the step to calibrate.
        scope: the part of the model that the step may modify.
        run_batches: runs the scope on all calibration batches; called at each ``yield``.

    Raises ``NumericalError`` naming the step if the step raises one, or leaves weights that are not finite, and
    ``RecipeError`` for a step that needs data but never asks for a pass over it.
    """
    generators = run.call_on([step], "calibrate", scope=scope)
    # Without a ``yield`` the hook is an ordinary function, which has run before any batch.
    if not generators and step.needs_data():
        raise RecipeError(
            f"{run.label(step)}: its hook calibrate is not a generator, so it sees no calibration batch: `yield` once "
            "for each pass over the data, or let needs_data() return False"
        )
    for generator in generators:
        if not isinstance(generator, Generator):
            raise RecipeError(
                f"{run.label(step)}: its hook calibrate returned a {type(generator).__name__}; it must be a generator "
                "(`yield` once for each pass over the data) or return nothing"
            )
        try:
            for _ in generator:
                run_batches(step)
        except NumericalError as error:
            if run.label(step) in str(error):
                raise
            raise NumericalError(f"{run.label(step)}: {error}") from error
        finally:
            generator.close()
    require_finite(scope.module, scope.name, run.label(step))


def batches_for(run: Run, step: Technique) -> Sequence[Batch]:
    """Return the calibration batches of the run; none for a step that needs no data."""
    return run.data.batches if run.data is not None and step.needs_data() else ()


def labels_for(run: Run, number: int) -> torch.Tensor | None:
    """Return the labels of a calibration batch, which are not among its inputs; None if it has none."""
    labels = getattr(run.data, "labels", ())
    return labels[number] if number < len(labels) else None


def any_needs_data(steps: Sequence[Technique]) -> bool:
    """Return True if any of the steps needs calibration data."""
    return any(step.needs_data() for step in steps)


def selects_in(step: Technique, scope: Scope) -> bool:
    """Return True if the targets of a step select a layer of a scope that lies outside the blocks."""
    patterns = patterns_of(step)
    if patterns is None:
        return False
    tables = step.takes(nn.Embedding(1, 1, device="meta"))
    return bool(scope.select(*patterns, experts=True, embeddings=tables))


def name_of_work(steps: Sequence[Technique]) -> str:
    """Return what calibrating these steps does, in one word; one that reads no data calibrates nothing."""
    if any_needs_data(steps):
        return "calibrating"
    added = {trait for step in steps for trait in step.contract().adds}
    if QUANTIZED in added:
        return "quantizing"
    return "pruning" if SPARSE in added else "transforming"


def require_covered(run: Run, step: Technique) -> None:
    """Raise ``ModelError``, with the reasons, if a step that reports its coverage modified no module."""
    coverage = run.covered(step)
    if coverage is None or coverage[0]:
        return
    left = {**run.left_alone.get(run.index(step), {}), **coverage[1]}
    raise ModelError(no_layer(run.label(step), type(run.model).__name__, left))


def no_layer(label: str, kind: str, skipped: Mapping[str, Iterable[str]]) -> str:
    """Return the message for a step that can change no layer.

    Args:
        label: of the step.
        kind: the class of the model.
        skipped: reason -> names of layers that the step had to leave out for it.
    """
    parts = [f"{_join_names(names)} ({reason})" for reason, names in sorted(skipped.items())]
    return f"{label} has no layer to change in {kind}: {'; '.join(parts) or NONE_SELECTED}"


def _join_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")

"""Run a step's calibration generator over a scope."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import ModelError, NumericalError
from ..recipes.technique import Technique
from ..runs.run import Run
from ..runs.scope import Scope
from .forward import Batch


def run_calibration(run: Run, step: Technique, scope: Scope, feed: Callable[[Technique], None]) -> None:
    """Run one step's generator over one scope, feeding batches at each yield; close it whatever happens."""
    for generator in run.call_on([step], "calibrate", scope=scope):
        try:
            for _ in generator:
                feed(step)
        except NumericalError as error:
            if run.label(step) in str(error):
                raise
            raise NumericalError(f"{run.label(step)}: {error}") from error
        finally:
            generator.close()


def batches_for(run: Run, step: Technique) -> Sequence[Batch]:
    return run.data.batches if run.data is not None and step.needs_data() else ()


def any_needs_data(steps: Sequence[Technique]) -> bool:
    return any(step.needs_data() for step in steps)


def exact_targets(step: Technique, scope: Scope) -> tuple[str, ...]:
    """The targets of a step that are exact names of linears in the scope."""
    return tuple(target for target in getattr(step, "targets", ()) if target in scope.linears)


def require_covered(run: Run, step: Technique) -> None:
    touched = run.covered(step)
    if touched is None or touched[0]:
        return
    why = "; ".join(f"{reason}: {_few(names)}" for reason, names in sorted(touched[1].items()))
    raise ModelError(
        f"{run.label(step)} found nothing to work on in {type(run.model).__name__}. {why or 'No module matched'}"
    )


def _few(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")

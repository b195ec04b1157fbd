"""How much of the model a step worked on: recorded, and told, never silently less than all."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .toolkit import topology

if TYPE_CHECKING:
    from .run import Run
    from .techniques import Technique

log = logging.getLogger(__name__)


def record_coverage(run: Run, steps: Iterable[Technique]) -> None:
    """Put the coverage of each step that reported one (``Run.touch``) on the record, and log it."""
    for step in steps:
        if (touched := run.touched(step)) is not None:
            _record(run, step, *touched)


def _record(run: Run, step: Technique, names: set[str], skipped: dict[str, set[str]]) -> None:
    coverage = topology.coverage(run.model, names)
    share = coverage.touched / coverage.total if coverage.total else 0.0
    run.record.coverage[run.label(step)] = {
        "weights_touched": coverage.touched,
        "weights_total": coverage.total,
        "share": round(share, 6),
        "skipped": {reason: sorted(left_out) for reason, left_out in sorted(skipped.items())},
    }
    log.info("%s: %d of %d weights (%.1f %%)", run.label(step), coverage.touched, coverage.total, 100 * share)
    for reason, left_out in sorted(skipped.items()):
        first = ", ".join(sorted(left_out)[:5])
        log.warning("%s skipped %d modules (%s): %s", run.label(step), len(left_out), reason, first)

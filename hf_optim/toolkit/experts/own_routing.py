"""Mixtures whose code is saved with the checkpoint, and what of a capacity means nothing to them.

Their class may define ``capacity_problem(priority)``, which returns why a capacity with this priority (one of
``routing.PRIORITIES``) does not apply to it, or ``""``: it has one of its own, or gates that are all the same.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import ModelError, printable
from .routing import Routing


def require_limitable(model: PreTrainedModel, routing: Routing, label: str) -> None:
    """Raise ``ModelError`` for a mixture with code of its own to which these settings do not apply."""
    problem = getattr(model, "capacity_problem", None)
    if callable(problem) and (why := problem(routing.priority)):
        raise ModelError(f"{label}: {type(model).__name__} {printable(str(why), 300)}")

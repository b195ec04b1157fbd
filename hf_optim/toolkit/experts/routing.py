"""The settings of a capacity, and how a checkpoint stores them.

Stock classes cannot express a capacity, so it is stored in the model's configuration, where stock transformers
preserves it from load to save without reading it::

    "hf_optim": {"routing": {"capacity": 0.5, "priority": "top1", ...}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...trust.bounds import shown
from .capacity import ROUNDINGS
from .stored import store, stored

KEY = "routing"
PRIORITIES = ("position", "top1", "sum")
GROUPS = ("batch", "sequence")
LARGEST_FACTOR = 1e4


@dataclass(frozen=True)
class Routing:
    """How tokens compete for the slots of experts.

    Attributes:
        capacity: the capacity factor C.
        train_capacity: that of training; None takes ``capacity``.
        rounding: one of ``ROUNDINGS``.
        priority: who gets slots first: ``position``, or the largest gate (``top1``) or sum of gates (``sum``).
        group: tokens compete within the batch, or within their sequence.
        renormalize: scale the gates that are left to the sum before.
        min_slots: the least capacity.
        dropless_below: groups with fewer tokens drop nothing.
    """

    capacity: float
    train_capacity: float | None = None
    rounding: str = "round"
    priority: str = "position"
    group: str = "batch"
    renormalize: bool = False
    min_slots: int = 1
    dropless_below: int = 0

    def __post_init__(self) -> None:
        for key in ("capacity", "train_capacity"):
            value = getattr(self, key)
            if value is None and key == "train_capacity":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, not {shown(value)}")
            if not 0 < value <= LARGEST_FACTOR:
                raise ValueError(f"{key} must be above 0 and at most {LARGEST_FACTOR:g}, not {shown(value)}")
        for key, known in (("rounding", ROUNDINGS), ("priority", PRIORITIES), ("group", GROUPS)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, not {shown(getattr(self, key))}")
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize must be true or false, not {shown(self.renormalize)}")
        for key, low in (("min_slots", 1), ("dropless_below", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise ValueError(f"{key} must be an integer from {low} to 2^31 - 1, not {shown(value)}")

    def factor(self, training: bool) -> float:
        """Return the capacity factor of this mode."""
        return self.train_capacity if training and self.train_capacity is not None else self.capacity


def store_routing(config: Any, routing: Routing | None) -> None:
    """Write settings into a configuration; None removes them."""
    store(config, KEY, routing)


def stored_routing(config: Any) -> Routing | None:
    """Return the settings in a configuration, or None. Raises ``CheckpointError`` if they are malformed."""
    return stored(config, KEY, Routing, needed="capacity")

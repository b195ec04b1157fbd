"""How experts that are spread over ranks get their tokens: the setting of a model, which its configuration stores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...trust.bounds import shown
from ..distributed.grid import LARGEST_GROUP, ORDERS
from .stored import store, stored

KEY = "exchange"
HIERARCHICAL, ADAPTIVE = "hierarchical", "adaptive"
LONGEST_TIMEOUT = 86400.0


@dataclass(frozen=True)
class Exchange:
    """How tokens and experts of different ranks meet.

    Attributes:
        kind: ``hierarchical``, one way of exchanging; ``adaptive``, the fastest of several, as measured.
        order: of ``hierarchical``: one of ``ORDERS``.
        ranks_per_node: None takes what the environment states.
        timeout: seconds that a rank of a sub-group waits for the others; None takes the default of the backend.
        parallelism: of ``adaptive``: ``auto``, or only ``exchange`` (tokens go to experts) or ``gather`` (weights of
            experts come to tokens).
        degrees: of ``adaptive``: numbers of chunks in which tokens are exchanged and computed.
        trials: of ``adaptive``: how often each choice is timed, after one call that is not.
    """

    kind: str = HIERARCHICAL
    order: str = "intra_first"
    ranks_per_node: int | None = None
    timeout: float | None = None
    parallelism: str = "auto"
    degrees: tuple[int, ...] = (1, 2, 4)
    trials: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.degrees, list):
            object.__setattr__(self, "degrees", tuple(self.degrees))
        for key, known in (
            ("kind", (HIERARCHICAL, ADAPTIVE)),
            ("order", ORDERS),
            ("parallelism", ("auto", "exchange", "gather")),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, not {shown(getattr(self, key))}")
        _require_integer("ranks_per_node", self.ranks_per_node, LARGEST_GROUP, optional=True)
        _require_integer("trials", self.trials, 100)
        if not isinstance(self.degrees, tuple) or not 1 <= len(self.degrees) <= 8:
            raise ValueError(f"degrees must be a list of 1 to 8 numbers, not {shown(self.degrees)}")
        for degree in self.degrees:
            _require_integer("a degree", degree, 64)
        if len(set(self.degrees)) < len(self.degrees):
            raise ValueError(f"degrees must differ, not {shown(self.degrees)}")
        if self.timeout is not None and (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, (int, float))
            or not math.isfinite(self.timeout)
            or not 0 < self.timeout <= LONGEST_TIMEOUT
        ):
            raise ValueError(f"timeout must be above 0 and at most {LONGEST_TIMEOUT:g} s, not {shown(self.timeout)}")


def _require_integer(name: str, value: Any, high: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ValueError(f"{name} must be an integer from 1 to {high}, not {shown(value)}")


def store_exchange(config: Any, exchange: Exchange | None) -> None:
    """Write the setting into a configuration; None removes it."""
    store(config, KEY, exchange)


def stored_exchange(config: Any) -> Exchange | None:
    """Return the setting in a configuration, or None. Raises ``CheckpointError`` if it is malformed."""
    return stored(config, KEY, Exchange, needed="kind")

"""Time the configurations of a product on a CUDA device: each is compared with float64 first.

The folder of an operator has in its module ``bench`` a function ``tunables(N, K, dtype) -> list[Tunable]``, one for
each kind of weight that has its own entries in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .benchmark import device, graph_time, relative_error

Config = dict[str, Any]
# A weight that is scaled in 16 bits is rounded by 2^-9, and so is the output.
LARGEST_ERROR = 5e-3
REPLAYS = 11


@dataclass(frozen=True, eq=False)
class Tunable:
    """A layer whose product can be configured.

    Attributes:
        op: the name of its entries in tables.
        shape: what precedes the rows in the key of an entry.
        dtype: of inputs.
        inputs: rows -> random inputs [rows, in].
        calls: ``x, config`` -> the product on copies of the weight, together larger than the L2 cache.
        candidates: rows (a bucket) -> configurations worth timing, the default first.
        reference: ``x`` -> the output in float64.
        any_rows: the entry is that of all numbers of rows; it is tuned with the most.
        entry: rows -> what stands for them in the key of an entry, where it is not their bucket.
        largest_error: relative to the reference, of a configuration that is right.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[int], Tensor]
    calls: Callable[[Tensor, Config], list[Callable[[], Tensor]]]
    candidates: Callable[[int], list[Config]]
    reference: Callable[[Tensor], Tensor]
    any_rows: bool = False
    entry: Callable[[int], int] = tuning.bucket
    largest_error: float = LARGEST_ERROR

    def tune(self, rows: int) -> str:
        """Measure the candidates, remember the fastest, and return a line about it."""
        if device().type != "cuda":
            return f"{self.op}: nothing to tune without a CUDA device"
        if not self.candidates(tuning.bucket(rows)):
            return f"{self.op}: nothing to choose with {rows} rows"
        times = [(us, config) for config, us in measure(self, rows) if not isinstance(us, str)]
        if not times:
            return f"{self.op}: no configuration ran"
        best, config = min(times, key=lambda pair: pair[0])
        tuning.remember(self.op, (*self.shape, 1 if self.any_rows else self.entry(rows)), self.dtype, config, device())
        return f"{self.op}: {best:.1f} us with {config}, {times[0][0]:.1f} with the first candidate"


def with_config(op: str, config: Config, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call that runs with a configuration of ``op``, of a kernel that asks ``tuning.choose`` for it."""

    def run() -> Tensor:
        with tuning.forced(op, config):
            return call()

    return run


def variations(default: Config, **values: Any) -> list[Config]:
    """Return a configuration, and those that differ from it in one of the named values, each among ``values``."""
    others = [{**default, name: value} for name, each in values.items() for value in each if value != default[name]]
    return [default, *others]


def measure(tunable: Tunable, rows: int, tried: list[Config] | None = None) -> Iterator[tuple[Config, float | str]]:
    """Yield configurations with their microseconds, or with what is wrong with them."""
    x = tunable.inputs(rows)
    wanted = tunable.reference(x)
    for config in tunable.candidates(tuning.bucket(rows)) if tried is None else tried:
        try:
            calls = tunable.calls(x, config)
            # The caching allocator hands this block to the output next.
            torch.full(wanted.shape, float("nan"), dtype=tunable.dtype, device=x.device)
            y = calls[0]()
            error, again = relative_error(y, wanted), torch.equal(calls[0](), y)
            if not error < tunable.largest_error or not again:
                how = "the same" if again else "another"
                yield config, f"wrong: relative error {error:.1e}, {how} result when repeated"
            else:
                yield config, graph_time(calls, REPLAYS).us
        except Exception as error:  # a configuration may not fit the card, in any of Triton's ways
            yield config, f"{type(error).__name__}: {str(error)[:120]}"

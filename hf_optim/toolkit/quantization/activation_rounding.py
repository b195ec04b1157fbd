"""Rounding of module inputs, and the sensitivity of a model's output to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..statistics.sensitivity import OutputComparison
from ..topology.graph import Trace

Rounding = Callable[[Tensor], Tensor]


def group_by_input(trace: Trace, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group the modules that read the same tensor (query, key and value; gate and up): first name -> all names.

    The order is that of ``names``. A module that the traced forward did not reach forms its own group.
    """
    together: dict[object, list[str]] = {}
    for name in names:
        reads = tuple(call.reads[:1] for call in trace.calls_of(name))
        together.setdefault(reads or name, []).append(name)
    return {members[0]: tuple(members) for members in together.values()}


@contextmanager
def rounded_inputs(roundings: Mapping[nn.Module, Rounding]) -> Iterator[None]:
    """Round the first positional argument of the modules for the length of a ``with`` block."""

    def hook(rounding: Rounding) -> Any:
        return lambda module, args: (rounding(args[0]), *args[1:])

    handles = [module.register_forward_pre_hook(hook(rounding)) for module, rounding in roundings.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RoundingSensitivity(OutputComparison[Mapping[nn.Module, Rounding]]):
    """Measures how much a model's output changes if inputs of its modules are rounded, as the mean over batches.

    ``cases`` maps a name to the modules whose inputs are rounded, each with its rounding function.
    """

    def _accumulate(self, before: float, divergence: float) -> float:
        return before + (divergence - before) / self.batches

    def _changed_output(self, case: Mapping[nn.Module, Rounding], args: Any, kwargs: Any) -> Any:
        with rounded_inputs(case):
            return self.module(*args, **kwargs)

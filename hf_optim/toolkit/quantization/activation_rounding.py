"""Rounding of module inputs, and the sensitivity of a model's output to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..statistics.sensitivity import output_divergence
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


class RoundingSensitivity:
    """Context manager that measures how much the output of a model changes if inputs of its modules are rounded.

    While batches pass through ``module``, each forward is repeated once per case with the inputs of that case rounded,
    and the outputs are compared (``sensitivity.divergence``). ``with`` binds a dictionary from case to the mean over
    batches.

    Args:
        module: the model that batches pass through.
        cases: name -> (module whose input is rounded -> rounding function).
    """

    def __init__(self, module: nn.Module, cases: Mapping[str, Mapping[nn.Module, Rounding]]) -> None:
        self.module = module
        self.cases = cases
        self.found = dict.fromkeys(cases, 0.0)
        self.batches = 0
        self._repeating = False
        self._handle: Any = None

    def __enter__(self) -> dict[str, float]:
        self._handle = self.module.register_forward_hook(self._compare, with_kwargs=True)
        return self.found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _compare(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._repeating:
            return
        self._repeating = True
        self.batches += 1
        try:
            for name, roundings in self.cases.items():
                with rounded_inputs(roundings):
                    moved = output_divergence(output, self.module(*args, **kwargs))
                self.found[name] += (moved - self.found[name]) / self.batches
        finally:
            self._repeating = False

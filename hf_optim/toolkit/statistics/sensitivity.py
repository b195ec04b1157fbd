"""Sensitivity: how much changing one layer disturbs the output, and which layers to change within a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..topology import valid_rows
from ..topology.linear_layers import weight_out_in

Case = TypeVar("Case")


class OutputComparison(ABC, Generic[Case]):
    """Context manager that repeats every forward of a module once per case, changed, and compares the outputs.

    Logits are compared by the Kullback-Leibler divergence of their softmax (nats, mean over positions), other outputs
    by the relative squared error (``output_divergence``), over the positions that are not padding. ``with`` binds a
    dictionary from case to the value over all batches.

    Args:
        module: the model or block that batches pass through.
        cases: name -> what is changed.
    """

    def __init__(self, module: nn.Module, cases: Mapping[str, Case]) -> None:
        self.module = module
        self.cases = cases
        self.found = dict.fromkeys(cases, 0.0)
        self.batches = 0
        self._repeating = False
        self._handle: Any = None

    @abstractmethod
    def _changed_output(self, case: Case, args: Any, kwargs: Any) -> Any:
        """Return the output of the module with one case applied; the module is afterwards as before."""

    @abstractmethod
    def _accumulate(self, before: float, divergence: float) -> float:
        """Return the value of a case after another batch."""

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
        counted = valid_rows.mask_of(module, _compared(output))
        if counted is not None and not bool(counted.any()):
            return
        self._repeating = True
        self.batches += 1
        try:
            for name, case in self.cases.items():
                divergence = output_divergence(output, self._changed_output(case, args, kwargs), counted)
                self.found[name] = self._accumulate(self.found[name], divergence)
        finally:
            self._repeating = False


class OutputShift(OutputComparison[tuple[nn.Module, Tensor]]):
    """Measures how far a module's output moves if one of its layers gets another weight, summed over batches.

    ``cases`` maps a layer's name to the layer and its other weight ``[out, in]``. Weights are restored also if a
    forward raises.
    """

    def _accumulate(self, before: float, divergence: float) -> float:
        return before + divergence

    @torch.no_grad()
    def _changed_output(self, case: tuple[nn.Module, Tensor], args: Any, kwargs: Any) -> Any:
        layer, weight = case
        view = weight_out_in(layer)
        before = view.clone()
        try:
            view.copy_(weight)
            return self.module(*args, **kwargs)
        finally:
            view.copy_(before)


def output_divergence(output: Any, changed: Any, counted: Tensor | None = None) -> float:
    """Return the distance of two outputs of a module, >= 0: of their logits in nats, else relative squared error.

    Args:
        output, changed: two outputs of a module.
        counted: bool, the shape of the compared tensors without features: which positions count; None for all.
    """
    dense, moved = _compared(output).float(), _compared(changed).float()
    if counted is not None:
        dense, moved = dense[counted], moved[counted]
    if _has_logits(output) and _has_logits(changed):
        log_p, log_q = dense.log_softmax(-1), moved.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    norm = float(dense.square().sum())
    return float((moved - dense).square().sum()) / norm if norm > 0 else 0.0


def _has_logits(output: Any) -> bool:
    return isinstance(getattr(output, "logits", None), Tensor)


def _compared(output: Any) -> Tensor:
    """Return the logits of an output, or else its first tensor."""
    return output.logits if _has_logits(output) else _first_tensor(output)


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def select_within_budget(errors: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> list[str]:
    """Select the layers to change: least error per weight first, each taken if it still fits into the budget.

    Args:
        errors: layer name -> the error that changing it causes.
        sizes: layer name -> number of weights.
        budget: maximum number of weights to change in total.

    Returns:
        Names in the order taken; of equal errors per weight the earlier in ``errors``.
    """
    chosen = []
    for name in sorted(errors, key=lambda name: errors[name] / sizes[name]):
        if sizes[name] <= budget:
            chosen.append(name)
            budget -= sizes[name]
    return chosen

"""Sensitivity: how much changing one layer disturbs the output, and which layers to change within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..topology.linear_layers import weight_out_in


class OutputShift:
    """Context manager that measures how far a module's output moves if one of its layers gets another weight.

    While inputs pass through ``module``, each forward is repeated once per layer with that layer's weight replaced, and
    the outputs are compared: logits by the Kullback-Leibler divergence of their softmax (nats, mean over positions),
    other outputs by the relative squared error. Weights are restored also if a forward raises.

    ``with`` binds a dictionary from layer name to the sum over batches.

    Args:
        module: the model or block that inputs pass through.
        changes: layer name -> (the layer, its other weight ``[out, in]``).
    """

    def __init__(self, module: nn.Module, changes: Mapping[str, tuple[nn.Module, Tensor]]) -> None:
        self.module = module
        self.changes = changes
        self.found = dict.fromkeys(changes, 0.0)
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
        try:
            for name, (layer, weight) in self.changes.items():
                self.found[name] += output_divergence(output, self._changed_output(layer, weight, args, kwargs))
        finally:
            self._repeating = False

    @torch.no_grad()
    def _changed_output(self, layer: nn.Module, weight: Tensor, args: Any, kwargs: Any) -> Any:
        view = weight_out_in(layer)
        before = view.clone()
        try:
            view.copy_(weight)
            return self.module(*args, **kwargs)
        finally:
            view.copy_(before)


def output_divergence(output: Any, changed: Any) -> float:
    """Return the distance of two outputs of a module, >= 0: of their logits in nats, else relative squared error."""
    logits, others = getattr(output, "logits", None), getattr(changed, "logits", None)
    if isinstance(logits, Tensor) and isinstance(others, Tensor):
        log_p, log_q = logits.float().log_softmax(-1), others.float().log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    dense, moved = _first_tensor(output).float(), _first_tensor(changed).float()
    norm = float(dense.square().sum())
    return float((moved - dense).square().sum()) / norm if norm > 0 else 0.0


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

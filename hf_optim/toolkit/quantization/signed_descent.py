"""Optimizers that bring parameters back into their bounds after each step: signed gradient descent, and Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SignedDescent(torch.optim.Optimizer):
    """Move each parameter by ``lr`` against the sign of its gradient: ``p <- p - rate sign(dL/dp)``.

    The size of a step does not depend on that of the gradient, so that over a run with a rate of ``1 / steps`` that
    falls linearly to 0 a parameter moves by at most 0.5 (2309.05516, section 3.2). Groups have ``lr``.

    Args:
        params: tensors, or groups of them.
        lr: the rate.
        project: called after each step.
    """

    def __init__(self, params: Iterable[Any], lr: float, project: Callable[[], None] | None = None) -> None:
        super().__init__(params, {"lr": lr})
        self.project = project

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient: Tensor | None = parameter.grad
                if gradient is not None:
                    parameter.sub_(gradient.sign(), alpha=group["lr"])
        if self.project is not None:
            self.project()


class ProjectedAdam(torch.optim.Adam):
    """Adam, and a projection after each step.

    Args:
        params: tensors, or groups of them.
        lr: the rate.
        betas: of the running means of the gradient and of its square.
        project: called after each step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        project: Callable[[], None],
    ) -> None:
        groups = list(params)
        super().__init__(groups, lr=lr, betas=betas, fused=_may_fuse(groups))
        self.project = project

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.project()


def _may_fuse(params: Iterable[Any]) -> bool:
    """Return True if torch has one kernel for a step of Adam where these tensors (or groups of them) are."""
    tensors = [t for each in params for t in (each["params"] if isinstance(each, dict) else [each])]
    return all(t.device.type in ("cpu", "cuda") and t.is_floating_point() for t in tensors)

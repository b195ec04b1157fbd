"""Sparse training of experts: stacked matrices ``[E, ., .]`` whose forward sees a part of the weight.

The module of the experts gets a subclass of its own class whose matrices are ``A ∘ W`` while its forward runs, and the
parameters otherwise. So every implementation of the forward (transformers' own, and those in its registry) computes
with masks, and optimizers, checkpoints and other readers see the dense parameters under their names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.swap_class import FORMER, restore_class, swap_class
from ..topology.experts import ExpertLinear, matrix_names

STACKS = "masked_stacks"  # attribute of the module: parameter -> its masks
RUNNING = "_hf_optim_running"  # attribute of the module while its forward runs: parameter -> effective weight


class _Masked(torch.autograd.Function):
    """``A ∘ W`` with the gradient ``B ∘ g``, or ``g`` without ``B``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, forward_mask: Tensor, backward_mask: Tensor | None) -> Tensor:
        ctx.backward_mask = backward_mask
        return weight * forward_mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient if ctx.backward_mask is None else gradient * ctx.backward_mask), None, None


def masked_weight(weight: Tensor, forward_mask: Tensor | None, backward_mask: Tensor | None) -> Tensor:
    """Return ``A ∘ W``, whose gradient is masked by ``B``; the weight itself without ``A``."""
    if forward_mask is None:
        return weight
    return _Masked.apply(weight, forward_mask, backward_mask)  # type: ignore[no-untyped-call]


@dataclass
class _StackMasks:
    """The masks of a stacked parameter, and the experts whose matrices the step works on, ascending."""

    indices: tuple[int, ...]
    forward_mask: Tensor | None = None
    backward_mask: Tensor | None = None


class MaskedStack:
    """One stacked parameter of experts in sparse training, with the interface of a ``MaskedLayer``.

    It refers to the module of the experts, which holds the masks. Experts that the step leaves alone compute with their
    whole weight.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        self.experts, self.parameter = experts, parameter

    @property
    def _own(self) -> _StackMasks:
        return vars(self.experts)[STACKS][self.parameter]

    @property
    def weight(self) -> nn.Parameter:
        """The stacked parameter."""
        return self.experts._parameters[self.parameter]  # type: ignore[return-value]

    @property
    def forward_mask(self) -> Tensor | None:
        """``A``, of the shape of the parameter; None computes with the dense weight."""
        return self._own.forward_mask

    @property
    def backward_mask(self) -> Tensor | None:
        """``B``; None lets the gradient reach every weight."""
        return self._own.backward_mask

    def set_masks(self, forward_mask: Tensor | None, backward_mask: Tensor | None = None) -> None:
        """Set the masks from the next forward on; they are moved to the device of the weight."""
        device = self.weight.device
        self._own.forward_mask = None if forward_mask is None else forward_mask.to(device)
        self._own.backward_mask = None if backward_mask is None else backward_mask.to(device)

    def effective_weight(self) -> Tensor:
        """Return ``A ∘ W`` in the shape of the parameter; its gradient is masked by ``B``."""
        return masked_weight(self.weight, self.forward_mask, self.backward_mask)

    def key(self, name: str) -> str:
        """Return the name of the parameter, which is that of the stack."""
        return name

    def matrices(self, name: str) -> dict[str, Tensor]:
        """Return the matrices of the targeted experts as they are stored, detached, by the name of the weight."""
        views = (ExpertLinear(self.experts, name.rpartition(".")[0], self.parameter, i) for i in self._own.indices)
        weight = self.weight.detach()
        return {view.name: weight[view.index] for view in views}

    def whole(self, name: str, found: Mapping[str, Tensor]) -> Tensor:
        """Return the mask of the parameter from masks of its ``matrices``; other experts keep all weights."""
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        for matrix, index in zip(self.matrices(name), self._own.indices, strict=True):
            mask[index] = found[matrix]
        return mask

    def out_in(self) -> Tensor:
        """Return the weight, detached, with the inputs along its last dimension: ``[E, out, in]``."""
        weight = self.weight.detach()
        return weight.mT if self._transposed else weight

    def stored(self, mask: Tensor) -> Tensor:
        """Return a mask of ``out_in`` as a mask of the parameter, or the other way round."""
        return mask.mT.contiguous() if self._transposed else mask

    def targeted(self) -> Tensor | None:
        """Return which experts the step works on, bool ``[E, 1, 1]``; None for all."""
        if len(self._own.indices) == len(self.weight):
            return None
        chosen = torch.zeros(len(self.weight), 1, 1, dtype=torch.bool, device=self.weight.device)
        chosen[list(self._own.indices)] = True
        return chosen

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self.experts, "is_transposed", False))


class MaskedExperts(nn.Module):
    """Base class of modules of experts in sparse training."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in vars(self)[STACKS]:
            stack = MaskedStack(self, name)
            stack.set_masks(stack.forward_mask, stack.backward_mask)  # the weight may have moved to another device
        return self


def unsupported_reason(experts: nn.Module) -> str:
    """Return why experts cannot be trained sparsely, or an empty string if they can."""
    replaced = "forward" in vars(experts) or (FORMER in vars(experts) and not isinstance(experts, MaskedExperts))
    return f"the forward of this {type(experts).__name__} was replaced" if replaced else ""


def attach_stacks(views: Iterable[ExpertLinear]) -> dict[str, MaskedStack]:
    """Train the stacks of these matrices with masks, without any for now; return them by parameter name."""
    by_module: dict[str, dict[str, list[int]]] = {}
    modules: dict[str, nn.Module] = {}
    for view in views:
        modules[view.experts_name] = view.experts
        by_module.setdefault(view.experts_name, {}).setdefault(view.parameter, []).append(view.index)
    found: dict[str, MaskedStack] = {}
    for name, stacks in by_module.items():
        experts = modules[name]
        masks = {parameter: _StackMasks(tuple(sorted(indices))) for parameter, indices in stacks.items()}
        kind: Any = type(experts)
        swap_class(experts, _masked_class(kind, matrix_names(experts)), **{STACKS: masks})
        found |= stacks_in(experts, name)
    return found


def detach_stack(stack: MaskedStack) -> nn.Module:
    """End the sparse training of one stack, and of its module with the last one; return the module."""
    own = vars(stack.experts)[STACKS]
    del own[stack.parameter]
    return stack.experts if own else restore_class(stack.experts)


def stacks_in(module: nn.Module, name: str) -> dict[str, MaskedStack]:
    """Return the stacks in sparse training of one module, by the qualified name of the parameter."""
    if not isinstance(module, MaskedExperts):
        return {}
    return {f"{name}.{own}".removeprefix("."): MaskedStack(module, own) for own in vars(module)[STACKS]}


@functools.cache
def _masked_class(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a class of experts that computes with masks, under the same name.

    Args:
        kind: the class.
        names: its stacked parameters.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        own[RUNNING] = {name: MaskedStack(self, name).effective_weight() for name in own[STACKS]}
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            del own[RUNNING]

    def matrix(name: str) -> property:
        def read(self: nn.Module) -> Any:
            running = vars(self).get(RUNNING, {})
            return running[name] if name in running else self._parameters[name]

        return property(read)

    members = {name: matrix(name) for name in names}
    return type(kind.__name__, (MaskedExperts, kind), {"__module__": kind.__module__, "forward": forward, **members})

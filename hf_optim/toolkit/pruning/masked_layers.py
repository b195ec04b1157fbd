"""Linear layers that compute with a part of their weight while more of it is trained.

::

    y = x (A ∘ W)ᵀ + b          ∂L/∂W := B ∘ ∂L/∂(A ∘ W)

``A`` is what the forward uses, ``B`` what the gradient reaches; with ``B`` all ones that is the straight-through
estimator (1308.3432). Weights outside ``A`` keep their values, so a mask that is made anew can bring them back.

A layer in training is the layer it was with another class (``attach_masks``, undone by ``detach_masks``): the parameter and its
name stay, and a checkpoint holds the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import CheckpointError, ModelError
from ..distributed import fsdp
from ..topology.linear_layers import parameter_names, tied_weights

# The place of a recipe that a step takes which changes how linear layers compute while they are trained.
TRAINING_FORWARD = "the training forward of linear layers"

# How torch.optim (and the optimizers that follow it) name the running mean of gradients in their state.
RUNNING_MEANS = ("exp_avg", "momentum_buffer")


class _Masked(torch.autograd.Function):
    """``A ∘ W``, with the gradient ``B ∘ g``; without ``B`` all of it passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, forward_mask: Tensor, backward_mask: Tensor | None) -> Tensor:
        ctx.backward_mask = backward_mask
        return weight * forward_mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient if ctx.backward_mask is None else gradient * ctx.backward_mask), None, None


class MaskedLayer(nn.Module):
    """What the two kinds of layers have in common. Masks are bool, of the shape of the parameter as it is stored.

    Attributes:
        forward_mask: ``A``; None computes as the layer it was.
        backward_mask: ``B``; None lets the gradient reach every weight.
        former: the class it had.
    """

    weight: Any  # an nn.Parameter; the two kinds declare it differently
    forward_mask: Tensor | None
    backward_mask: Tensor | None
    former: type[nn.Module]

    def effective_weight(self) -> Tensor:
        """``A ∘ W`` as stored, with the gradient of ``B``."""
        if self.forward_mask is None:
            return self.weight
        return _Masked.apply(self.weight, self.forward_mask, self.backward_mask)  # type: ignore[no-untyped-call]

    def set_masks(self, forward_mask: Tensor | None, backward_mask: Tensor | None = None) -> None:
        """Compute with these from the next forward on. They are moved to where the weight is."""
        device = self.weight.device
        self.forward_mask = None if forward_mask is None else forward_mask.to(device)
        self.backward_mask = None if backward_mask is None else backward_mask.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.set_masks(self.forward_mask, self.backward_mask)  # the weight may be on another device now
        return self


class MaskedLinear(MaskedLayer, nn.Linear):
    """An ``nn.Linear`` in sparse training."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight(), self.bias)


class MaskedConv1D(MaskedLayer, Conv1D):
    """A GPT-2 ``Conv1D`` in sparse training; its weight is ``[in, out]``."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(self.bias, rows, self.effective_weight()).view(*x.shape[:-1], self.nf)


MASKED_CLASSES: dict[type[nn.Module], type[MaskedLayer]] = {nn.Linear: MaskedLinear, Conv1D: MaskedConv1D}


def unsupported_reason(layer: nn.Module) -> str:
    """Why a linear layer cannot be trained sparsely; the empty string if it can."""
    plain: Any = nn.Linear if isinstance(layer, nn.Linear) else Conv1D
    if type(layer).forward is not plain.forward or "forward" in vars(layer):
        return f"a {type(layer).__name__} does not compute as {plain.__name__}"
    return ""


def attach_masks(layer: nn.Module) -> MaskedLayer:
    """Make a layer a ``MaskedLayer`` in place, as yet without masks. Raises ``ValueError`` where there is an obstacle.

    Hooks and references to the layer stay valid.
    """
    if reason := unsupported_reason(layer):
        raise ValueError(reason)
    former = type(layer)
    layer.__class__ = MASKED_CLASSES[nn.Linear if isinstance(layer, nn.Linear) else Conv1D]
    assert isinstance(layer, MaskedLayer)
    layer.__dict__.update(forward_mask=None, backward_mask=None, former=former)
    return layer


def detach_masks(layer: MaskedLayer) -> nn.Module:
    """Undo ``attach_masks``; the weight stays as it is, dense."""
    former = layer.former
    for name in ("forward_mask", "backward_mask", "former"):
        layer.__dict__.pop(name)
    layer.__class__ = former  # type: ignore[assignment]
    return layer


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The layers in sparse training, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def select_supported(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Which of ``layers`` can be attached, and the names of the others by reason.

    A weight that another module holds too is left out: that module would compute with other numbers.
    Raises ``ModelError`` for a model with adapters, whose parts change their names in a merge.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            "the model has adapters: a step that chooses masks during training needs a model without; train it first "
            "and add adapters for recovery, or merge them before"
        )
    usable: dict[str, nn.Module] = {}
    skipped: dict[str, list[str]] = {}
    held_by = parameter_names(model)
    for name, layer in layers.items():
        shared = [line for line in tied_weights(layer, name, held_by) if line.startswith(f"{name}.weight:")]
        reason = unsupported_reason(layer) or (shared[0].partition(": ")[2] if shared else "")
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            usable[name] = layer
    return usable, skipped


def require_unsharded(layers: Mapping[str, nn.Module], label: str = "training") -> None:
    """Raise ``ModelError`` naming the first weight that is a shard (FSDP, ZeRO-3): a part cannot be ranked."""
    for name, layer in layers.items():
        weight: Any = layer.weight
        if weight.dim() != 2 or weight.numel() == 0 or hasattr(weight, "placements"):
            raise ModelError(
                f"{label}: {name}.weight is sharded: masks are chosen on whole parameters; train on one device or with "
                "DDP, not with sharded parameters (FSDP, ZeRO-3)"
            )


def read_layer_state(state: Any, kind: str, layers: Mapping[str, MaskedLayer], label: str) -> dict[str, Tensor]:
    """What a step kept for each layer as ``state.<kind>.<layer>``, by layer, after a checkpoint was read.

    Raises ``CheckpointError`` where there is nothing, or something of another shape.
    """
    found = {name: getattr(state, f"{kind}.{name}", None) for name in layers}
    for name, tensor in found.items():
        if tensor is None or tensor.shape != layers[name].weight.shape:
            raise CheckpointError(
                f"{label}: the checkpoint has no {kind} of {name} in the shape of its weight; resume with the recipe "
                "and the model that it was written with"
            )
    return found  # type: ignore[return-value]


# -- the optimizer ----------------------------------------------------------------------------------------------------
def learning_rates(optimizer: Any) -> dict[int, float]:
    """The rate of the next step for each parameter of an optimizer, by the parameter's identity."""
    return {id(p): float(group["lr"]) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def will_skip_step(optimizer: Any) -> bool:
    """Whether a loss scaler is about to leave out this optimizer step, its gradients having overflowed (fp16)."""
    if getattr(optimizer, "scaler", None) is None:
        return False
    return not all(bool(torch.isfinite(gradient).all()) for gradient in _gradients(optimizer))


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    return (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


@torch.no_grad()
def clear_running_means(optimizer: Any, parameter: nn.Parameter, kept: Tensor) -> None:
    """Set the running means of a parameter's gradient to zero outside ``kept``: bool, the shape of this rank's part."""
    for key, value in (getattr(optimizer, "state", None) or {}).get(parameter, {}).items():
        if key in RUNNING_MEANS and isinstance(value, Tensor) and (part := fsdp.local_shard(value)).shape == kept.shape:
            part.mul_(kept.to(part.device))

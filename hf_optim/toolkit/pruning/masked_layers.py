"""Sparse training of linear layers: the forward uses a part of the weight, and the gradient reaches more of it.

::

    y = x (A ∘ W)ᵀ + b          ∂L/∂W := B ∘ ∂L/∂(A ∘ W)

``A`` masks the forward, ``B`` the gradient; with ``B`` all ones this is the straight-through estimator (1308.3432).
Weights outside ``A`` keep their values, so that a later mask can bring them back.

Layers are changed in place (``attach_masks``, undone by ``detach_masks``): parameters and their names stay, and a
checkpoint contains the dense weight. The matrices of experts are trained stack by stack: ``masked_experts``.
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
from ..modules.swap_class import restore_class, swap_class
from ..topology.experts import ExpertLinear
from ..topology.linear_layers import parameter_names, tied_weights, weight_out_in
from . import masked_experts
from .masked_experts import MaskedStack, masked_weight

# The exclusive slot of a recipe for a step that changes the forward of linear layers during training.
TRAINING_FORWARD = "the training forward of linear layers"

# Keys of the running mean of gradients in the state of torch.optim and compatible optimizers.
RUNNING_MEANS = ("exp_avg", "momentum_buffer")


class MaskedLayer(nn.Module):
    """Base class of linear layers in sparse training. Masks are bool, in the shape of the stored parameter.

    Attributes:
        forward_mask: ``A``; None computes with the dense weight.
        backward_mask: ``B``; None lets the gradient reach every weight.
    """

    weight: Any  # an nn.Parameter; the two kinds declare it differently
    forward_mask: Tensor | None
    backward_mask: Tensor | None

    def effective_weight(self) -> Tensor:
        """Return ``A ∘ W`` in the shape of the parameter; its gradient is masked by ``B``."""
        return masked_weight(self.weight, self.forward_mask, self.backward_mask)

    def set_masks(self, forward_mask: Tensor | None, backward_mask: Tensor | None = None) -> None:
        """Set the masks from the next forward on; they are moved to the device of the weight."""
        device = self.weight.device
        self.forward_mask = None if forward_mask is None else forward_mask.to(device)
        self.backward_mask = None if backward_mask is None else backward_mask.to(device)

    def key(self, name: str) -> str:
        """Return the name of the parameter of the layer ``name``."""
        return f"{name}.weight"

    def matrices(self, name: str) -> dict[str, Tensor]:
        """Return the weights that are ranked one by one, as they are stored, detached, by the name of the weight."""
        return {self.key(name): self.weight.detach()}

    def whole(self, name: str, found: Mapping[str, Tensor]) -> Tensor:
        """Return the mask of the parameter from masks of its ``matrices``."""
        return found[self.key(name)]

    def out_in(self) -> Tensor:
        """Return the weight, detached, with the inputs along its last dimension: ``[out, in]``."""
        return weight_out_in(self).detach()

    def stored(self, mask: Tensor) -> Tensor:
        """Return a mask of ``out_in`` as a mask of the parameter, or the other way round."""
        return mask.T.contiguous() if isinstance(self, Conv1D) else mask

    def targeted(self) -> Tensor | None:
        """Return which weights of the parameter the step works on, bool, by broadcasting; None for all."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.set_masks(self.forward_mask, self.backward_mask)  # the weight may have moved to another device
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
    """Return why a linear layer cannot be trained sparsely, or an empty string if it can."""
    plain: Any = nn.Linear if isinstance(layer, nn.Linear) else Conv1D
    if type(layer).forward is not plain.forward or "forward" in vars(layer):
        return f"a {type(layer).__name__} does not compute as {plain.__name__}"
    return ""


def attach_masks(layer: nn.Module) -> MaskedLayer:
    """Turn a linear layer into a ``MaskedLayer`` in place, without masks for now, and return it.

    Hooks and references to the layer stay valid. Raises ``ValueError`` if the layer is not supported.
    """
    if reason := unsupported_reason(layer):
        raise ValueError(reason)
    masked = MASKED_CLASSES[nn.Linear if isinstance(layer, nn.Linear) else Conv1D]
    return swap_class(layer, masked, forward_mask=None, backward_mask=None)


def attach_all(layers: Mapping[str, Any]) -> dict[str, MaskedLayer | MaskedStack]:
    """Turn linear layers and matrices of experts into layers in sparse training, in place, and return them by name.

    Matrices of experts become one ``MaskedStack`` for each stacked parameter, under the name of the parameter.
    """
    found: dict[str, MaskedLayer | MaskedStack] = {
        name: attach_masks(layer) for name, layer in layers.items() if not isinstance(layer, ExpertLinear)
    }
    return found | masked_experts.attach_stacks([view for view in layers.values() if isinstance(view, ExpertLinear)])


def detach_masks(layer: MaskedLayer | MaskedStack) -> nn.Module:
    """Undo ``attach_masks``, and return the layer (or the module of the experts); its weight stays dense."""
    if isinstance(layer, MaskedStack):
        return masked_experts.detach_stack(layer)
    return restore_class(layer)


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer | MaskedStack]:
    """Return the layers in sparse training by qualified name, and stacks of experts by the name of the parameter."""
    found: dict[str, MaskedLayer | MaskedStack] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            found[name] = module
        else:
            found |= masked_experts.stacks_in(module, name)
    return found


def select_supported(model: nn.Module, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the ``layers`` that can be trained sparsely, and the names of the others by reason.

    A layer with a tied weight is left out, because the other module would compute with different weights. Raises
    ``ModelError`` for a model with adapters, whose parameters change their names in a merge.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(
            "the model has adapters: a step that chooses masks during training needs a model without; train it first "
            "and add adapters for recovery, or merge them before"
        )
    usable: dict[str, Any] = {}
    skipped: dict[str, list[str]] = {}
    held_by = parameter_names(model)
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            if reason := masked_experts.unsupported_reason(layer.experts):
                skipped.setdefault(reason, []).append(name)
            else:
                usable[name] = layer
            continue
        shared = [line for line in tied_weights(layer, name, held_by) if line.startswith(f"{name}.weight:")]
        reason = unsupported_reason(layer) or (shared[0].partition(": ")[2] if shared else "")
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            usable[name] = layer
    return usable, skipped


def require_unsharded(layers: Mapping[str, Any], label: str = "training") -> None:
    """Raise ``ModelError`` naming the first sharded weight (FSDP, ZeRO-3): its parts cannot be ranked."""
    for name, layer in layers.items():
        weight: Any = layer.weight
        stacked = isinstance(layer, MaskedStack)
        if weight.dim() != 2 + stacked or weight.numel() == 0 or hasattr(weight, "placements"):
            parameter = name if stacked else f"{name}.weight"
            raise ModelError(
                f"{label}: {parameter} is sharded: masks are chosen on whole parameters; train on one device or with "
                "DDP, not with sharded parameters (FSDP, ZeRO-3)"
            )


def read_layer_state(state: Any, kind: str, layers: Mapping[str, Any], label: str) -> dict[str, Tensor]:
    """Return the tensors ``state.<kind>.<layer>`` of a step by layer, after a checkpoint was read.

    Raises ``CheckpointError`` if one is missing or does not have the shape of the weight.
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
    """Return the learning rate of the next step for each parameter of an optimizer, by ``id`` of the parameter."""
    return {id(p): float(group["lr"]) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def will_skip_step(optimizer: Any) -> bool:
    """Return True if a loss scaler will skip this optimizer step because gradients have overflowed (fp16)."""
    if getattr(optimizer, "scaler", None) is None:
        return False
    return not all(bool(torch.isfinite(gradient).all()) for gradient in _gradients(optimizer))


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    return (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


@torch.no_grad()
def clear_running_means(optimizer: Any, parameter: nn.Parameter, kept: Tensor) -> None:
    """Zero the running means of a parameter's gradient outside ``kept``: bool, the shape of this rank's shard."""
    for key, value in (getattr(optimizer, "state", None) or {}).get(parameter, {}).items():
        if key in RUNNING_MEANS and isinstance(value, Tensor) and (part := fsdp.local_shard(value)).shape == kept.shape:
            part.mul_(kept.to(part.device))

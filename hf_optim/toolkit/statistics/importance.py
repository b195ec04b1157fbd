"""Importance of prunable groups and blocks: by their weights, their activations, and the gradient of a gate.

Every score is larger for what should be kept. Groups are those of ``topology.PrunableGroups``, one object per layer;
the scores of a layer are float64 ``[groups]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ..distributed import collectives
from ..topology import valid_rows
from ..topology.linear_layers import weight_out_in
from ..topology.prunable_groups import PrunableGroups
from .calibration_losses import count_samples, ranking_loss
from .curvature import enable_double_backward
from .observers import InputObserver, first_tensor

Gate = Callable[[str, Tensor], "Tensor | None"]


# -- weights ------------------------------------------------------------------------------------------------------
def group_magnitude(model: nn.Module, groups: PrunableGroups) -> Tensor:
    """Return ``‖θ_g‖²``, the sum of squares of all parameters of each group; float64 ``[groups]``."""
    total = torch.zeros(len(groups), dtype=torch.float64)
    for name, (dim, entries) in groups.entries.items():
        parameter = model.get_parameter(name).detach()
        squares = parameter.double().square()
        others = [other for other in range(parameter.dim()) if other != dim]
        total += (squares.sum(others) if others else squares).cpu()[entries].sum(1)
    return total


def block_magnitude(block: nn.Module) -> float:
    """Return ``‖θ‖²`` of a block."""
    return sum(float(parameter.detach().double().square().sum()) for parameter in block.parameters())


# -- activations --------------------------------------------------------------------------------------------------
class OutputContributions(InputObserver[Tensor]):
    """``Σ_t ‖W_g x_g(t)‖²``: the squared norm of each group's contribution to its consumer's output, over tokens t.

    Args:
        model: the model.
        layers: the groups of several layers, of any kind. The result is keyed by the name of the consumer.
        label: see ``InputObserver``.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PrunableGroups], label: str = "") -> None:
        super().__init__({groups.consumer: model.get_submodule(groups.consumer) for groups in layers}, label)
        self.groups = {groups.consumer: groups for groups in layers}

    def update(self, name: str, inputs: Tensor) -> None:
        self.check_finite(name, inputs.abs().amax())
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        added = squared_contributions(rows, self.modules[name], self.groups[name])
        self.found[name] = self.found[name] + added if name in self.found else added

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "sum", self.device)


def squared_contributions(inputs: Tensor, consumer: nn.Module, groups: PrunableGroups) -> Tensor:
    """Return ``Σ_t ‖W_g x_g(t)‖²`` for inputs ``[tokens, in]``; float64 ``[groups]``."""
    weight = weight_out_in(consumer).detach()
    columns = groups.columns.to(inputs.device)
    if columns.shape[1] == 1:
        squares = inputs.float().square().sum(0).double() * weight.float().square().sum(0).double()
        return squares[columns.flatten()]
    added = [(inputs[:, part] @ weight[:, part].T).float().square().sum().double() for part in columns]
    return torch.stack(added)


class BlockInfluence:
    """Context manager: ``1 - cos(h_in, h_out)`` of each block, mean over the tokens that count (2403.03853).

    ``with`` binds a dictionary from block name to float64 ``[2]``: the sum over tokens and the number of tokens.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], label: str = "") -> None:
        self.blocks = dict(blocks)
        self.label = label
        self.found: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, Tensor]:
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(name), with_kwargs=True))
        return self.found

    def __exit__(self, *raised: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if raised and raised[0] is not None:
            return
        for name, sums in self.found.items():
            if not bool(torch.isfinite(sums).all()):
                raise NumericalError(
                    f"{self.label}: {name} reads or gives infinite or NaN values on the calibration data; check "
                    "that the model computes finite outputs in this dtype (float16 overflows at 65504)"
                )
        if collectives.world_size() > 1:
            collectives.all_reduce_dict_(self.found, self.blocks, "sum")

    def _hook(self, name: str) -> Any:
        def observe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _hidden_state(args, kwargs), _first_output(output)
            moved = 1.0 - torch.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).double()
            mask = valid_rows.mask_of(module, before)
            moved = moved if mask is None else moved[mask]
            if not moved.numel():
                return
            sums = torch.stack([moved.sum(), torch.tensor(float(moved.numel()), dtype=torch.float64).to(moved.device)])
            self.found[name] = self.found[name] + sums if name in self.found else sums

        return observe


# -- gates --------------------------------------------------------------------------------------------------------
@contextmanager
def apply_gates(consumers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], gate: Gate) -> Iterator[None]:
    """Multiply the inputs of linear layers, and the updates of blocks to the residual stream, by gates.

    ``gate(name, tensor)`` returns the factor for ``tensor``, or None to leave it unchanged. ``tensor`` is the input of
    a consumer ``[..., in]``, or the hidden state that a block reads ``[..., width]``; for a block, the update ``h_out -
    h_in`` is gated.
    """

    def on_input(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            factor = gate(name, args[0])
            return None if factor is None else ((args[0] * factor, *args[1:]), kwargs)

        return hook

    def on_block(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before, after = _hidden_state(args, kwargs), _first_output(output)
            factor = gate(name, before)
            if factor is None:
                return None
            mixed = before + factor * (after - before)
            return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

        return hook

    handles = [m.register_forward_pre_hook(on_input(name), with_kwargs=True) for name, m in consumers.items()]
    handles += [m.register_forward_hook(on_block(name), with_kwargs=True) for name, m in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    layers: Sequence[PrunableGroups],
    blocks: Mapping[str, nn.Module],
    label: str = "",
) -> dict[str, Tensor]:
    """Return ``Σ_samples |∂L/∂ξ|`` at ``ξ = 1`` for a gate ``ξ`` on each group, and on the update of each block.

    For a group ``g`` this is ``|Σ_t x_g(t)ᵀ ∂L/∂x_g(t)|``: the first-order estimate of how much the loss changes if the
    group is removed. The result is keyed by the name of the consumer, float64 ``[groups]``, or of the block, ``[1]``.

    Raises ``ModelError`` for a model without a loss (``ranking_loss``), and ``NumericalError`` for a non-finite loss.
    """
    consumers = {groups.consumer: model.get_submodule(groups.consumer) for groups in layers}
    columns = {groups.consumer: groups.columns for groups in layers}
    found: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in _gate_gradients(model, batch, consumers, blocks, label).items():
            parts = gradient[:, columns[name].to(gradient.device)].sum(-1) if name in columns else gradient
            # The loss is a mean over the samples.
            score = count_samples(model, batch, len(parts)) * parts.double().abs().sum(0)
            found[name] = found[name] + score if name in found else score
    collectives.all_reduce_dict_(found, [*consumers, *blocks], "sum")
    return found


def _gate_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    consumers: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    label: str,
) -> dict[str, Tensor]:
    """Return the gradient of the loss in the gates: ``[samples, in]`` for a consumer, ``[samples, 1]`` for a block."""
    gates: dict[str, Tensor] = {}

    def gate(name: str, tensor: Tensor) -> Tensor:
        width = tensor.shape[-1] if name in consumers else 1
        shape = (tensor.shape[0], *(1 for _ in tensor.shape[1:-1]), width)
        gates[name] = torch.ones(shape, dtype=tensor.dtype, device=tensor.device, requires_grad=True)
        return gates[name]

    with enable_double_backward(model, ()), apply_gates(consumers, blocks, gate):
        loss = ranking_loss(model, batch, label)
        if not math.isfinite(float(loss.detach())):
            raise NumericalError(
                f"{label}: the loss is {float(loss.detach())} on the calibration data; check the weights"
            )
        if not loss.requires_grad:  # nothing in this batch counts
            return {}
        gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    return {name: gradient.flatten(1) for name, gradient in zip(gates, gradients, strict=True) if gradient is not None}


def _hidden_state(args: Any, kwargs: Any) -> Tensor:
    tensor = first_tensor(args, kwargs)
    assert tensor is not None
    return tensor


def _first_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]

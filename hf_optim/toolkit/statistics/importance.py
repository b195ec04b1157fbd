"""What a unit or a block of a transformer is worth: by its weights, by what it adds, by the gradient of a gate on it.

Every score is larger for what should stay. Units are those of ``structures``; their scores are float64 ``[units]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, NumericalError
from ..distributed import collectives
from ..topology.linear_layers import weight_out_in
from ..topology.prunable_groups import PrunableGroups
from .curvature import calibration_loss, enable_double_backward, is_causal
from .observers import InputObserver, first_tensor

Gate = Callable[[str, Tensor], "Tensor | None"]


# -- weights ------------------------------------------------------------------------------------------------------
def group_magnitude(model: nn.Module, units: PrunableGroups) -> Tensor:
    """``‖θ_u‖²``, the sum of squares of all that belongs to a unit."""
    total = torch.zeros(len(units), dtype=torch.float64)
    for name, (dim, entries) in units.entries.items():
        parameter = model.get_parameter(name).detach()
        squares = parameter.double().square()
        others = [other for other in range(parameter.dim()) if other != dim]
        total += (squares.sum(others) if others else squares).cpu()[entries].sum(1)
    return total


def block_magnitude(block: nn.Module) -> float:
    """``‖θ‖²`` of a block."""
    return sum(float(parameter.detach().double().square().sum()) for parameter in block.parameters())


# -- activations --------------------------------------------------------------------------------------------------
class OutputContributions(InputObserver[Tensor]):
    """``Σ_t ‖W_u x_u(t)‖²``: the squared length of what each unit adds to the output of its reader, over tokens t.

    Args:
        model: the model.
        units: of any kind; the result is by the name of the reader.
        label: see ``InputObserver``.
    """

    def __init__(self, model: nn.Module, units: Sequence[PrunableGroups], label: str = "") -> None:
        super().__init__({one.consumer: model.get_submodule(one.consumer) for one in units}, label)
        self.units = {one.consumer: one for one in units}

    def update(self, name: str, inputs: Tensor) -> None:
        self.check_finite(name, inputs.abs().amax())
        added = squared_contributions(
            inputs.detach().reshape(-1, inputs.shape[-1]), self.modules[name], self.units[name]
        )
        self.found[name] = self.found[name] + added if name in self.found else added

    def reduce(self) -> None:
        collectives.all_reduce_dict_(self.found, self.modules, "sum", self.device)


def squared_contributions(inputs: Tensor, reader: nn.Module, units: PrunableGroups) -> Tensor:
    """``Σ_t ‖W_u x_u(t)‖²`` for inputs ``[tokens, in]``; float64 ``[units]``."""
    weight = weight_out_in(reader).detach()
    columns = units.columns.to(inputs.device)
    if columns.shape[1] == 1:
        energy = inputs.float().square().sum(0).double() * weight.float().square().sum(0).double()
        return energy[columns.flatten()]
    added = [(inputs[:, part] @ weight[:, part].T).float().square().sum().double() for part in columns]
    return torch.stack(added)


class BlockInfluence:
    """Context manager: ``1 - cos(h_in, h_out)`` of each block, mean over tokens (2403.03853).

    ``with`` binds a dictionary from block name to float64 ``[2]``: the sum over tokens and their number.
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
            before, after = _hidden(args, kwargs), _output(output)
            moved = 1.0 - torch.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).double()
            sums = torch.stack([moved.sum(), torch.tensor(float(moved.numel()), dtype=torch.float64).to(moved.device)])
            self.found[name] = self.found[name] + sums if name in self.found else sums

        return observe


# -- gates --------------------------------------------------------------------------------------------------------
@contextmanager
def apply_gates(readers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], gate: Gate) -> Iterator[None]:
    """Multiply the inputs of linears, and what blocks add to the residual stream, by gates.

    ``gate(name, tensor)`` gives what ``tensor`` is multiplied by, or None to leave it: the input of a reader
    ``[..., in]``, or the hidden state that a block reads ``[..., width]``, whose update ``h_out - h_in`` is gated.
    """

    def on_input(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            factor = gate(name, args[0])
            return None if factor is None else ((args[0] * factor, *args[1:]), kwargs)

        return hook

    def on_block(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before, after = _hidden(args, kwargs), _output(output)
            factor = gate(name, before)
            if factor is None:
                return None
            mixed = before + factor * (after - before)
            return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

        return hook

    handles = [m.register_forward_pre_hook(on_input(name), with_kwargs=True) for name, m in readers.items()]
    handles += [m.register_forward_hook(on_block(name), with_kwargs=True) for name, m in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    units: Sequence[PrunableGroups],
    blocks: Mapping[str, nn.Module],
    label: str = "",
) -> dict[str, Tensor]:
    """``Σ_samples |∂L/∂ξ_u|`` at ``ξ = 1`` for a gate ``ξ_u`` on each unit, and on the update of each block.

    That is ``|Σ_t x_u(t)ᵀ ∂L/∂x_u(t)|``: to first order what the loss changes by without the unit. By the name of the
    reader, float64 ``[units]``, or of the block, ``[1]``.

    Raises ``ModelError`` for a model without a loss (``ranking_loss``), and ``NumericalError`` where it is not finite.
    """
    readers = {one.consumer: model.get_submodule(one.consumer) for one in units}
    columns = {one.consumer: one.columns for one in units}
    found: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in _gate_gradients(model, batch, readers, blocks, label).items():
            parts = gradient[:, columns[name].to(gradient.device)].sum(-1) if name in columns else gradient
            score = len(parts) * parts.double().abs().sum(0)  # the loss is a mean over the samples
            found[name] = found[name] + score if name in found else score
    collectives.all_reduce_dict_(found, [*readers, *blocks], "sum")
    return found


def _gate_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    readers: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    label: str,
) -> dict[str, Tensor]:
    """The gradient of the loss in the gates: [samples, in] for a reader, [samples, 1] for a block."""
    gates: dict[str, Tensor] = {}

    def gate(name: str, tensor: Tensor) -> Tensor:
        width = tensor.shape[-1] if name in readers else 1
        shape = (tensor.shape[0], *(1 for _ in tensor.shape[1:-1]), width)
        gates[name] = torch.ones(shape, dtype=tensor.dtype, device=tensor.device, requires_grad=True)
        return gates[name]

    with enable_double_backward(model, ()), apply_gates(readers, blocks, gate):
        loss = ranking_loss(model, batch, label)
        if not math.isfinite(float(loss.detach())):
            raise NumericalError(
                f"{label}: the loss is {float(loss.detach())} on the calibration data; check the weights"
            )
        gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    return {name: gradient.flatten(1) for name, gradient in zip(gates, gradients, strict=True) if gradient is not None}


def ranking_loss(model: nn.Module, batch: Mapping[str, Any], label: str = "") -> Tensor:
    """The loss by whose gradient gates are ranked, mean over what is predicted; a scalar.

    The model's own loss with the labels of the batch, or with its inputs as labels for a causal language model; else
    ``-log p`` of the class that the model itself finds most probable, at every position. Raises ``ModelError``.
    """
    if "labels" in batch or is_causal(model):
        return calibration_loss(model, batch)
    logits = getattr(model(**batch), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise ModelError(
            f"{label}: {type(model).__name__} predicts no classes, so it has no loss without labels; rank by activation"
        )
    chosen = logits.detach().argmax(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), chosen.flatten(), reduction="none")
    mask = batch.get("attention_mask")
    # A mask of another shape (of an encoder, for a decoder's outputs) says nothing about these positions.
    kept = mask.flatten().to(loss) if isinstance(mask, Tensor) and mask.shape == chosen.shape else torch.ones_like(loss)
    return (loss * kept).sum() / kept.sum()


def _hidden(args: Any, kwargs: Any) -> Tensor:
    tensor = first_tensor(args, kwargs)
    assert tensor is not None
    return tensor


def _output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]

"""Block reconstruction: train one block to reproduce given outputs, ``min mean (block(x) - y)²``.

The rest of the model does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from ...errors import NumericalError

# How often, at most, the loss over all examples is computed: each time costs a forward pass over them.
MAX_EVALUATIONS = 10


class BlockExamples:
    """Inputs and reference outputs of a block, moved to a device one example at a time.

    Attributes:
        examples: objects with ``args``, ``kwargs``, ``output`` and ``rows``; outputs are tensors, or tuples that start
            with one, and ``rows`` is True for the rows of these tensors that count (None: all).
        device: the device of the block.
    """

    def __init__(self, examples: Sequence[Any], device: torch.device) -> None:
        self.examples, self.device = examples, device

    def __len__(self) -> int:
        return len(self.examples)

    def num_sequences(self, number: int) -> int:
        """Return the number of sequences in one example, without those that are all padding."""
        example = self.examples[number]
        if example.rows is None:
            return len(_hidden_states(example.output))
        return int(example.rows.flatten(1).any(1).sum()) if example.rows.dim() > 1 else 1

    @property
    def total_sequences(self) -> int:
        """Return the number of sequences in all examples."""
        return sum(map(self.num_sequences, range(len(self))))

    def require_finite(self, label: str) -> None:
        """Raise ``NumericalError``, with a message that starts with ``label``, if an output is not finite."""
        for number, example in enumerate(self.examples):
            output = _hidden_states(example.output)
            output = output if example.rows is None else output[example.rows.to(output.device)]
            if not bool(torch.isfinite(output).all()):
                raise NumericalError(f"{label} gave NaN or infinite outputs on calibration batch {number}")

    def loss(self, block: Callable[..., Any], number: int) -> Tensor:
        """Return the mean squared error of the block's output on one example, float32.

        With padding it is the mean over sequences of the mean over the rows of a sequence that count, so that it does
        not depend on which sequences share a batch.
        """
        example = self.examples[number]
        args = [_without_cache(value) for value in example.args]
        kwargs = {name: _without_cache(value) for name, value in example.kwargs.items()}
        args, kwargs, target = _to((args, kwargs, _hidden_states(example.output)), self.device)
        output = _hidden_states(block(*args, **kwargs))
        if example.rows is None:
            return F.mse_loss(output.float(), target.float())
        return _masked_mse(output.float(), target.float(), example.rows.to(self.device))

    @torch.no_grad()
    def mean_loss(self, block: Callable[..., Any]) -> float:
        """Return the mean loss over all sequences of all examples."""
        sums = [float(self.loss(block, n)) * self.num_sequences(n) for n in range(len(self))]
        return math.fsum(sums) / max(self.total_sequences, 1)

    def batches(self, batch_size: int, seed: int) -> Iterator[list[int]]:
        """Yield groups of examples of at least ``batch_size`` sequences in random order, endlessly."""
        generator = torch.Generator().manual_seed(seed)
        group: list[int] = []
        while True:
            for number in torch.randperm(len(self), generator=generator).tolist():
                group.append(number)
                if sum(map(self.num_sequences, group)) >= min(batch_size, self.total_sequences):
                    yield group
                    group = []


def _masked_mse(output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Return the mean over sequences of the mean squared error over the rows that count."""
    if rows.dim() == 1:  # flattened: sequences are not told apart
        rows, output, target = rows[None], output[None], target[None]
    errors = torch.zeros_like(output[..., 0]).masked_scatter(rows, (output[rows] - target[rows]).square().mean(-1))
    counts = rows.flatten(1).sum(1)
    return (errors.flatten(1).sum(1) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def _hidden_states(output: Any) -> Tensor:
    """Return the hidden states among the outputs of a block."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def trainable_vectors(block: nn.Module, enabled: bool = True) -> Iterator[list[nn.Parameter]]:
    """Make the vectors of a block (biases, norm weights) require gradients for the length of a ``with`` block.

    Yields the vectors, none unless ``enabled``. Quantization parameters (``weight_scale``, ``input_scale``, ...) are
    not among them. The flags are restored at the end.
    """
    named = block.named_parameters() if enabled else ()
    chosen = [p for name, p in named if p.dim() == 1 and p.is_floating_point() and not _is_quantization_parameter(name)]
    flags = [parameter.requires_grad for parameter in chosen]
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter, flag in zip(chosen, flags, strict=True):
            parameter.requires_grad_(flag)


def _is_quantization_parameter(name: str) -> bool:
    return name.rpartition(".")[2].startswith(("weight_", "input_", "output_"))


def reconstruct_block(
    block: Callable[..., Any],
    parameters: Sequence[Tensor],
    examples: BlockExamples,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    masks: Mapping[int, Tensor],
    label: str,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    evaluate_every: int = 1,
) -> tuple[float, float]:
    """Train ``parameters`` until ``block`` reproduces the outputs of ``examples``; keep the best state seen.

    Args:
        block: the block, in the training or evaluation mode that the caller chose, or a function that computes it.
        parameters: the tensors to train, leaves that require gradients; written in place.
        examples: inputs and reference outputs.
        learning_rate: of the first step; it decays linearly to 0. 0 trains nothing.
        steps: optimizer steps.
        batch_size: sequences per step, in whole examples.
        seed: seed of the order of the examples.
        masks: ``id`` of one of ``parameters`` -> bool mask of its shape; values where it is False do not change.
        label: start of the message of the ``NumericalError`` that is raised if the loss is not finite.
        optimizer: makes the optimizer of the tensors that it is given; None for Adam. The rates of its groups decay.
        evaluate_every: epochs, at least, between computations of the loss over all examples. One takes a third of the
            time of an epoch.

    Returns:
        The mean loss over all examples before and after; the second is not larger.
    """
    before = best = _checked(examples.mean_loss(block), label)
    if not learning_rate or not steps:
        return before, before
    masters = [_master(tensor) for tensor in parameters]
    descent = torch.optim.Adam(masters, lr=learning_rate) if optimizer is None else optimizer(masters)
    rates = [group["lr"] for group in descent.param_groups]
    kept = [tensor.detach().clone() for tensor in parameters]
    epoch = math.ceil(examples.total_sequences / batch_size)
    every = max(math.ceil(steps / MAX_EVALUATIONS), evaluate_every * epoch if epoch > 1 else 1)
    for step, numbers in zip(range(steps), examples.batches(batch_size, seed), strict=False):
        for group, rate in zip(descent.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        _checked(_set_gradients(block, parameters, masters, examples, numbers, masks), label)
        descent.step()
        _copy(masters, parameters)
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = _checked(examples.mean_loss(block), label)
            if loss < best:
                best, kept = loss, [tensor.detach().clone() for tensor in parameters]
    _copy(kept, parameters)
    for master in masters:
        master.grad = None
    return before, best


def _master(tensor: Tensor) -> Tensor:
    """Return the tensor that the optimizer updates: itself, or a float32 copy if it is in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()


def _set_gradients(
    block: Callable[..., Any],
    parameters: Sequence[Tensor],
    masters: Sequence[Tensor],
    examples: BlockExamples,
    numbers: Sequence[int],
    masks: Mapping[int, Tensor],
) -> float:
    """Set the gradients of ``masters`` to those of the mean loss of some examples, and return that loss."""
    total, sequences = 0.0, sum(map(examples.num_sequences, numbers))
    for master in masters:
        master.grad = torch.zeros_like(master)
    for number in numbers:
        with torch.enable_grad():
            loss = examples.loss(block, number) * (examples.num_sequences(number) / max(sequences, 1))
            found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        total += float(loss.detach())
        for master, gradient in zip(masters, found, strict=True):
            if gradient is not None:
                master.grad.add_(gradient)  # type: ignore[union-attr]
    for tensor, master in zip(parameters, masters, strict=True):
        if id(tensor) in masks:
            master.grad.mul_(masks[id(tensor)].to(master.device))  # type: ignore[union-attr]
    return total


@torch.no_grad()
def _copy(sources: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for source, tensor in zip(sources, tensors, strict=True):
        if source is not tensor:
            tensor.copy_(source)


def _checked(loss: float, label: str) -> float:
    if not math.isfinite(loss):
        raise NumericalError(
            f"{label}: the distance to the original block's outputs became NaN or infinite; lower the learning rate"
        )
    return loss


def _without_cache(value: Any) -> Any:
    # The cache already holds the keys of the recorded pass, so that attention would see each token twice.
    return None if isinstance(value, Cache) else value


def _to(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)

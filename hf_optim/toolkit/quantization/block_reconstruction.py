"""Block reconstruction: train one block to reproduce given outputs, ``min mean (block(x) - y)²``.

The rest of the model does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from ...errors import NumericalError

# How often, at most, states are compared, and on how many sequences and tokens, at least: each time costs a forward
# pass over them.
MAX_EVALUATIONS = 10
COMPARED_SEQUENCES, COMPARED_TOKENS = 32, 4096
# A loss that is smaller than this share of the one before training is smaller on the other sequences, too.
CERTAIN_GAIN = 0.9

# Computes from the trained parameters what a block takes in place of its own weights, by name.
Weights = Callable[[], Mapping[str, Tensor]]


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

    def num_tokens(self, number: int) -> int:
        """Return the number of rows of one example that count."""
        example = self.examples[number]
        return _hidden_states(example.output)[..., 0].numel() if example.rows is None else int(example.rows.sum())

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The sequences and the tokens of each example."""
        return [(self.num_sequences(number), self.num_tokens(number)) for number in range(len(self))]

    @property
    def total_sequences(self) -> int:
        """The number of sequences in all examples."""
        return sum(sequences for sequences, _ in self.sizes)

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
    def mean_loss(self, block: Callable[..., Any], numbers: Iterable[int]) -> float:
        """Return the mean loss over the sequences of some examples."""
        counts = {number: self.num_sequences(number) for number in numbers}
        total = math.fsum(float(self.loss(block, number)) * count for number, count in counts.items())
        return total / max(sum(counts.values()), 1)

    def some(self, sequences: int, tokens: int = 0) -> list[int]:
        """Return evenly spaced examples with so many sequences and tokens, at least; all, if there are no more."""
        wanted = (sequences, tokens)
        totals = [max(1, sum(column)) for column in zip(*self.sizes, strict=True)]
        share = max(want / total for want, total in zip(wanted, totals, strict=True))
        for count in range(max(1, math.ceil(min(share, 1.0) * len(self))), len(self)):
            found = [(2 * number + 1) * len(self) // (2 * count) for number in range(count)]
            if self._is_enough(found, wanted):
                return found
        return list(range(len(self)))

    def batches(self, batch_size: int, seed: int, tokens: int = 0) -> Iterator[list[int]]:
        """Yield groups of examples of so many sequences and tokens, at least, in random order, endlessly.

        A group has no more examples than there are.
        """
        generator = torch.Generator().manual_seed(seed)
        group: list[int] = []
        while True:
            for number in torch.randperm(len(self), generator=generator).tolist():
                group.append(number)
                if len(group) >= len(self) or self._is_enough(group, (batch_size, tokens)):
                    yield group
                    group = []

    def _is_enough(self, numbers: Sequence[int], wanted: tuple[int, int]) -> bool:
        found = zip(*(self.sizes[number] for number in numbers), strict=True)
        return all(sum(column) >= want for column, want in zip(found, wanted, strict=True))


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
    weights: Weights | None = None,
    batch_tokens: int = 0,
) -> tuple[float, float]:
    """Train ``parameters`` until ``block`` reproduces the outputs of ``examples``; keep the best state seen.

    States are compared on the same ``COMPARED_SEQUENCES`` sequences, more if they have few tokens. A gain below a tenth
    there over the state before training is confirmed on all sequences, so that the loss does not rise.

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
        evaluate_every: epochs, at least, between comparisons.
        weights: computed once for each step and comparison, for all of its examples; ``block`` gets them as its first
            argument. None for a block that reads the parameters itself.
        batch_tokens: tokens per step, at least: short sequences are taken more at a time.

    Returns:
        The mean loss before and after over the sequences that were compared; the second is not larger.
    """

    def mean_loss(numbers: Iterable[int]) -> float:
        with torch.no_grad():
            return _checked(examples.mean_loss(block if weights is None else partial(block, weights()), numbers), label)

    compared, everything = examples.some(COMPARED_SEQUENCES, COMPARED_TOKENS), range(len(examples))
    before = best = mean_loss(compared)
    if not learning_rate or not steps:
        return before, before
    masters = [_master(tensor) for tensor in parameters]
    descent = torch.optim.Adam(masters, lr=learning_rate) if optimizer is None else optimizer(masters)
    rates = [group["lr"] for group in descent.param_groups]
    first = kept = _copies(parameters)
    tokens = sum(count for _, count in examples.sizes)
    epoch = min(math.ceil(examples.total_sequences / batch_size), math.ceil(tokens / max(batch_tokens, 1)))
    every = max(math.ceil(steps / MAX_EVALUATIONS), evaluate_every * epoch if epoch > 1 else 1)
    for step, numbers in zip(range(steps), examples.batches(batch_size, seed, batch_tokens), strict=False):
        for group, rate in zip(descent.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        _checked(_set_gradients(block, parameters, masters, examples, numbers, masks, weights), label)
        descent.step()
        _copy(masters, parameters)
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = mean_loss(compared)
            if loss < best:
                best, kept = loss, _copies(parameters)
    if kept is not first and best > CERTAIN_GAIN * before and len(compared) < len(everything):
        totals = []
        for state in (first, kept):
            _copy(state, parameters)
            totals.append(mean_loss(everything))
        best, kept = (best, kept) if totals[1] < totals[0] else (before, first)
    _copy(kept, parameters)
    for master in masters:
        master.grad = None
    return before, best


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _master(tensor: Tensor) -> Tensor:
    """Return a tensor that sums and updates are exact in: itself, or a float32 copy if it is in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()


def _set_gradients(
    block: Callable[..., Any],
    parameters: Sequence[Tensor],
    masters: Sequence[Tensor],
    examples: BlockExamples,
    numbers: Sequence[int],
    masks: Mapping[int, Tensor],
    weights: Weights | None,
) -> float:
    """Set the gradients of ``masters`` to those of the mean loss of some examples, and return that loss."""
    total, sequences = 0.0, sum(map(examples.num_sequences, numbers))
    with torch.enable_grad():
        made = {} if weights is None else weights()
    # The graphs of the examples end at the weights, so that the one which makes the weights is walked once.
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
    run = block if weights is None else partial(block, leaves)
    sums: list[Tensor | None] = [None] * (len(parameters) + len(leaves))
    for number in numbers:
        with torch.enable_grad():
            loss = examples.loss(run, number) * (examples.num_sequences(number) / max(sequences, 1))
            found = torch.autograd.grad(loss, [*parameters, *leaves.values()], allow_unused=True)
        total += float(loss.detach())
        sums = [_sum(each, gradient) for each, gradient in zip(sums, found, strict=True)]
    gradients, of_weights = sums[: len(parameters)], sums[len(parameters) :]
    used = [
        (w, gradient.to(w.dtype)) for w, gradient in zip(made.values(), of_weights, strict=True) if gradient is not None
    ]
    if used:
        found = torch.autograd.grad([w for w, _ in used], parameters, [g for _, g in used], allow_unused=True)
        gradients = [_sum(each, gradient) for each, gradient in zip(gradients, found, strict=True)]
    for tensor, master, gradient in zip(parameters, masters, gradients, strict=True):
        master.grad = torch.zeros_like(master) if gradient is None else gradient.to(master.dtype)
        if id(tensor) in masks:
            master.grad = master.grad * masks[id(tensor)].to(master.device)
    return total


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, in float32 at least. Neither is written to: autograd may have given it twice."""
    if gradient is None:
        return total
    return _master(gradient) if total is None else total + gradient


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

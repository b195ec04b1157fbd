"""Training one block to give outputs that are known, ``min mean (block(x) - y)²``; the rest of the model rests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from ...errors import NumericalError

# How often, at most, the loss over all examples is taken: each time costs a forward pass over them.
CHECKS = 10


class BlockExamples:
    """Examples ``(args, kwargs, output)`` of a block, moved to a device one by one.

    Attributes:
        examples: objects with ``args``, ``kwargs`` and ``output``; outputs are tensors, or tuples that begin with one.
        device: where the block is.
    """

    def __init__(self, examples: Sequence[Any], device: torch.device) -> None:
        self.examples, self.device = examples, device

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, number: int) -> int:
        """Sequences in one example."""
        return len(first(self.examples[number].output))

    def require_finite(self, what: str) -> None:
        """Raise ``NumericalError``, beginning with ``what``, if an output is not finite."""
        for number, example in enumerate(self.examples):
            if not bool(torch.isfinite(first(example.output)).all()):
                raise NumericalError(f"{what} gave NaN or infinite outputs on calibration batch {number}")

    def loss(self, block: nn.Module, number: int) -> Tensor:
        """The mean squared error of the block's output on one example, float32."""
        example = self.examples[number]
        args = [_uncached(value) for value in example.args]
        kwargs = {name: _uncached(value) for name, value in example.kwargs.items()}
        args, kwargs, target = _to((args, kwargs, first(example.output)), self.device)
        return F.mse_loss(first(block(*args, **kwargs)).float(), target.float())

    @torch.no_grad()
    def total(self, block: nn.Module) -> float:
        """The loss over all examples, each counted by its sequences."""
        sums = [float(self.loss(block, n)) * self.rows(n) for n in range(len(self))]
        return math.fsum(sums) / sum(map(self.rows, range(len(self))))

    def batches(self, rows: int, seed: int) -> Iterator[list[int]]:
        """Groups of examples of at least ``rows`` sequences, in a random order, without end."""
        generator = torch.Generator().manual_seed(seed)
        group: list[int] = []
        while True:
            for number in torch.randperm(len(self), generator=generator).tolist():
                group.append(number)
                if sum(map(self.rows, group)) >= min(rows, self.all_rows):
                    yield group
                    group = []

    @property
    def all_rows(self) -> int:
        return sum(map(self.rows, range(len(self))))


def first(output: Any) -> Tensor:
    """The hidden states of what a block returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def trainable_vectors(block: nn.Module, wanted: bool = True) -> Iterator[list[nn.Parameter]]:
    """The vectors of a block (biases, norm weights), asking for gradients; none of them unless ``wanted``.

    What belongs to a grid (``weight_scale``, ``input_scale``, ...) is not among them. Flags are as before afterwards.
    """
    named = block.named_parameters() if wanted else ()
    chosen = [p for name, p in named if p.dim() == 1 and p.is_floating_point() and not _of_a_grid(name)]
    flags = [parameter.requires_grad for parameter in chosen]
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter, flag in zip(chosen, flags, strict=True):
            parameter.requires_grad_(flag)


def _of_a_grid(name: str) -> bool:
    return name.rpartition(".")[2].startswith(("weight_", "input_", "output_"))


def reconstruct_block(
    block: nn.Module,
    moved: Sequence[Tensor],
    lessons: BlockExamples,
    *,
    learning_rate: float,
    steps: int,
    rows: int,
    seed: int,
    masks: Mapping[int, Tensor],
    what: str,
) -> tuple[float, float]:
    """Train ``moved`` with Adam so that ``block`` gives the outputs of ``lessons``; keeps the best state it sees.

    Args:
        block: as it stands; whether it is in training mode is the caller's business.
        moved: the tensors to train, leaves that ask for gradients; written in place.
        lessons: what to match.
        learning_rate: of the first step; it falls to 0 along a straight line. 0 trains nothing.
        steps: optimizer steps.
        rows: sequences per step, in whole examples.
        seed: of the order of the examples.
        masks: ``id`` of a tensor among ``moved`` -> bool mask of its shape; where it is False nothing moves.
        what: what a ``NumericalError`` begins with, when the loss is not finite.

    Returns:
        The loss over all examples before and after; the second is not larger.
    """
    before = best = _checked(lessons.total(block), what)
    if not learning_rate or not steps:
        return before, before
    masters = [_master(tensor) for tensor in moved]
    optimizer = torch.optim.Adam(masters, lr=learning_rate)
    kept = [tensor.detach().clone() for tensor in moved]
    check = max(math.ceil(steps / CHECKS), math.ceil(lessons.all_rows / rows))
    for step, numbers in zip(range(steps), lessons.batches(rows, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        _checked(_gradients(block, moved, masters, lessons, numbers, masks), what)
        optimizer.step()
        _copy(masters, moved)
        if (step + 1) % check == 0 or step + 1 == steps:
            loss = _checked(lessons.total(block), what)
            if loss < best:
                best, kept = loss, [tensor.detach().clone() for tensor in moved]
    _copy(kept, moved)
    for master in masters:
        master.grad = None
    return before, best


def _master(tensor: Tensor) -> Tensor:
    """What the optimizer moves: the tensor, or a float32 copy of one in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()


def _gradients(
    block: nn.Module,
    moved: Sequence[Tensor],
    masters: Sequence[Tensor],
    lessons: BlockExamples,
    numbers: Sequence[int],
    masks: Mapping[int, Tensor],
) -> float:
    """Put the gradients of the mean loss of some examples on ``masters``; returns that loss."""
    total, rows = 0.0, sum(map(lessons.rows, numbers))
    for master in masters:
        master.grad = torch.zeros_like(master)
    for number in numbers:
        with torch.enable_grad():
            loss = lessons.loss(block, number) * (lessons.rows(number) / rows)
            found = torch.autograd.grad(loss, list(moved), allow_unused=True)
        total += float(loss.detach())
        for master, gradient in zip(masters, found, strict=True):
            if gradient is not None:
                master.grad.add_(gradient)  # type: ignore[union-attr]
    for tensor, master in zip(moved, masters, strict=True):
        if id(tensor) in masks:
            master.grad.mul_(masks[id(tensor)].to(master.device))  # type: ignore[union-attr]
    return total


@torch.no_grad()
def _copy(sources: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for source, tensor in zip(sources, tensors, strict=True):
        if source is not tensor:
            tensor.copy_(source)


def _checked(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise NumericalError(
            f"{what}: the distance to the original block's outputs became NaN or infinite; lower the learning rate"
        )
    return loss


def _uncached(value: Any) -> Any:
    # A cache already holds the keys of the pass that was recorded; what attends to them would see each token twice.
    return None if isinstance(value, Cache) else value


def _to(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)

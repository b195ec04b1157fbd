"""What the blocks of a stack are called with, found out in one forward of the model for each batch.

The stubs that stand for the blocks record their arguments and return markers: tensors of NaN, each a new object. An
argument that *is* the marker of the block before it is the hidden state. If every block of the stack gets the hidden
state in the same place, and nothing else that it gets holds a NaN, then the rest does not depend on what blocks
compute: masks and position embeddings can be kept, and only the hidden state flows. Otherwise (position biases that a
block hands on, operations between two blocks) the model's own forward must be run up to each block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...toolkit import topology
from ..forward import Batch, BlockInputsCaptured, replace_forwards


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that is the same whatever the blocks compute: its place among those of the batch."""

    index: int


class _Hidden:
    """Stands for the hidden state."""


HIDDEN = _Hidden()


@dataclass(frozen=True)
class CallSignature:
    """How a stack hands on its hidden state.

    Attributes:
        place: of the hidden state among the leaves of a block's arguments.
        spec: of the tree of a block's arguments.
        output: leaves of what a block returns, with ``HIDDEN`` for the hidden state.
        output_spec: of the tree of that.
        dtype: of the hidden state that a block returns.
    """

    place: int
    spec: Any
    output: tuple[Any, ...]
    output_spec: Any
    dtype: torch.dtype

    def returned(self, hidden: Any) -> Any:
        """What a block returns, given the hidden state."""
        leaves = [hidden if leaf is HIDDEN else leaf for leaf in self.output]
        return pytree.tree_unflatten(leaves, self.output_spec)

    def hidden_of(self, output: Any) -> Tensor | None:
        """The hidden state in what a block returned; None if that is not of this shape."""
        leaves, spec = pytree.tree_flatten(output)
        if spec != self.output_spec or len(leaves) != len(self.output):
            return None
        found = [leaf for leaf, mark in zip(leaves, self.output, strict=True) if mark is HIDDEN]
        return found[0] if sum(isinstance(leaf, Tensor) for leaf in leaves) == 1 else None


class RecordedArguments:
    """The arguments of all blocks of one stack, but for the hidden state, for the batches surveyed so far."""

    def __init__(self, shape: CallSignature) -> None:
        self.shape = shape
        self._calls: dict[int, list[list[Any]]] = {}
        self._slots: dict[int, list[Tensor]] = {}
        self._moved: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, number: int, calls: list[list[Any]], slots: list[Tensor]) -> None:
        """Take the calls of a batch. A tensor equal to the one in the same slot of the batch before is kept once."""
        before = self._slots.get(number - 1, [])
        for index, (new, old) in enumerate(zip(slots, before, strict=False)):
            if new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old):
                slots[index] = old
        self._calls[number], self._slots[number] = calls, slots

    def of(self, position: int, number: int, hidden: Tensor, device: torch.device) -> tuple[Any, Any]:
        """``(args, kwargs)`` of the block at ``position`` in the stack for a batch, on ``device``."""
        slots = [self._on(device, tensor) for tensor in self._slots[number]]
        self._moved = {(id(tensor), device): moved for tensor, moved in zip(self._slots[number], slots, strict=True)}
        leaves = [
            slots[leaf.index] if isinstance(leaf, _Slot) else hidden if leaf is HIDDEN else leaf
            for leaf in self._calls[number][position]
        ]
        return pytree.tree_unflatten(leaves, self.shape.spec)

    def _on(self, device: torch.device, tensor: Tensor) -> Tensor:
        known = self._moved.get((id(tensor), device))
        return tensor.to(device, non_blocking=True) if known is None else known


def infer_signature(first: tuple[Any, Any], output: Any) -> CallSignature | None:
    """The shape of a stack by its first block's arguments and output; None if there is more than a hidden state.

    The place of the hidden state is not known yet (-1) unless only one tensor is of the output's shape.
    """
    leaves, spec = pytree.tree_flatten(first)
    out, out_spec = pytree.tree_flatten(output)
    tensors = [leaf for leaf in out if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        return None
    marked = tuple(HIDDEN if isinstance(leaf, Tensor) else leaf for leaf in out)
    alike = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.shape == tensors[0].shape and leaf.is_floating_point()
    ]
    return CallSignature(alike[0], spec, marked, out_spec, tensors[0].dtype) if len(alike) == 1 else None


def record_calls(
    model: nn.Module,
    stack: Sequence[topology.Block],
    batch: Batch,
    shape: CallSignature,
    earlier: Mapping[nn.Module, Callable],
) -> tuple[Tensor, list[list[Any]], list[Tensor]] | None:
    """The first block's hidden state, and the calls of all blocks of a stack, for one batch.

    ``earlier`` are the forwards of the blocks before the stack. None if the arguments depend on what blocks compute,
    or blocks are called in another way than the first.
    """
    seen: list[list[Any]] = []
    markers: list[Tensor] = []
    fitting = True

    def stub(position: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal fitting
            leaves, spec = pytree.tree_flatten((args, kwargs))
            fitting = fitting and spec == shape.spec and position == len(seen)
            seen.append(leaves)
            if not fitting or position == len(stack) - 1:
                raise BlockInputsCaptured(args, kwargs)
            like = leaves[shape.place]
            marker = torch.full((), torch.nan, dtype=shape.dtype, device=like.device).expand(like.shape)
            markers.append(marker)
            return shape.returned(marker)

        return forward

    forwards = {block.module: stub(position) for position, block in enumerate(stack)}
    with replace_forwards({**earlier, **forwards}), contextlib.suppress(BlockInputsCaptured):
        model(**batch)
    if not fitting or len(seen) != len(stack):
        return None
    hidden = seen[0][shape.place]
    encoded = _encoded(seen, [hidden, *markers], shape.place)
    return None if encoded is None else (hidden, *encoded)


def _encoded(
    seen: list[list[Any]], hidden: Sequence[Tensor], place: int
) -> tuple[list[list[Any]], list[Tensor]] | None:
    """The calls with slots in the places of tensors; None where a tensor depends on a marker."""
    slots: dict[int, int] = {}
    tensors: list[Tensor] = []
    calls: list[list[Any]] = []
    for leaves, own in zip(seen, hidden, strict=True):
        if leaves[place] is not own:
            return None
        call: list[Any] = []
        for index, leaf in enumerate(leaves):
            if index == place:
                call.append(HIDDEN)
            elif isinstance(leaf, Tensor):
                if id(leaf) not in slots:
                    if leaf.is_floating_point() and bool(leaf.isnan().any()):
                        return None
                    slots[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                call.append(_Slot(slots[id(leaf)]))
            else:
                call.append(leaf)
        calls.append(call)
    return calls, tensors

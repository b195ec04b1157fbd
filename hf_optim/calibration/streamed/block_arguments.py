"""Record the arguments of all blocks of a block list, with one forward of the model per batch.

Stubs in place of the blocks record their arguments and return placeholders: new tensors full of NaN. An argument that
*is* the placeholder returned by the preceding block is the hidden state. If every block of the list takes the hidden
state in the same position, and no other argument contains a NaN, then the other arguments (masks, position embeddings)
do not depend on what blocks compute: they are kept, and only the hidden state is passed on. Otherwise (a position bias
that blocks return, operations between two blocks) the model's own forward must run up to each block.
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
class _TensorRef:
    """A reference to a recorded tensor, in place of it in a call: its index in the tensors of that batch."""

    index: int


class _Hidden:
    """The type of ``HIDDEN``, which is in place of the hidden state in a call."""


HIDDEN = _Hidden()


@dataclass(frozen=True)
class CallSignature:
    """How the blocks of a list take and return the hidden state.

    Attributes:
        hidden_index: index of the hidden state among the leaves of a block's ``(args, kwargs)``.
        input_spec: the pytree spec of ``(args, kwargs)``.
        output_leaves: the leaves of a block's output, with ``HIDDEN`` for the hidden state.
        output_spec: the pytree spec of the output.
        dtype: of the hidden state that a block returns.
    """

    hidden_index: int
    input_spec: Any
    output_leaves: tuple[Any, ...]
    output_spec: Any
    dtype: torch.dtype

    def make_output(self, hidden: Any) -> Any:
        """Return the output of a block with this hidden state."""
        leaves = [hidden if leaf is HIDDEN else leaf for leaf in self.output_leaves]
        return pytree.tree_unflatten(leaves, self.output_spec)

    def extract_hidden(self, output: Any) -> Tensor | None:
        """Return the hidden state in the output of a block, or None if the output has another structure."""
        leaves, spec = pytree.tree_flatten(output)
        if spec != self.output_spec or len(leaves) != len(self.output_leaves):
            return None
        found = [leaf for leaf, expected in zip(leaves, self.output_leaves, strict=True) if expected is HIDDEN]
        return found[0] if sum(isinstance(leaf, Tensor) for leaf in leaves) == 1 else None


class RecordedArguments:
    """The arguments of all blocks of one list, except the hidden state, for the batches recorded so far."""

    def __init__(self, signature: CallSignature) -> None:
        self.signature = signature
        self._calls: dict[int, list[list[Any]]] = {}
        self._tensors: dict[int, list[Tensor]] = {}
        self._moved: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, number: int, calls: list[list[Any]], tensors: list[Tensor]) -> None:
        """Add the calls of a batch. A tensor equal to its counterpart in the preceding batch is stored once."""
        former = self._tensors.get(number - 1, [])
        for index, (new, old) in enumerate(zip(tensors, former, strict=False)):
            if new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old):
                tensors[index] = old
        self._calls[number], self._tensors[number] = calls, tensors

    def block_inputs(
        self, position: int, number: int, hidden: Tensor, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the ``(args, kwargs)`` of the block at ``position`` in the list for a batch, on ``device``."""
        tensors = [self._on(device, tensor) for tensor in self._tensors[number]]
        self._moved = {
            (id(tensor), device): moved for tensor, moved in zip(self._tensors[number], tensors, strict=True)
        }
        leaves = [
            tensors[leaf.index] if isinstance(leaf, _TensorRef) else hidden if leaf is HIDDEN else leaf
            for leaf in self._calls[number][position]
        ]
        return pytree.tree_unflatten(leaves, self.signature.input_spec)

    def _on(self, device: torch.device, tensor: Tensor) -> Tensor:
        moved = self._moved.get((id(tensor), device))
        return tensor.to(device, non_blocking=True) if moved is None else moved


def infer_signature(inputs: tuple[Any, Any], output: Any) -> CallSignature | None:
    """Infer the signature of a block list from the ``(args, kwargs)`` and the output of its first block.

    Returns None unless the output has exactly one tensor, and exactly one floating-point input has its shape.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    output_leaves, output_spec = pytree.tree_flatten(output)
    tensors = [leaf for leaf in output_leaves if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        return None
    marked = tuple(HIDDEN if isinstance(leaf, Tensor) else leaf for leaf in output_leaves)
    candidates = [
        index
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.shape == tensors[0].shape and leaf.is_floating_point()
    ]
    if len(candidates) != 1:
        return None
    return CallSignature(candidates[0], spec, marked, output_spec, tensors[0].dtype)


def record_calls(
    model: nn.Module,
    block_list: Sequence[topology.Block],
    batch: Batch,
    signature: CallSignature,
    earlier: Mapping[nn.Module, Callable[..., Any]],
) -> tuple[Tensor, list[list[Any]], list[Tensor]] | None:
    """Run the model on one batch and record how it calls the blocks of a list.

    Args:
        model: the model; what lies outside the blocks must be materialized.
        block_list: consecutive blocks of the model, in execution order.
        batch: the inputs of the model.
        signature: how the first block is called.
        earlier: forwards for the blocks before the list.

    Returns the hidden state that the first block takes, the leaves of each block's call (with ``HIDDEN`` and references
    to tensors in their place), and these tensors. None if an argument depends on what blocks compute, or if a block is
    called with another signature than the first.
    """
    seen: list[list[Any]] = []
    placeholders: list[Tensor] = []
    uniform = True

    def stub(position: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal uniform
            leaves, spec = pytree.tree_flatten((args, kwargs))
            uniform = uniform and spec == signature.input_spec and position == len(seen)
            seen.append(leaves)
            if not uniform or position == len(block_list) - 1:
                raise BlockInputsCaptured(args, kwargs)
            like = leaves[signature.hidden_index]
            placeholder = torch.full((), torch.nan, dtype=signature.dtype, device=like.device).expand(like.shape)
            placeholders.append(placeholder)
            return signature.make_output(placeholder)

        return forward

    forwards = {block.module: stub(position) for position, block in enumerate(block_list)}
    with replace_forwards({**earlier, **forwards}), contextlib.suppress(BlockInputsCaptured):
        model(**batch)
    if not uniform or len(seen) != len(block_list):
        return None
    hidden = seen[0][signature.hidden_index]
    encoded = _encode_calls(seen, [hidden, *placeholders], signature.hidden_index)
    return None if encoded is None else (hidden, *encoded)


def _encode_calls(
    seen: list[list[Any]], hidden: Sequence[Tensor], hidden_index: int
) -> tuple[list[list[Any]], list[Tensor]] | None:
    """Replace the tensors of the calls by references; None if a tensor depends on a placeholder."""
    indices: dict[int, int] = {}
    tensors: list[Tensor] = []
    calls: list[list[Any]] = []
    for leaves, own in zip(seen, hidden, strict=True):
        if leaves[hidden_index] is not own:
            return None
        call: list[Any] = []
        for index, leaf in enumerate(leaves):
            if index == hidden_index:
                call.append(HIDDEN)
            elif isinstance(leaf, Tensor):
                if id(leaf) not in indices:
                    if leaf.is_floating_point() and bool(leaf.isnan().any()):
                        return None
                    indices[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                call.append(_TensorRef(indices[id(leaf)]))
            else:
                call.append(leaf)
        calls.append(call)
    return calls, tensors

"""Run a part of a model: its blocks up to an exit, or between two; and record the states at its exits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .attachment import require_exits
from .views import StandIn, as_returned, first_state, list_with, returned_state, view

# From the number of an exit and its state to what is recorded, and what the next block reads.
Split = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass
class ExitRun:
    """What a run of some blocks gives.

    Attributes:
        hidden: the state after the last block that ran, ``[batch, tokens, width]``.
        output: what the model returns there, with its head or that of the exit.
    """

    hidden: Tensor
    output: Any


def run_to_exit(model: nn.Module, exit_index: int, **inputs: Any) -> ExitRun:
    """Run a model up to an exit; the blocks after it are not computed. At the last exit, this is the model's forward.

    A cache among the inputs gets keys and values of the blocks that ran.
    """
    exits = require_exits(model)
    return run_blocks(model, 0, exits.layers[exits.require_index(exit_index)], None, exit_index, **inputs)


def run_blocks(
    model: nn.Module, start: int, stop: int, hidden: Tensor | None = None, exit_index: int | None = None, **inputs: Any
) -> ExitRun:
    """Run the blocks ``start`` to ``stop``, both included, and the head behind them.

    Args:
        model: a model with exits. It is not changed, and other threads may run it.
        start: index of the first block.
        stop: index of the last one.
        hidden: the state that block ``start`` reads, ``[batch, tokens, width]``; None for the embeddings.
        exit_index: the exit whose head reads the state; None for the model's own head.
        inputs: what the model's forward takes for these rows. Masks and positions are made from it.
    """
    exits = require_exits(model)
    structure = exits.structure
    if not 0 <= start <= stop < structure.blocks:
        raise ModelError(f"blocks {start} to {stop} cannot be run: the model has blocks 0 to {structure.blocks - 1}")
    if hidden is None and start:
        raise ModelError(f"block {start} reads the state after block {start - 1}: pass it as hidden")
    listed = exits.listed()
    noted = _Last(exits, exit_index)
    members: list[nn.Module] = []
    listed_blocks: list[Any] = list(listed._modules.values())
    for index, block in enumerate(listed_blocks):
        if index == stop:
            members.append(_Noting(block, structure.values, noted, hidden if index == start else None))
        elif index == start and hidden is not None:
            members.append(_From(block, structure.values, hidden))
        else:
            members.append(block if start <= index < stop else StandIn(block, structure.values))
    changes = {structure.list_name: list_with(listed, members)}
    if exit_index is not None:
        if hidden is not None:
            exits.follow(hidden)
        changes |= exits.head_modules(exits.require_index(exit_index))
    output = view(model, changes)(**inputs)
    return ExitRun(noted.hidden, output)


class _Last:
    """Keeps the state after the last block of a run, and makes of it what the head reads."""

    hidden: Tensor

    def __init__(self, exits: Any, exit_index: int | None) -> None:
        self._exits, self._index = exits, exit_index

    def head_input(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        if self._index is None:
            return hidden
        self._exits.follow(hidden)
        return self._exits.head_input(self._index, hidden)


class _From(StandIn):
    """Runs a block on a state that is given, in place of the one that the model passes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        given = own["_hidden"]
        if given is None:
            return own["_block"](*args, **kwargs)
        if args:
            return own["_block"](given, *args[1:], **kwargs)
        passed = first_state(args, kwargs)
        return own["_block"](**{name: given if value is passed else value for name, value in kwargs.items()})


class _Noting(_From):
    """Runs a block and notes the state that it returns."""

    def __init__(self, block: Any, values: int, last: _Last, hidden: Tensor | None) -> None:
        super().__init__(block, values, hidden)
        vars(self)["_last"] = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        hidden = returned_state(output)
        read = vars(self)["_last"].head_input(hidden)
        return output if read is hidden else as_returned(read, vars(self)["_values"])


@contextmanager
def record_states(model: nn.Module, split: Split | None = None) -> Iterator[list[Tensor]]:
    """Record the hidden state at each exit, the last one included, of the forwards of this thread.

    The list is that of the latest forward, in the order of the exits; gradients flow through. A block that gradient
    checkpointing computes again in the backward is not recorded.

    Args:
        model: a model with exits.
        split: makes of the number of an exit and its state what is recorded, and what the next block reads.
    """
    exits = require_exits(model)
    listed = exits.listed()
    blocks: list[Any] = list(listed._modules.values())
    numbers = {id(blocks[layer]): number for number, layer in enumerate(exits.layers)}
    states: list[Tensor] = []
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        number = numbers[id(module)]
        recorded = passed = returned_state(output)
        if split is not None:
            recorded, passed = split(number, passed)
        if torch._C._current_graph_task_id() == -1:
            if number == 0:
                states.clear()
            states.append(recorded)
        if split is None:
            return None
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    handles = [blocks[layer].register_forward_hook(hook) for layer in exits.layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()

"""Forwards in which a token that has exited keeps its state: later blocks read it, and do not change it.

The state of a token that stops at an exit is copied to all blocks above, so that other tokens attend there to keys and
values of that state (Elbayad et al., "Depth-Adaptive Transformer", arXiv 1910.10073, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .attachment import require_exits
from .views import StandIn, as_returned, first_state, list_with, returned_state, view

# Whether tokens stop at an exit: from its number and the state there, [batch, tokens, width], bool [batch, tokens].
Decide = Callable[[int, Tensor], Tensor]


@dataclass
class HeldRun:
    """What a forward with held states gives.

    Attributes:
        output: of the model. Its head has read every token at the token's exit.
        exits: the exit of each token, int64 ``[batch, tokens]``.
        hidden: the states that the head has read, ``[batch, tokens, width]``.
        computed: blocks that ran; fewer than all if every token had stopped.
    """

    output: Any
    exits: Tensor
    hidden: Tensor
    computed: int


class _Progress:
    """Which tokens have stopped in a forward, and where."""

    def __init__(self, decide: Decide, last: int) -> None:
        self.decide, self.last = decide, last
        self.exits: Tensor | None = None
        self.hidden: Tensor | None = None
        self.computed = 0
        self.all_stopped = False

    def stopped(self) -> Tensor | None:
        return None if self.exits is None else self.exits < self.last

    def arrive(self, exit_index: int, hidden: Tensor) -> None:
        if self.exits is None:
            self.exits = torch.full(hidden.shape[:2], self.last, dtype=torch.int64, device=hidden.device)
        if exit_index < self.last:
            stops = self.decide(exit_index, hidden) & (self.exits == self.last)
            self.exits = torch.where(stops, exit_index, self.exits)
            self.all_stopped = bool((self.exits < self.last).all())


class _Holding(StandIn):
    """Runs a block, and gives tokens that have stopped the state that they had."""

    def __init__(self, block: Any, values: int, progress: _Progress, exit_index: int | None) -> None:
        super().__init__(block, values)
        vars(self)["_progress"], vars(self)["_exit"] = progress, exit_index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        progress: _Progress = own["_progress"]
        before = first_state(args, kwargs)
        # A cache needs the keys of tokens that have stopped, from every block.
        if progress.all_stopped and not any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return as_returned(before, own["_values"])
        after = returned_state(own["_block"](*args, **kwargs))
        progress.computed += 1
        stopped = progress.stopped()
        if stopped is not None:
            after = torch.where(stopped[..., None], before, after)
        if own["_exit"] is not None:
            progress.arrive(own["_exit"], after)
        progress.hidden = after
        return as_returned(after, own["_values"])


def run_held(model: nn.Module, decide: Decide, **inputs: Any) -> HeldRun:
    """Run a model whose tokens stop where ``decide`` says; the model's own head reads them all.

    Blocks after the last token has stopped are not computed, unless there is a cache to fill. The model is not changed.
    """
    exits = require_exits(model)
    structure = exits.structure
    listed = exits.listed()
    progress = _Progress(decide, exits.count - 1)
    numbers = {layer: number for number, layer in enumerate(exits.layers)}
    blocks: list[Any] = list(listed._modules.values())
    members = [_Holding(block, structure.values, progress, numbers.get(i)) for i, block in enumerate(blocks)]
    output = view(model, {structure.list_name: list_with(listed, members)})(**inputs)
    assert progress.exits is not None
    assert progress.hidden is not None
    return HeldRun(output, progress.exits, progress.hidden, progress.computed)

"""Decoding in which each token leaves at the first exit that is confident of it.

The prompt is computed in full, and so is the first new token, which the prompt's last position gives. Each later token
runs until its exit is confident. Its rows leave alone: those that go on are computed as a smaller batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...toolkit.compat import CACHE
from .calls import Call, EarlyExitOutput
from .confidence import Confidence
from .settings import EarlyExit
from .stack import Stack, first


@torch.no_grad()
def decode(call: Call, stack: Stack, settings: EarlyExit, confidence: Confidence) -> Any:
    """Generate with early exits; return what transformers' sampling loop does.

    Processors and criteria are called as there: with all rows, once for each token.
    """
    tokens, rows, device = call.tokens, call.tokens.shape[0], call.tokens.device
    running = torch.ones(rows, dtype=torch.int64, device=device)
    mask, positions, logits = call.mask, call.positions, call.logits
    depths = [torch.full((rows,), stack.count, device=device)]
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    wanted = [name for name in kept if call.config.return_dict_in_generate and getattr(call.config, f"output_{name}")]
    for step in range(call.new_tokens):
        if step:
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            positions = None if positions is None else positions + 1
            leaving = Leaving(stack, settings.limit(step), confidence, running)
            stack.forward(leaving, tokens[:, -1:], mask, positions, call.cache)
            logits = leaving.logits
            depths.append(leaving.depths * running)
        scores = call.processors(tokens, logits)
        for name in wanted:
            kept[name].append(scores if name == "scores" else logits)
        chosen = call.choose(scores)
        if call.ends:
            chosen = chosen * running + call.pad * (1 - running)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if call.streamer is not None:
            call.streamer.put(chosen.cpu())
        running = running & ~call.criteria(tokens, None)
        if not running.any():
            break
    if call.streamer is not None:
        call.streamer.end()
    if not call.config.return_dict_in_generate:
        return tokens
    taken = torch.stack(depths, dim=1)[:, : tokens.shape[1] - call.tokens.shape[1]]
    each = {name: tuple(kept[name]) if name in wanted else None for name in kept}
    return EarlyExitOutput(**{"sequences": tokens, "layers": taken, CACHE: call.cache, **each})


class Leaving:
    """One token of each row on its way through the blocks.

    Args:
        stack: the blocks.
        limit: the confidence at which a token leaves; above 1 none does.
        confidence: of the exits.
        running: 1 for rows that have not ended, ``[rows]``. Others leave at the first exit, whatever they are.

    Attributes:
        logits: float32 ``[rows, V]``, of the exits that the tokens took.
        depths: blocks that ran for each row, int64 ``[rows]``.
    """

    logits: Tensor

    def __init__(self, stack: Stack, limit: float, confidence: Confidence, running: Tensor) -> None:
        self._stack, self._limit, self._confidence = stack, limit, confidence
        self._running = running.bool()
        self._all = torch.arange(len(running), device=running.device)
        self._rows, self._left = self._all, self._all[:0]
        self.depths = torch.full_like(running, stack.count)
        self._found: Tensor | None = None

    def __call__(
        self, index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        stack = self._stack
        if len(self._left):
            found = stack.some(index, block, hidden, args, kwargs, self._rows, self._left)
        else:
            found = first(block(hidden, *args, **kwargs))
        if not len(self._rows):
            return found
        if index == stack.count - 1:
            self._leave(self._rows, stack.count, stack.logits(index, found[self._picked()])[:, -1])
        elif index in stack.layers and self._limit <= 1:
            self._try(index, found, hidden)
        return found

    def _picked(self) -> Any:
        """Return the index of the rows that go on: everything while all do, so that nothing is copied."""
        return self._rows if len(self._left) else slice(None)

    def _try(self, index: int, hidden: Tensor, before: Tensor) -> None:
        picked = self._picked()
        state = hidden[picked][:, -1]
        sure, logits = self._confidence.of(index, state, before[picked][:, -1])
        # NaN compares as not confident, and goes on.
        leaves = (sure >= self._limit) | ~self._running[self._rows]
        if not leaves.any():
            return
        chosen = self._rows[leaves]
        self._leave(chosen, index + 1, self._stack.logits(index, state[leaves]) if logits is None else logits[leaves])
        self._rows = self._rows[~leaves]
        self._left = torch.cat([self._left, chosen]).sort().values

    def _leave(self, rows: Tensor, depth: int, logits: Tensor) -> None:
        if len(rows) == len(self._all):
            self.logits = logits  # in the order of the batch: rows are never permuted while none has left
        else:
            if self._found is None:
                self._found = self.logits = logits.new_zeros((len(self._all), logits.shape[-1]))
            self._found[rows] = logits
        self.depths[rows] = depth

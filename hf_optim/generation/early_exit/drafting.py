"""Lossless decoding: the exit drafts tokens, and the full model verifies them in one pass.

A draft runs the blocks up to the exit, which the full model would run, too. So the pass that verifies starts from the
drafts' states behind the exit's block: only the blocks that are left are computed, over all drafted positions at once.
A drafted token is accepted if it is the token that the full model chooses there, and what follows a rejected one is
discarded: the tokens are the full model's. Samples have the full model's distribution.

Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding", arXiv
2309.08168, whose drafts leave out layers in the middle; Elhoushi et al., "LayerSkip", arXiv 2404.16710, reuses the
states of the exit as here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...errors import ModelError
from ...toolkit.compat import CACHE
from ..sampling import unsupported_processor
from ..stopping import unsupported_criterion
from .calls import Call, EarlyExitOutput
from .confidence import Confidence
from .rows import Rows
from .settings import EarlyExit
from .stack import Stack, first

# Attention functions that take a mask with holes between the tokens of a row.
TAKES_HOLES = ("sdpa", "eager")


@torch.no_grad()
def decode(call: Call, stack: Stack, settings: EarlyExit, confidence: Confidence) -> Any:
    """Generate the full model's tokens with drafts; return what transformers' sampling loop does."""
    _require_exact(call)
    drafting = _Drafting(call, stack, settings, confidence)
    drafting.emit(call.choose(call.processors(call.tokens, call.logits))[:, None], call.logits.new_zeros(0))
    while drafting.running.any():
        drafting.round()
    return drafting.result()


def _require_exact(call: Call) -> None:
    """Raise ``ModelError`` for a call whose drafts cannot be taken back."""
    what = unsupported_processor(call.processors) or unsupported_criterion(call.criteria)
    if what is None and any(type(layer) is not DynamicLayer for layer in call.cache.layers):
        kinds = sorted({type(layer).__name__ for layer in call.cache.layers} - {"DynamicLayer"})
        what = f"rejected tokens cannot be taken out of a cache of {kinds[0]}"
    if what is None and (call.config.output_scores or call.config.output_logits):
        what = "scores and logits of each step are asked for"
    if what is not None:
        raise ModelError(f'lossless early exits do not serve this call: {what}; generate with mode="stock"')


class _Drafting:
    """The state of one call.

    Attributes:
        running: bool ``[rows]``.
        last: the latest token of each row, which is not in the cache yet, int64 ``[rows, 1]``.
    """

    def __init__(self, call: Call, stack: Stack, settings: EarlyExit, confidence: Confidence) -> None:
        self.call, self.stack, self.settings, self.confidence = call, stack, settings, confidence
        (self.layer,) = stack.layers
        self.prompt = call.tokens.shape[1]
        cached = int(call.cache.get_seq_length())
        self.rows = Rows(call.tokens, call.mask, cached, self.prompt + call.new_tokens, call.pad)
        size = len(call.tokens)
        self.running = torch.ones(size, dtype=torch.bool, device=call.tokens.device)
        self.position = None if call.positions is None else call.positions.expand(size, 1) + 1
        # Deep blocks first reach layers of the cache that the drafts have not written into.
        layers = call.cache.layers
        self.deep = Cache(layers=[layers[max(index, self.layer + 1)] for index in range(len(layers))])
        # A window counts positions of the cache, holes included.
        self.together = call.windowed or call.model.config._attn_implementation not in TAKES_HOLES
        self.rounds = self.drafted = self.accepted = 0
        if not call.new_tokens:
            self.running[:] = False

    def round(self) -> None:
        """Draft, verify, and append what the full model gives for each row: one token at least."""
        most = int((self.rows.tokens.shape[1] - self.rows.count[self.running]).max())
        states, drafts = self._draft(min(self.settings.drafts + 1, most))
        computed = len(states)
        logits = self._verify(torch.cat(states, dim=1), torch.cat(drafts, dim=1))
        chosen = self._choose(logits, drafts)
        same = chosen[:, :-1] == torch.cat(drafts[1:], dim=1) if computed > 1 else chosen[:, :0] == 0
        matched = same.long().cumprod(dim=1).sum(dim=1)
        if self.together:
            matched = matched[self.running].min().expand_as(matched)
        self.rounds += 1
        self.drafted += (computed - 1) * int(self.running.sum())
        self.accepted += int(matched[self.running].sum())
        taken = torch.where(self.running, matched + 1, 1)
        self.rows.accept(self.call.cache, computed, taken)
        if self.position is not None:
            self.position = self.position + taken[:, None]
        self.emit(chosen, taken)

    def _draft(self, computed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states behind the exit's block and the tokens that they are of, one for each position."""
        states: list[Tensor] = []
        tokens = [self.last]
        while True:
            shallow = _Shallow(self.layer)
            done = len(states)
            position = None if self.position is None else self.position + done
            self.stack.forward(shallow, tokens[-1], self.rows.reach(done + 1), position, self.call.cache)
            states.append(shallow.after)
            if len(states) == computed:
                return states, tokens
            logits = self.stack.logits(self.layer, shallow.after[:, -1])
            if self.settings.draft_threshold > 0:
                sure, _ = self.confidence.of(self.layer, shallow.after[:, -1], shallow.before[:, -1])
                if not (sure[self.running] >= self.settings.draft_threshold).any():
                    return states, tokens
            tokens.append(self.call.choose(self._process(logits, tokens[1:]))[:, None])

    def _verify(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the full model's float32 logits ``[rows, n, V]`` for n positions behind the exit's block."""
        deep = _Deep(self.layer, states)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        position = None if self.position is None else self.position + places
        self.stack.forward(deep, tokens, self.rows.reach(tokens.shape[1]), position, self.deep)
        return self.stack.logits(self.stack.count - 1, deep.after)

    def _choose(self, logits: Tensor, drafts: list[Tensor]) -> Tensor:
        """Return the full model's tokens ``[rows, n]``, each for the drafts before it."""
        if not len(self.call.processors) and not self.call.sampled:
            return logits.argmax(dim=-1)
        found = [
            self.call.choose(self._process(each, drafts[1 : place + 1])) for place, each in enumerate(logits.unbind(1))
        ]
        return torch.stack(found, dim=1)

    def _process(self, logits: Tensor, drafts: list[Tensor]) -> Tensor:
        """Return scores ``[rows, V]`` behind the tokens of each row and some drafts ``[rows, 1]``."""
        if not len(self.call.processors):
            return logits
        found = logits.new_empty(logits.shape)
        # Some processors hold a value for each row: they get all rows, at each of the lengths that rows have.
        for count in self.rows.count.unique().tolist():
            scores = self.call.processors(torch.cat([self.rows.tokens[:, :count], *drafts], dim=1), logits)
            found = torch.where((self.rows.count == count)[:, None], scores, found)
        return found

    def emit(self, chosen: Tensor, taken: Tensor) -> None:
        """Append the first ``taken`` of the tokens ``[rows, n]`` to the rows that run, up to where a row ends."""
        last = chosen[:, -1:].clone() if not len(taken) else chosen.gather(1, taken[:, None] - 1)
        for row in self.running.nonzero()[:, 0].tolist():
            count = int(taken[row]) if len(taken) else 1
            for token in chosen[row, :count]:
                self.rows.append(row, token[None])
                ended = self.rows.count[row] >= self.rows.tokens.shape[1]
                if bool(ended) or bool(self.call.criteria(self.rows.sequence(row), None)[0]):
                    self.running[row] = False
                if self.call.streamer is not None:
                    self.call.streamer.put(token[None].cpu())
                if not self.running[row]:
                    break
        self.last = last

    def result(self) -> Any:
        call = self.call
        if call.streamer is not None:
            call.streamer.end()
        tokens = self.rows.tokens[:, : int(self.rows.count.max())]
        if not call.config.return_dict_in_generate:
            return tokens
        counts = {"rounds": self.rounds, "drafted": self.drafted, "accepted": self.accepted}
        return EarlyExitOutput(**{"sequences": tokens, CACHE: call.cache, **counts})


class _Shallow:
    """Runs the blocks up to the exit's; the others pass the state on."""

    before: Tensor
    after: Tensor

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __call__(
        self, index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if index > self._layer:
            return hidden
        found = first(block(hidden, *args, **kwargs))
        if index == self._layer:
            self.before, self.after = hidden, found
        return found


class _Deep:
    """Runs the blocks behind the exit's, from the states that the drafts left there."""

    after: Tensor

    def __init__(self, layer: int, states: Tensor) -> None:
        self._layer, self.after = layer, states

    def __call__(
        self, index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if index > self._layer:
            self.after = first(block(self.after, *args, **kwargs))
        return self.after

"""Steps in which tokens halt: Graves' adaptive computation time over the steps of tied blocks.

    p_n = sigmoid(w s_n + b),   N = min { n : p_1 + ... + p_n >= 1 - eps },  at most all steps
    R = 1 - (p_1 + ... + p_{N-1}),   y = p_1 s_1 + ... + p_{N-1} s_{N-1} + R s_N,   ponder cost N + R

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_optim.toolkit.modules import Passage, Step, hidden_and_rest

from ._chosen_tokens import Chosen
from ._halted_attention import OnlyKeys, StepKeys
from ._halting_kernel import advanced_by_kernel

WORDS = {"mix": ("graves", "t2t"), "halted": ("copied", "recomputed"), "reads": ("after", "before")}


@dataclass(frozen=True)
class Rule:
    """How tokens halt; the fields of the technique, and the number of ``steps``."""

    steps: int
    epsilon: float
    mix: str
    halted: str
    reads: str
    ponder_cost: float

    @classmethod
    def read(cls, settings: Mapping[str, Any], steps: int) -> Rule:
        """Return the rule of a configuration. Raises ``ValueError`` for other settings."""
        for name, words in WORDS.items():
            if settings.get(name) not in words:
                raise ValueError(f"act: {name} is {' or '.join(words)}, not {str(settings.get(name))[:80]!r}")
        for name, most in (("epsilon", 0.5), ("ponder_cost", 1e6)):
            value = settings.get(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise ValueError(f"act: {name} is a number from 0 to {most:g}, not {str(value)[:80]!r}")
        chosen = {name: settings[name] for name in WORDS}
        return cls(steps, float(settings["epsilon"]), ponder_cost=float(settings["ponder_cost"]), **chosen)


@dataclass(frozen=True, eq=False)
class Pondered:
    """What the last forward of a model took.

    Attributes:
        steps: int64 ``[B, N]``, of each token; 0 for padding.
        remainder: ``[B, N]``; 0 for padding.
        cost: the mean of steps + remainder over all tokens but padding, a scalar with its gradient.
    """

    steps: Tensor
    remainder: Tensor
    cost: Tensor


class HaltingUnit(nn.Module):
    """``p = sigmoid(w s + b)``. It is not a linear layer, so that no step quantizes or prunes it."""

    def __init__(self, width: int, bias: float, **about: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, **about))
        self.bias = nn.Parameter(torch.full((), bias, **about))

    def forward(self, read: Tensor, progress: Progress, state: Tensor, last: bool) -> None:
        """Advance ``progress`` by the states ``[B, N, d]`` of a step, of which the unit reads ``read [B, N, d]``."""
        if not progress.advance_at_once(self, read, state, last):
            progress.advance(self.probability(read), state, last)

    def probability(self, read: Tensor) -> Tensor:
        """Return the probabilities ``[B, N]`` for ``[B, N, d]``, in float64 if that is, else in float32."""
        dtype = torch.float64 if read.dtype == torch.float64 else torch.float32
        return ((read.to(dtype) @ self.weight.to(dtype)) + self.bias.to(dtype)).sigmoid()


class Progress:
    """How far each token of a forward has come.

    Attributes:
        running: bool ``[B, N]``.
        total: ``[B, N]``, the sum of the probabilities of past steps while a token runs.
        output: ``[B, N, d]``, the mixture so far.
    """

    def __init__(self, hidden: Tensor, valid: Tensor | None, rule: Rule) -> None:
        shape = hidden.shape[:2]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ones = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        self.counted = ones if valid is None else ones & valid
        self.running, self.rule, self.start = self.counted, rule, hidden
        self.total = torch.zeros(shape, dtype=dtype, device=hidden.device)
        self.remainder, self.steps = self.total, self.total.long()
        self.output = torch.zeros(*shape, hidden.shape[2], dtype=dtype, device=hidden.device)

    def advance(self, probability: Tensor, state: Tensor, last: bool) -> None:
        """Mix the states ``[B, N, d]`` of a step into the output, and halt tokens by ``[B, N]``; all, in the last."""
        reached = self.total + probability >= 1 - self.rule.epsilon
        halts = self.running & (reached | last)
        runs = self.running & ~halts
        rest = 1 - self.total
        weight = torch.where(halts, rest, torch.where(runs, probability, torch.zeros_like(probability)))
        mixed = weight[..., None] * state.to(self.output.dtype)
        if self.rule.mix == "graves":
            self.output = torch.where(self.running[..., None], self.output + mixed, self.output)
        else:
            blended = mixed + (1 - weight[..., None]) * self.output
            self.output = torch.where(self.running[..., None], blended, self.output)
        self.remainder = torch.where(halts, rest, self.remainder)
        self.steps = self.steps + self.running
        self.total = torch.where(runs, self.total + probability, self.total)
        self.running = runs

    def advance_at_once(self, unit: HaltingUnit, read: Tensor, state: Tensor, last: bool) -> bool:
        """Do so in one launch, with the probabilities of ``unit``; return False if no kernel does."""
        before = self.total, self.remainder, self.steps, self.running, self.output
        about = self.rule.epsilon, last, self.rule.mix == "t2t"
        after = advanced_by_kernel(state, read, (unit.weight, unit.bias), before, *about)
        if after is not None:
            self.total, self.remainder, self.steps, self.running, self.output = after
        return after is not None

    def finish(self) -> tuple[Tensor, Pondered]:
        """Return the output, of padding what it began with, and what was taken."""
        output = torch.where(self.counted[..., None], self.output.to(self.start.dtype), self.start)
        counted = self.counted.to(self.remainder.dtype)
        cost = ((self.steps + self.remainder) * counted).sum() / counted.sum().clamp_min(1)
        return output, Pondered(self.steps, self.remainder.detach(), cost)


class HaltingPassage(Passage):
    """A forward of a model whose tokens halt.

    Attributes:
        rule: how they do.
        progress: of the forward under way.
        keys: of the step under way, while the block computes a part of the tokens.
        kept: keys of the last such step, the halted tokens that are among them, and the block.
        beside: what blocks return beside the hidden state, if that is a tuple.
        pondered: what the last forward took.
        tally: int64 ``[steps + 1]``: how many tokens took so many steps, in the forwards of training since it was set;
            None: not counted.
        whole: compute every token in every step, as in training.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule, self.tally, self.pondered, self.whole = rule, None, None, False
        super().__init__()

    rule: Rule
    tally: Tensor | None
    pondered: Pondered | None
    whole: bool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pondered": None}  # tensors with a gradient are not copied

    def begin(self, mask: Tensor | None, places: Tensor | None, cache: Cache | None) -> None:
        super().begin(mask, places, cache)
        self.progress: Progress | None = None
        self.keys: StepKeys | None = None
        self.kept: tuple[StepKeys, Tensor, nn.Module] | None = None
        self.beside: tuple[Any, ...] | None = None

    def check(self, given: Mapping[str, Any]) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name):
                raise ValueError(f"tokens that have halted are in no later step: leave {name} out")

    def finish(self, trains: bool) -> Tensor:
        """Return the output after the last step; tokens are counted in training."""
        assert self.progress is not None
        output, self.pondered = self.progress.finish()
        if self.tally is not None and trains:
            taken = self.progress.steps[self.progress.counted]
            self.tally = self.tally + torch.bincount(taken, minlength=self.rule.steps + 1).to(self.tally.device)
        self.progress = None
        return output


class HaltingStep(Step):
    """A step that computes only what has not halted.

    In training, and where the values of tensors are not known to the host, all tokens are computed, and those that have
    halted keep their state. Both are the same function: a halted token leaves in each later step the keys and values of
    its last state, with the signals of that step.
    """

    passage: HaltingPassage

    @property
    def unit(self) -> HaltingUnit:
        """The halting unit, a submodule of the first step."""
        return vars(self).get("first", self).halting_unit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = hidden_and_rest(args, kwargs)
        self.begin_alone(args, kwargs)
        passage, rule = self.passage, self.passage.rule
        if self.number == 0:
            passage.progress = Progress(hidden, passage.valid(hidden), rule)
        progress = passage.progress
        if progress is None:
            raise ValueError("a step of a model whose tokens halt was called without the steps before it")
        signalled = self.signals(hidden, self.number, passage)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        state = self._state(hidden, signalled, args, kwargs, cache)
        last = self.number == rule.steps - 1
        self.unit(signalled if rule.reads == "before" else state, progress, state, last)
        state = passage.finish(self.training) if last else state
        return state if passage.beside is None else (state, *passage.beside)

    def _state(self, hidden: Tensor, signalled: Tensor, args: Any, kwargs: Any, cache: Cache | None) -> Tensor:
        """Return the states ``[B, N, d]`` after this step."""
        passage, progress = self.passage, self.passage.progress
        assert progress is not None
        recomputed = passage.rule.halted == "recomputed"
        if not (passage.whole or self.training or _is_abstract(hidden)):
            found = torch.stack([progress.running, progress.counted]).flatten(1).sum(1).tolist()
            if self.number and not found[0] and cache is None:
                return hidden  # all have halted
            if not recomputed and found[0] < found[1]:
                return self._of_running(hidden, signalled, args, kwargs, progress, cache)
        new = self._first(self.apply_block(signalled, args, kwargs))
        moves = progress.counted if recomputed else progress.running
        return torch.where(moves[..., None], new, hidden)

    def _first(self, output: Any) -> Tensor:
        """Return the hidden state of what a block returned, and note what else there was."""
        if not isinstance(output, tuple):
            return output
        self.passage.beside = output[1:]
        return output[0]

    def _of_running(
        self, hidden: Tensor, signalled: Tensor, args: Any, kwargs: Any, progress: Progress, cache: Cache | None
    ) -> Tensor:
        """Compute the block for the running tokens, and the keys and values of those that have halted."""
        passage, running = self.passage, progress.running
        halted = progress.counted & ~running
        keys = StepKeys(cache, self.number)
        missing = halted
        if passage.kept is not None and self._keeps_keys(passage.kept[2]):
            earlier, with_keys, _ = passage.kept
            keys.key, keys.value = earlier.copies()
            missing = halted & ~with_keys
        passage.keys = keys
        try:
            if bool(missing.any()):
                self._apply_to(Chosen(missing), signalled, args, kwargs, only_keys=True)
            passage.kept = (keys, halted, self.block)
            if not bool(running.any()):
                keys.complete()  # later tokens may take more steps than these
                return hidden
            chosen = Chosen(running)
            new = self._apply_to(chosen, signalled, args, kwargs)
        finally:
            passage.keys = None
        state = hidden.clone()
        chosen.put(state, new.to(state.dtype))
        return state

    def _keeps_keys(self, block: nn.Module) -> bool:
        """Return True if a halted token has the keys in this step that it had in an earlier step of ``block``."""
        return block is self.block and self.signals.kinds[1] == "none"

    def _apply_to(self, chosen: Chosen, signalled: Tensor, args: Any, kwargs: Any, only_keys: bool = False) -> Tensor:
        """Return what the block makes of some tokens, ``[R, M, d]``; empty if only their keys are asked for."""
        keys = self.passage.keys
        assert keys is not None
        keys.chosen, keys.only_keys = chosen, only_keys
        theirs = [chosen.argument(value) for value in args]
        named = {name: chosen.argument(value) for name, value in kwargs.items()}
        try:
            return self._first(self.apply_block(chosen.take(signalled), tuple(theirs), named))
        except OnlyKeys:
            return signalled[:0]


def _is_abstract(hidden: Tensor) -> bool:
    """Return True if the host cannot read values, or other ranks wait for the same calls of the block."""
    if hidden.is_meta or type(hidden).__name__ == "FakeTensor" or torch.compiler.is_compiling():
        return True
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return torch.distributed.is_available() and torch.distributed.is_initialized()

"""Choosing the next token on the device: transformers' processors, where their work does not depend on Python state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock

Processor = Callable[[Tensor, Tensor], Tensor]

# Processors that compute the same operations at every step from the tokens and the scores.
STATELESS = (
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper,
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
    stock.SuppressTokensLogitsProcessor,
)
LENGTHS = (stock.MinLengthLogitsProcessor, stock.MinNewTokensLengthLogitsProcessor)
PENALTY = stock.RepetitionPenaltyLogitsProcessor


def unsupported_processor(processors: Iterable[Any]) -> str | None:
    """Return why a list of logits processors cannot be captured; None if it can be."""
    for each in processors:
        if type(each) in (*STATELESS, *LENGTHS, PENALTY):
            continue
        return f"the logits processor {type(each).__name__} may look at Python state"
    return None


def signature(processors: Iterable[Any], do_sample: bool) -> tuple[Any, ...]:
    """Return what the operations of a list of processors depend on; equal signatures may share a captured graph."""
    parts: list[Any] = [do_sample]
    for each in processors:
        names = SIGNATURES[type(each)] if type(each) in SIGNATURES else sorted(vars(each))
        parts.append((type(each), tuple((name, _plain(vars(each)[name])) for name in names)))
    return tuple(parts)


def _plain(value: Any) -> Any:
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)


class MinimumLength:
    """Keep out the tokens that end a sequence while it is too short. Lengths are numbers on the device.

    Args:
        processor: transformers' processor of the same purpose.
        count: tokens of the sequence so far, int64 ``[1]``; its value changes between calls.
    """

    def __init__(self, processor: Any, count: Tensor) -> None:
        self.ends = torch.as_tensor(processor.eos_token_id, device=count.device).reshape(-1)
        self.count = count
        self.least = torch.zeros_like(count)
        self.set(processor)

    def set(self, processor: Any) -> None:
        """Take the length of another processor with the same tokens that end a sequence."""
        own = processor.min_new_tokens if hasattr(processor, "min_new_tokens") else processor.min_length
        self.least.fill_(getattr(processor, "prompt_length_to_skip", 0) + own)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for the tokens in ``ends`` while the sequence is too short."""
        return torch.where(self.count < self.least, scores.index_fill(1, self.ends, float("-inf")), scores)


class RepetitionPenalty:
    """Lower the scores of tokens that the sequence has: s / p for s >= 0, s p below (Keskar et al. 2019, section 4.1).

    Args:
        processor: transformers' processor, which has p and the number of tokens at the start that do not count.
        count: tokens of the sequence so far, int64 ``[1]``; its value changes between calls.
        rows: rows of the batch.
    """

    def __init__(self, processor: Any, count: Tensor, rows: int) -> None:
        self.penalty = processor.penalty
        self.count = count
        self.first = count.new_zeros((rows, 1))
        self.set(processor)

    def set(self, processor: Any) -> None:
        """Take the ignored tokens of another processor: none, a number, or one for each row."""
        given = processor.prompt_ignore_length
        given = torch.as_tensor(0 if given is None else given, device=self.first.device).reshape(-1)
        self.first.fill_(0)
        self.first[: len(given) if len(given) > 1 else None, 0] = given

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalized scores ``[rows, V]`` for tokens ``[rows, length]``, of which ``count`` are valid."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        valid = (positions >= self.first) & (positions < self.count)
        none = scores.shape[1]
        seen = torch.zeros((scores.shape[0], none + 1), dtype=torch.bool, device=scores.device)
        seen.scatter_(1, torch.where(valid, input_ids, none), True)
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :none], penalized, scores)


# What the operations of these depend on; the rest is set for each call.
SIGNATURES = {**dict.fromkeys(LENGTHS, ("eos_token_id",)), PENALTY: ("penalty",)}


def on_device(processors: Iterable[Any], count: Tensor, rows: int) -> list[Processor]:
    """Return the processors in a form whose operations are the same at each step."""
    made: list[Processor] = []
    for each in processors:
        if type(each) in LENGTHS:
            made.append(MinimumLength(each, count))
        elif type(each) is PENALTY:
            made.append(RepetitionPenalty(each, count, rows))
        else:
            made.append(each)
    return made


def choose(scores: Tensor, do_sample: bool) -> Tensor:
    """Return the next token of each row, int64 ``[rows]``: the largest score, or a sample of their softmax.

    A sample is the argmax of p / e with e exponential, the formula of ``torch.multinomial`` for one sample. Unlike
    that function this does not check the probabilities on the device, where a failed check ends the CUDA context.
    """
    if not do_sample:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

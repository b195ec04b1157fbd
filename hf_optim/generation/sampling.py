"""Choosing the next token on the device: transformers' processors, where their work does not depend on Python state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock

from .processors import AtLength, MinimumLength, NoRepeatedNGrams, RepetitionPenalty

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
        if type(each) in (*STATELESS, *SIGNATURES):
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


# What the operations of these depend on; the rest is set for each call.
SIGNATURES = {
    **dict.fromkeys(LENGTHS, ("eos_token_id",)),
    PENALTY: ("penalty",),
    stock.ForcedBOSTokenLogitsProcessor: ("bos_token_id",),
    stock.ForcedEOSTokenLogitsProcessor: ("eos_token_id",),
    stock.SuppressTokensAtBeginLogitsProcessor: ("begin_suppress_tokens",),
    stock.NoRepeatNGramLogitsProcessor: ("ngram_size",),
}


def on_device(processors: Iterable[Any], count: Tensor, rows: int) -> list[Processor]:
    """Return the processors in a form whose operations are the same at each step."""
    return [_on_device(each, count, rows) for each in processors]


def _on_device(processor: Any, count: Tensor, rows: int) -> Processor:
    kind = type(processor)
    if kind in LENGTHS:
        return MinimumLength(processor, count)
    if kind is PENALTY:
        return RepetitionPenalty(processor, count, rows)
    if kind is stock.NoRepeatNGramLogitsProcessor:
        return NoRepeatedNGrams(processor, count)
    if kind in SIGNATURES:
        forced = kind is not stock.SuppressTokensAtBeginLogitsProcessor
        return AtLength(processor, count, SIGNATURES[kind][0], forced)
    return processor


def choose(scores: Tensor, do_sample: bool) -> Tensor:
    """Return the next token of each row, int64 ``[rows]``: the largest score, or a sample of their softmax.

    A sample is the argmax of p / e with e exponential, the formula of ``torch.multinomial`` for one sample. Unlike
    that function this does not check the probabilities on the device, where a failed check ends the CUDA context.
    """
    if not do_sample:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

"""transformers' processors of logits whose work depends on the length of the sequence, as operations on the device.

The length is a number on the device (``count``, int64 ``[1]``), and so is what changes between calls with the same
operations; ``set`` takes it from the processor of another call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tokens:
    """Tokens of a processor, without those that the vocabulary of the scores does not have.

    A configuration may name such tokens; on a GPU, indexing with them would end the CUDA context.
    """

    def __init__(self, tokens: Any, device: torch.device) -> None:
        self.all = torch.as_tensor(tokens, device=device).reshape(-1)
        self.vocabulary = 0
        self.known = self.all

    def fill(self, scores: Tensor, value: float) -> Tensor:
        """Return a copy of scores ``[rows, V]`` with a value for these tokens."""
        if self.vocabulary != scores.shape[1]:  # waits for the device, once, before a capture
            self.vocabulary = scores.shape[1]
            self.known = self.all[self.all < self.vocabulary]
        return scores.index_fill(1, self.known, value)


class MinimumLength:
    """Keep out the tokens that end a sequence while it is too short. Lengths are numbers on the device.

    Args:
        processor: transformers' processor of the same purpose.
        count: tokens of the sequence so far, int64 ``[1]``; its value changes between calls.
    """

    def __init__(self, processor: Any, count: Tensor) -> None:
        self.ends = Tokens(processor.eos_token_id, count.device)
        self.count = count
        self.least = torch.zeros_like(count)
        self.set(processor)

    def set(self, processor: Any) -> None:
        """Take the length of another processor with the same tokens that end a sequence."""
        own = processor.min_new_tokens if hasattr(processor, "min_new_tokens") else processor.min_length
        self.least.fill_(getattr(processor, "prompt_length_to_skip", 0) + own)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for the tokens in ``ends`` while the sequence is too short."""
        return torch.where(self.count < self.least, self.ends.fill(scores, float("-inf")), scores)


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
        seen.scatter_(1, torch.where(valid, input_ids, none).clamp(max=none), True)
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :none], penalized, scores)


class AtLength:
    """Force or suppress tokens at one length of the sequence: as the first token, or as the last.

    Args:
        processor: transformers' processor of the same purpose.
        count: tokens of the sequence so far, int64 ``[1]``; its value changes between calls.
        tokens: name of the processor's tokens.
        forced: the scores of these tokens become 0 and all others minus infinity; else those of these tokens do.
    """

    def __init__(self, processor: Any, count: Tensor, tokens: str, forced: bool) -> None:
        self.tokens = Tokens(getattr(processor, tokens), count.device)
        self.count = count
        self.forced = forced
        self.length = torch.ones_like(count)
        self.set(processor)

    def set(self, processor: Any) -> None:
        """Take the length at which another processor acts; ``ForcedBOSTokenLogitsProcessor`` acts at one token."""
        if hasattr(processor, "max_length"):
            self.length.fill_(processor.max_length - 1)
        elif hasattr(processor, "begin_index"):
            self.length.fill_(processor.begin_index)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores ``[rows, V]``, changed if the sequence has the length."""
        if self.forced:
            changed = self.tokens.fill(torch.full_like(scores, float("-inf")), 0.0)
        else:
            changed = self.tokens.fill(scores, float("-inf"))
        return torch.where(self.count == self.length, changed, scores)


class NoRepeatedNGrams:
    """Keep out each token that would complete an n-gram which the sequence has (Paulus et al. 2018, section 2.5).

    Args:
        processor: transformers' processor of the same purpose, which has n.
        count: tokens of the sequence so far, int64 ``[1]``; its value changes between calls.
    """

    def __init__(self, processor: Any, count: Tensor) -> None:
        self.size = processor.ngram_size
        self.count = count

    def set(self, processor: Any) -> None:
        """Do nothing: the size belongs to the operations."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with minus infinity for such tokens; tokens ``[rows, length]``, ``count`` of them valid."""
        rows, length = input_ids.shape
        vocabulary = scores.shape[1]
        windows = max(0, length - self.size + 1)
        start = torch.arange(windows, device=input_ids.device)
        repeated = (start + self.size <= self.count)[None, :].expand(rows, windows)
        for offset in range(self.size - 1):
            last = (self.count - self.size + 1 + offset).clamp(min=0)
            repeated = repeated & (input_ids[:, offset : offset + windows] == input_ids.index_select(1, last))
        # What completes no n-gram goes to a column behind the vocabulary.
        completing = input_ids[:, self.size - 1 : self.size - 1 + windows].clamp(max=vocabulary)
        banned = torch.zeros((rows, vocabulary + 1), dtype=torch.bool, device=scores.device)
        banned.scatter_(1, torch.where(repeated, completing, vocabulary), True)
        return scores.masked_fill(banned[:, :vocabulary], float("-inf"))

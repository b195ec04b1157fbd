"""Fixed-length token sequences from joined texts: all of them, or a random sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from .processor_errors import processor_errors, token_limit

MAX_SEQUENCE_LENGTH = 2048
DEFAULT_SEQUENCE_LENGTH = 512
# How many texts are read and tokenized in one call.
TEXTS_PER_CALL = 64


def sequence_length(config: PretrainedConfig, tokenizer: Any = None, requested: int | None = None) -> int:
    """Return the number of tokens per sequence: ``requested``, or the context length of the model and its tokenizer.

    The default is limited to 2048 tokens, and is 512 where neither context length is known. Raises ``DataError`` if
    ``requested`` exceeds the context length of the model.
    """
    limit = token_limit(config.get_text_config(), "max_position_embeddings")
    if requested is None:
        known = [n for n in (limit, token_limit(tokenizer, "model_max_length")) if n]
        return min([*known, MAX_SEQUENCE_LENGTH]) if known else DEFAULT_SEQUENCE_LENGTH
    if limit and requested > limit:
        why = f"{requested} is longer than the model's context of {limit} tokens: use {limit} or less"
        raise DataError(f"seq_len {why}", cli=f"--seq-len {why}")
    return requested


def tokenize_texts(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """Tokenize texts in groups; yield ``(ids, bytes)`` per group: the joined token ids and the UTF-8 size of the texts.

    Each text is preceded by the bos token. If the tokenizer has none, each text is followed by the eos (or sep) token
    instead.
    """
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if before and _adds_cls_and_sep(tokenizer):
        before = []
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    after = [] if before or end is None else [end]
    stream = iter(texts)
    while group := list(islice(stream, TEXTS_PER_CALL)):
        # verbose=False: texts longer than the context are split into sequences, so their length needs no warning.
        with processor_errors(tokenizer):
            encoded = tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)
            encoded = encoded["input_ids"]
        yield [i for ids in encoded for i in (*before, *ids, *after)], sum(len(text.encode()) for text in group)


class TokenSequences:
    """Joined texts, split into sequences ``[seq_len]`` (int64). The texts are read once and never held completely.

    With the tokenizer of an encoder (cls and sep tokens) every sequence is ``cls ... sep``, as in its training.

    Attributes:
        tokens, bytes: how many tokens, and UTF-8 bytes of text, have been read so far.
        remainder: the tokens left at the end, fewer than one sequence: ``[< seq_len]``.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, seq_len: int) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.add_special = _adds_cls_and_sep(tokenizer) and seq_len > 2
        self.body = seq_len - 2 if self.add_special else seq_len
        self.tokens = self.bytes = 0
        self.remainder = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Tensor]:
        pending: list[int] = []
        for ids, size in tokenize_texts(self.texts, self.tokenizer):
            self.tokens += len(ids)
            self.bytes += size
            pending += ids
            end = len(pending) // self.body * self.body
            for start in range(0, end, self.body):
                yield self._sequence(pending[start : start + self.body])
            pending = pending[end:]
        if pending:
            self.remainder = self._sequence(pending)

    def _sequence(self, ids: list[int]) -> Tensor:
        special = self.tokenizer
        return torch.tensor([special.cls_token_id, *ids, special.sep_token_id] if self.add_special else ids)


def _adds_cls_and_sep(tokenizer: Any) -> bool:
    has_both = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    return has_both and tokenizer.num_special_tokens_to_add(pair=False) == 2


def sample_sequences(
    texts: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    samples: int | None,
    seed: int = 0,
    *,
    shuffle_buffer: int | None = None,
) -> Tensor:
    """Return token sequences of joined texts, int64 ``[n, seq_len]``.

    Args:
        texts: any iterable; it is read once and never held completely.
        tokenizer: a transformers tokenizer.
        seq_len: tokens per sequence.
        samples: number of sequences, drawn uniformly at random; None takes all, in order.
        seed: seed of the draw.
        shuffle_buffer: number of sequences to draw from, at the start of a long or endless stream; None reads all.

    Raises ``DataError`` if the texts have fewer than ``samples`` sequences.
    """
    sequences = TokenSequences(texts, tokenizer, seq_len)
    chosen = reservoir(islice(sequences, shuffle_buffer), samples, seed)
    if not chosen or (samples is not None and len(chosen) < samples):
        tokens = sequences.tokens
        raise DataError(
            _too_short(tokens, seq_len, samples, "samples={}", "a seq_len"),
            cli=_too_short(tokens, seq_len, samples, "--samples {}", "a --seq-len"),
        )
    return torch.stack(chosen)


def _too_short(tokens: int, seq_len: int, samples: int | None, take: str, length: str) -> str:
    wanted = samples or 1
    available = tokens // seq_len
    fewer = f", {take.format(available)} or less" if available else ""
    plural = "s" if wanted > 1 else ""
    return (
        f"the data has {tokens} tokens, but {wanted} sequence{plural} of {seq_len} tokens need {wanted * seq_len}: "
        f"use more text{fewer}, or {length} below {seq_len}"
    )


def reservoir(items: Iterable[Any], samples: int | None, seed: int = 0) -> list[Any]:
    """Return ``samples`` of the items, each equally likely, in one pass (Vitter 1985, algorithm R); all for None."""
    if samples is None:
        return list(items)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Any] = []
    for seen, item in enumerate(items):
        if seen < samples:
            chosen.append(item)
        elif (slot := int(torch.randint(seen + 1, (1,), generator=generator))) < samples:
            chosen[slot] = item
    return chosen


def random_tokens(vocab_size: int, samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Return uniformly random token ids ``[samples, seq_len]``, for methods that need no real text."""
    return torch.randint(vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(seed))

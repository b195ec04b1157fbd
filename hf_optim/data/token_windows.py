"""Windows of tokens, cut from joined texts, all of them or a random choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError

LONGEST_WINDOW = 2048
UNKNOWN_CONTEXT = 512
# Texts tokenized in one call, and drawn from the data at a time.
CHUNK = 64


def window_length(config: PretrainedConfig, tokenizer: Any = None, asked: int | None = None) -> int:
    """``asked``, or the context of the model and its tokenizer, 2048 at most (512 where it is not known).

    Raises ``DataError`` when more is asked for than the model can read.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        known = [int(n) for n in (limit, getattr(tokenizer, "model_max_length", None)) if n]
        return min([*known, LONGEST_WINDOW]) if known else UNKNOWN_CONTEXT
    if limit and asked > limit:
        raise DataError(f"seq_len {asked} is longer than the model's context of {limit} tokens: give {limit} or less")
    return asked


def token_chunks(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """Token ids of the texts, joined: ``(ids, bytes)`` chunk by chunk, with the UTF-8 bytes that they stand for.

    Every text is preceded by the bos token. Where the tokenizer has none, every text is followed by its eos (or sep)
    token instead.
    """
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if before and _encodes_with_cls(tokenizer):
        before = []
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    after = [] if before or end is None else [end]
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        # verbose=False: texts longer than the context are cut into windows, so their length is no cause for a warning.
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield [i for ids in encoded for i in (*before, *ids, *after)], sum(len(text.encode()) for text in chunk)


class TokenWindows:
    """The joined texts, cut into windows ``[seq_len]`` (int64); read once, and never held whole.

    For an encoder's tokenizer (cls and sep tokens) every window is ``cls ... sep``, as the model was trained.

    Attributes:
        tokens, bytes: how many were read so far; bytes are those of the texts in UTF-8.
        rest: the tokens left at the end, fewer than a window ``[< seq_len]``.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, seq_len: int) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.wrap = _encodes_with_cls(tokenizer) and seq_len > 2
        self.body = seq_len - 2 if self.wrap else seq_len
        self.tokens = self.bytes = 0
        self.rest = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Tensor]:
        held: list[int] = []
        for ids, size in token_chunks(self.texts, self.tokenizer):
            self.tokens += len(ids)
            self.bytes += size
            held += ids
            cut = len(held) // self.body * self.body
            for start in range(0, cut, self.body):
                yield self._window(held[start : start + self.body])
            held = held[cut:]
        if held:
            self.rest = self._window(held)

    def _window(self, ids: list[int]) -> Tensor:
        ends = self.tokenizer
        return torch.tensor([ends.cls_token_id, *ids, ends.sep_token_id] if self.wrap else ids)


def _encodes_with_cls(tokenizer: Any) -> bool:
    has_both = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    return has_both and tokenizer.num_special_tokens_to_add(pair=False) == 2


def windows(
    texts: Iterable[str], tokenizer: Any, seq_len: int, samples: int | None, seed: int = 0, *, pool: int | None = None
) -> Tensor:
    """Windows of the joined texts, int64 ``[n, seq_len]``.

    Args:
        texts: any iterable; it is read once and never held whole.
        tokenizer: a tokenizer of transformers.
        seq_len: tokens per window.
        samples: how many windows to choose at random (all equally likely); None takes all, in order.
        seed: of the choice.
        pool: how many windows to look at before choosing, for streams without end.

    Raises ``DataError`` when there are fewer than ``samples`` windows.
    """
    cut = TokenWindows(texts, tokenizer, seq_len)
    chosen = reservoir(islice(cut, pool), samples, seed)
    if not chosen or (samples is not None and len(chosen) < samples):
        raise DataError(_too_short(cut.tokens, seq_len, samples))
    return torch.stack(chosen)


def _too_short(tokens: int, seq_len: int, samples: int | None) -> str:
    wanted = samples or 1
    fits = tokens // seq_len
    remedy = "give more text" + (f", samples={fits} or less" if fits else "") + f", or a seq_len below {seq_len}"
    return (
        f"the data has {tokens} tokens, and {wanted} window{'s' * (wanted != 1)} of {seq_len} tokens need "
        f"{wanted * seq_len}: {remedy}"
    )


def reservoir(items: Iterable[Any], samples: int | None, seed: int = 0) -> list[Any]:
    """``samples`` of the items, each equally likely, in one pass (Vitter 1985, algorithm R); all for None."""
    if samples is None:
        return list(items)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Any] = []
    for seen, item in enumerate(items):
        if seen < samples:
            chosen.append(item)
        elif (place := int(torch.randint(seen + 1, (1,), generator=generator))) < samples:
            chosen[place] = item
    return chosen


def random_tokens(vocab_size: int, samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Uniformly random token ids ``[samples, seq_len]``: for methods that need shapes or no real text."""
    return torch.randint(vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(seed))

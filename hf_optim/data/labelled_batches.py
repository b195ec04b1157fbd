"""Labelled batches of each task, for measuring: model inputs, and the label of every logit that counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..recipes.config import DataConfig
from .batches import with_decoder_inputs
from .datasets import find_column, image_column, is_streamed, load_image, load_rows, string_columns
from .token_windows import TokenWindows, reservoir, window_length

IGNORE = -100
MASKED_SHARE = 0.15
BATCH_SIZE = 8
# Logits of one forward, at most: 2^27 in float32 are half a gigabyte.
LOGITS = 2**27
LABEL_COLUMNS = ("label", "labels", "target")
POOL = 32

Example = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Examples:
    """Batches ``(inputs, labels)``; labels have the shape of the logits without the last dimension, -100 = left out.

    ``tokens_per_byte`` relates tokens to the UTF-8 bytes of the text they came from, where that makes sense.
    """

    batches: list[Example]
    tokens_per_byte: float | None = None

    def __iter__(self) -> Iterator[Example]:
        return iter(self.batches)


def cut(texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig) -> tuple[Tensor, TokenWindows]:
    """Evaluation windows ``[n, seq_len]`` of the model's context: all full ones, or ``data.samples`` at random.

    A text shorter than one window is one shorter window. Raises ``DataError`` below two tokens.
    """
    if tokenizer is None or not hasattr(tokenizer, "bos_token_id"):
        raise DataError(
            "measuring on texts needs the model's tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    source = TokenWindows(texts, tokenizer, window_length(model.config, tokenizer, data.seq_len))
    pool = POOL * data.samples if data.samples and data.dataset and is_streamed(data) else None
    chosen = reservoir(islice(source, pool), data.samples, data.seed)
    if not chosen:
        if len(source.rest) < 2:
            raise DataError(f"the data has {source.tokens} tokens: nothing can be predicted from so few")
        chosen = [source.rest]
    return torch.stack(chosen), source


def language(texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig) -> Examples:
    """Next-token prediction: every text preceded by bos, all joined, cut into windows; tokens 2..n are scored."""
    ids, source = cut(texts, model, tokenizer, data)
    nothing = torch.full_like(ids[:, :1], IGNORE)
    labels = torch.cat([ids[:, 1:], nothing], dim=1)
    size = fitting_batch(model, ids.shape[1])
    batches = [({"input_ids": i}, t) for i, t in zip(ids.split(size), labels.split(size), strict=True)]
    return Examples(batches, source.tokens / source.bytes)


def masked(texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig) -> Examples:
    """Masked-token prediction: 15 % of the tokens of each window, chosen by the seed, replaced by the mask token."""
    ids, _ = cut(texts, model, tokenizer, data)
    if tokenizer.mask_token_id is None:
        raise DataError("a masked language model is measured with the tokenizer's mask token, and this one has none")
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(data.seed))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = (chance < MASKED_SHARE) & ~special
    labels = ids.masked_fill(~hidden, IGNORE)
    inputs = ids.masked_fill(hidden, tokenizer.mask_token_id)
    size = fitting_batch(model, ids.shape[1])
    return Examples([({"input_ids": i}, t) for i, t in zip(inputs.split(size), labels.split(size), strict=True)])


def chosen_rows(data: DataConfig) -> list[dict[str, Any]]:
    """All rows, or ``data.samples`` of them at random. Raises ``DataError`` when there are none."""
    pool = POOL * data.samples if data.samples and is_streamed(data) else None
    rows = reservoir(islice(load_rows(data), pool), data.samples, data.seed)
    if not rows:
        raise DataError(f"{data.dataset}: no rows")
    return rows


def classes(rows: list[dict[str, Any]], model: Any, tokenizer: Any, data: DataConfig) -> Examples:
    """Texts (or pairs: two string columns) with a class label."""
    label = label_column(rows[0])
    if tokenizer is None:
        raise DataError(
            "classifying texts needs the model's tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    batches = []
    for part in _parts(rows, BATCH_SIZE):
        inputs = encode(part, text_columns(part[0], data), model, tokenizer)
        batches.append((inputs, torch.tensor([label_id(row[label], model.config) for row in part])))
    return Examples(batches)


def images(rows: list[dict[str, Any]], model: Any, processor: Any) -> Examples:
    """Images with a class label."""
    label, column = label_column(rows[0]), image_column(rows[0])
    processor = getattr(processor, "image_processor", processor)
    if column is None:
        raise DataError(f"no column holds an image (columns: {', '.join(rows[0])})")
    if "pixel_values" not in getattr(processor, "model_input_names", ()):
        raise DataError("images need the model's image processor: pass AutoImageProcessor.from_pretrained(...)")
    batches = []
    for part in _parts(rows, BATCH_SIZE):
        pixels = processor([load_image(row[column]) for row in part], return_tensors="pt")["pixel_values"]
        batches.append(({"pixel_values": pixels}, torch.tensor([label_id(row[label], model.config) for row in part])))
    return Examples(batches)


def pairs(rows: list[dict[str, Any]], model: Any, tokenizer: Any) -> Examples:
    """Source and target texts of an encoder-decoder model: columns ``source`` and ``target``, or the only two."""
    columns = string_columns(rows[0])
    if {"source", "target"} <= set(columns):
        columns = ["source", "target"]
    if len(columns) != 2:
        raise DataError(
            "an encoder-decoder model is measured on two text columns, source and target; "
            f"these are {', '.join(rows[0])}"
        )
    batches = []
    for part in _parts(rows, BATCH_SIZE):
        inputs = encode(part, columns[:1], model, tokenizer)
        target = encode(part, columns[1:], model, tokenizer)
        ignored = target["attention_mask"] == 0
        labels = target["input_ids"].masked_fill(ignored, IGNORE)
        batches.append((with_decoder_inputs({**inputs, "labels": labels}, model.config), labels))
    return Examples(batches)


def encode(rows: list[dict[str, Any]], columns: list[str], model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """The texts of one or two columns as padded inputs ``[n, longest]``, cut at the model's context."""
    texts = [[str(row[column]) for row in rows] for column in columns]
    length = window_length(model.config, tokenizer)
    padding = tokenizer.pad_token_id is not None or len(rows) == 1
    if not padding:
        raise DataError("these texts differ in length, and the tokenizer has no pad token: set tokenizer.pad_token")
    return dict(
        tokenizer(*texts, padding=len(rows) > 1, truncation=True, max_length=length, return_tensors="pt", verbose=False)
    )


def text_columns(row: Mapping[str, Any], data: DataConfig) -> list[str]:
    """One column with the text, or the two of a pair (``sentence1`` and ``sentence2``, or the only two strings)."""
    strings = [name for name in string_columns(row) if name not in LABEL_COLUMNS]
    if data.text_column is None and len(strings) == 2:
        return strings
    return [find_column(row, data)]


def label_column(row: Mapping[str, Any]) -> str:
    for name in LABEL_COLUMNS:
        if name in row:
            return name
    raise DataError(f"classification needs a column {' or '.join(LABEL_COLUMNS)}; these are {', '.join(row)}")


def label_id(value: Any, config: Any) -> int:
    """A label as the model's class number; names are looked up in ``config.label2id``."""
    known = getattr(config, "label2id", None) or {}
    number = known.get(value, value) if isinstance(value, str) else value
    try:
        number = int(number)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < config.num_labels:
        raise DataError(
            f"label {value!r} is none of the model's {config.num_labels} classes ({', '.join(list(known)[:8])})"
        )
    return number


def fitting_batch(model: Any, seq_len: int) -> int:
    """How many windows go through at once, so that the logits stay below half a gigabyte."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    return max(1, min(BATCH_SIZE, LOGITS // (seq_len * vocabulary)))


def _parts(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]

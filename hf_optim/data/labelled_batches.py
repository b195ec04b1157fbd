"""Labelled batches for each task, for evaluation and training: model inputs, and a label for every scored logit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..recipes.config import DataConfig
from .batches import add_decoder_inputs
from .datasets import (
    find_text_column,
    folder_of,
    load_examples,
    shuffle_buffer,
    string_columns,
)
from .forward_inputs import forward_inputs, processed
from .images import find_image_column, load_image
from .processor_errors import no_image_processor, no_tokenizer, processor_errors
from .token_sequences import TokenSequences, reservoir, sequence_length

IGNORE_INDEX = -100
MLM_PROBABILITY = 0.15
BATCH_SIZE = 8
# Upper limit of the logits of one forward: 2^27 in float32 are half a gigabyte.
MAX_LOGITS = 2**27
LABEL_COLUMNS = ("label", "labels", "target")

LabelledBatch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class LabelledBatches:
    """Batches ``(inputs, labels)``.

    Attributes:
        batches: labels have the shape of the logits without the last dimension; -100 marks positions to ignore.
        tokens_per_byte: tokens per UTF-8 byte of the text, or None where that has no meaning.
    """

    batches: list[LabelledBatch]
    tokens_per_byte: float | None = None

    def __iter__(self) -> Iterator[LabelledBatch]:
        return iter(self.batches)


def evaluation_sequences(
    texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig
) -> tuple[Tensor, TokenSequences]:
    """Return sequences ``[n, seq_len]`` of the model's context length: all full ones, or ``data.samples`` at random.

    Text shorter than one sequence gives one shorter sequence. Raises ``DataError`` for fewer than two tokens.
    """
    if tokenizer is None or not hasattr(tokenizer, "bos_token_id"):
        raise no_tokenizer("evaluating on texts needs")
    source = TokenSequences(texts, tokenizer, sequence_length(model.config, tokenizer, data.seq_len))
    chosen = reservoir(islice(source, shuffle_buffer(data)), data.samples, data.seed)
    if not chosen:
        if len(source.remainder) < 2:
            raise DataError(f"the data has {source.tokens} tokens, too few to predict one from another")
        chosen = [source.remainder]
    return torch.stack(chosen), source


def causal_lm_batches(texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig) -> LabelledBatches:
    """Build batches for next-token prediction.

    Each text is preceded by bos, all are joined and split into sequences; tokens 2..n of each sequence are labels.
    """
    ids, source = evaluation_sequences(texts, model, tokenizer, data)
    nothing = torch.full_like(ids[:, :1], IGNORE_INDEX)
    labels = torch.cat([ids[:, 1:], nothing], dim=1)
    size = max_batch_size(model, ids.shape[1])
    batches = [({"input_ids": i}, t) for i, t in zip(ids.split(size), labels.split(size), strict=True)]
    return LabelledBatches(batches, source.tokens / source.bytes)


def masked_lm_batches(texts: Iterable[str], model: Any, tokenizer: Any, data: DataConfig) -> LabelledBatches:
    """Build batches for masked-token prediction: 15 % of the tokens, drawn with the seed, become the mask token."""
    ids, _ = evaluation_sequences(texts, model, tokenizer, data)
    if tokenizer.mask_token_id is None:
        raise DataError("evaluating a masked language model needs a mask token, and this tokenizer has none")
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(data.seed))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    masked = (chance < MLM_PROBABILITY) & ~special
    labels = ids.masked_fill(~masked, IGNORE_INDEX)
    inputs = ids.masked_fill(masked, tokenizer.mask_token_id)
    size = max_batch_size(model, ids.shape[1])
    return LabelledBatches([({"input_ids": i}, t) for i, t in zip(inputs.split(size), labels.split(size), strict=True)])


def sample_examples(data: DataConfig) -> list[dict[str, Any]]:
    """Return all examples, or ``data.samples`` of them at random. Raises ``DataError`` if there are none."""
    examples = reservoir(islice(load_examples(data), shuffle_buffer(data)), data.samples, data.seed)
    if not examples:
        raise DataError(f"{data.dataset} is empty")
    return examples


def text_classification_batches(
    examples: list[dict[str, Any]], model: Any, tokenizer: Any, data: DataConfig
) -> LabelledBatches:
    """Build batches of texts (or of text pairs: two string columns) with a class label."""
    label = find_label_column(examples[0])
    if tokenizer is None:
        raise no_tokenizer("classifying texts needs")
    batches = []
    for part in _split(examples, BATCH_SIZE):
        inputs = tokenize(part, find_text_columns(part[0], data), model, tokenizer)
        batches.append((inputs, torch.tensor([label_id(example[label], model.config) for example in part])))
    return LabelledBatches(batches)


def image_classification_batches(
    examples: list[dict[str, Any]], model: Any, processor: Any, data: DataConfig | None = None
) -> LabelledBatches:
    """Build batches of images with a class label."""
    label, column = find_label_column(examples[0]), find_image_column(examples[0])
    processor = getattr(processor, "image_processor", processor)
    folder = folder_of(data) if data is not None else None
    if column is None:
        raise DataError(f"no column holds an image (columns: {', '.join(examples[0])})")
    if "pixel_values" not in getattr(processor, "model_input_names", ()):
        raise no_image_processor("images need")
    batches = []
    for part in _split(examples, BATCH_SIZE):
        images = [load_image(example[column], folder) for example in part]
        with processor_errors(processor):
            made = processor(images, return_tensors="pt")
        labels = torch.tensor([label_id(example[label], model.config) for example in part])
        batches.append((processed(made, forward_inputs(model, processor)), labels))
    return LabelledBatches(batches)


def seq2seq_batches(examples: list[dict[str, Any]], model: Any, tokenizer: Any) -> LabelledBatches:
    """Build batches for an encoder-decoder model, from the columns ``source`` and ``target`` or the only two."""
    columns = string_columns(examples[0])
    if {"source", "target"} <= set(columns):
        columns = ["source", "target"]
    if len(columns) != 2:
        raise DataError(
            "an encoder-decoder model needs two text columns, source and target; the columns are "
            f"{', '.join(examples[0])}"
        )
    batches = []
    for part in _split(examples, BATCH_SIZE):
        inputs = tokenize(part, columns[:1], model, tokenizer)
        target = tokenize(part, columns[1:], model, tokenizer)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORE_INDEX)
        accepted = forward_inputs(model, tokenizer)
        batches.append((add_decoder_inputs({**inputs, "labels": labels}, model.config, accepted), labels))
    return LabelledBatches(batches)


def tokenize(examples: list[dict[str, Any]], columns: list[str], model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Return the texts of one or two columns as padded inputs ``[n, longest]``, truncated to the model's context."""
    texts = [[str(example[column]) for example in examples] for column in columns]
    length = sequence_length(model.config, tokenizer)
    if tokenizer.pad_token_id is None and len(examples) > 1:
        raise DataError(
            "texts of different lengths need padding, and the tokenizer has no pad token: set tokenizer.pad_token"
        )
    with processor_errors(tokenizer):
        made = tokenizer(
            *texts, padding=len(examples) > 1, truncation=True, max_length=length, return_tensors="pt", verbose=False
        )
    # The mask is kept for the caller too, who counts tokens by it.
    return processed(made, forward_inputs(model, tokenizer) | {"attention_mask"})


def find_text_columns(example: Mapping[str, Any], data: DataConfig) -> list[str]:
    """Return the column with the text, or the two of a pair (the only two string columns that are not labels)."""
    strings = [name for name in string_columns(example) if name not in LABEL_COLUMNS]
    if data.text_column is None and len(strings) == 2:
        return strings
    return [find_text_column(example, data)]


def find_label_column(example: Mapping[str, Any]) -> str:
    """Return the column with the label. Raises ``DataError`` if there is none."""
    for name in LABEL_COLUMNS:
        if name in example:
            return name
    raise DataError(f"classification needs a column {' or '.join(LABEL_COLUMNS)}; the columns are {', '.join(example)}")


def label_id(value: Any, config: Any) -> int:
    """Return the class index of a label; names are looked up in ``config.label2id``. Raises ``DataError``."""
    known = getattr(config, "label2id", None) or {}
    index = known.get(value, value) if isinstance(value, str) else value
    try:
        index = int(index)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < config.num_labels:
        raise DataError(
            f"label {value!r} is not one of the model's {config.num_labels} classes ({', '.join(list(known)[:8])})"
        )
    return index


def max_batch_size(model: Any, seq_len: int) -> int:
    """Return how many sequences fit into one forward with logits below half a gigabyte, 8 at most."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    return max(1, min(BATCH_SIZE, MAX_LOGITS // (seq_len * vocabulary)))


def _split(examples: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]

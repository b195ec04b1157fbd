"""Calibration data: any source a caller may pass becomes one frozen ``CalibrationData``.

Sources are a path, a Hub id, a ``datasets.Dataset``, texts, token ids, batches or a ``DataLoader``. The result holds
CPU tensors of model inputs and a description for the record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from ..recipes.config import DataConfig
from ..runs.distributed import share_of
from ..toolkit.statistics import batch_size, can_split, real_tokens, take_rows
from . import datasets
from .batches import (
    add_decoder_inputs,
    count_tokens,
    hash_batches,
    join_examples,
    require_ordinary,
    to_cpu_batch,
    to_tensors,
)
from .conversations import find_chat_column
from .forward_inputs import class_of, forward_inputs, holds_model_inputs, taken
from .image_texts import is_multimodal
from .images import find_image_column
from .processor_errors import data_errors, no_tokenizer
from .random_inputs import random_inputs
from .row_batches import RowBatches
from .token_sequences import reservoir, sample_sequences, sequence_length

log = logging.getLogger(__name__)

LABELS = "labels"

# Batches of model inputs, and their description for the record.
Built = tuple[list[dict[str, Tensor]], dict[str, Any]]

_ACCEPTED = (
    "pass a path or Hub id, a datasets.Dataset, a list of texts, a LongTensor [n, seq_len], "
    "a list of batches, or a DataLoader"
)


@dataclass(frozen=True)
class CalibrationData:
    """Calibration batches, ready to be fed to a model.

    Attributes:
        batches: keyword arguments of the model's forward, CPU tensors whose first dimension is the batch.
        description: ``{"dataset", "split", "text_column", "samples", "seq_len", "tokens", "seed", "sha256"}`` where
            they apply; ``sha256`` is over the tensors, so that a run can be repeated and checked. ``tokens`` leaves out
            padding.
        labels: the labels of each batch, or None. They are not given to the model in calibration; a step that measures
            its loss adds them.
    """

    batches: list[dict[str, Tensor]]
    description: dict[str, Any]
    labels: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def build_calibration_data(
    source: Any = None,
    *,
    model_config: PretrainedConfig,
    tokenizer: Any = None,
    data: DataConfig | None = None,
    batch_size: int | None = None,
    model: Any = None,
    load_processor: Callable[[], Any] | None = None,
) -> CalibrationData:
    """Build calibration batches from any supported source.

    Args:
        source: None (use ``data.dataset``); the path of a local file or a Hub id; ``"random"`` (random inputs, for
            methods that permit it); a ``datasets.Dataset``; a list of texts; token ids ``[n, seq_len]``; a list of
            batches (mappings of tensors, any modality); a ``torch.utils.data.DataLoader``; or ``CalibrationData``,
            which is returned unchanged.
        model_config: configuration of the model to be calibrated.
        tokenizer: the model's tokenizer for texts, its image processor for images, or its processor for both.
        data: how much to take, from which column, and the seed.
        batch_size: examples per batch, where batches are built here; None uses ``data.batch_size``.
        model: the model or its class, whose forward decides which columns of the data are its inputs; None for the
            class that the configuration names.
        load_processor: returns the model's processor for texts and images, or None; called if the data has both, and
            ``tokenizer`` is a tokenizer alone.

    If several ranks calibrate together, each gets its share of the batches (``distributed.share_of``); the description
    covers all of them. Raises ``DataError``.
    """
    if isinstance(source, CalibrationData):
        return source
    data = data or DataConfig()
    if isinstance(source, (str, Path)):
        data, source = replace(data, dataset=str(source)), None
    if source is None and data.dataset is None:
        raise DataError(
            "this recipe needs calibration data: pass calibration=..., "
            "or name it in the recipe (calibration: {dataset: ...})",
            cli="this recipe needs calibration data: pass --calibration DATA, or name it in the recipe "
            "(calibration: {dataset: ...})",
        )
    model = model if model is not None else class_of(model_config)
    accepted = None if model is None else forward_inputs(model, tokenizer)
    builder = CalibrationSetBuilder(
        model_config, tokenizer, data, batch_size or data.batch_size, accepted, load_processor
    )
    with data_errors(data.dataset or "the calibration data"):
        batches, described = builder.build(source)
        require_real_rows(batches, described.get("dataset"))
        description = {"dataset": described.pop("dataset", None), "seed": data.seed, **described}
        description["sha256"] = hash_batches(batches)
    shares = share_of(batches)
    labels = [batch.pop(LABELS, None) for batch in shares]
    return CalibrationData(shares, description, labels)


def require_real_rows(batches: Sequence[Mapping[str, Tensor]], name: Any) -> None:
    """Raise ``DataError`` if the masks of the data mark every position of every batch as padding."""
    masks = [real_tokens(batch.get("attention_mask"), len(next(iter(batch.values())))) for batch in batches]
    if masks and all(mask is not None and not bool(mask.any()) for mask in masks):
        raise DataError(
            f"{name or 'the calibration data'}: attention_mask is 0 everywhere, so that no position counts; it is 1 "
            "for real tokens and 0 for padding"
        )


@dataclass(frozen=True)
class CalibrationSetBuilder:
    """Builds calibration batches and their description, with one method per kind of source.

    Attributes:
        accepted: names of the inputs that the model takes, or None if its class is unknown.
        load_processor: returns the model's processor for texts and images; or None.
    """

    config: PretrainedConfig
    tokenizer: Any
    data: DataConfig
    batch_size: int
    accepted: frozenset[str] | None = None
    load_processor: Callable[[], Any] | None = None

    def build(self, source: Any) -> Built:
        """Choose the method for the kind of ``source``. Raises ``DataError`` for an unknown kind."""
        if source is None:
            return self.from_name(str(self.data.dataset))
        if isinstance(source, Tensor):
            return self.from_token_ids(source, "token ids in memory")
        if hasattr(source, "features") and hasattr(source, "column_names"):
            return self.from_dataset(source)
        if isinstance(source, Mapping):
            keys = ", ".join(str(key) for key in islice(source, 5))
            raise DataError(
                f"calibration data is a mapping with keys {keys}: pass a list of such batches, or one split of a "
                "dataset"
            )
        if not isinstance(source, Iterable):
            raise DataError(f"cannot calibrate on a value of type {type(source).__name__}: {_ACCEPTED}")
        items = iter(source)
        first = next(items, None)
        if first is None:
            raise DataError("the calibration data is empty")
        everything = source if isinstance(source, Sequence) else chain([first], items)
        if isinstance(first, str):
            return self.from_texts(_only_texts(everything), "texts in memory")
        if isinstance(first, Mapping):
            ids = first.get("input_ids")
            if isinstance(ids, Tensor) and ids.dim() == 1:  # examples of a dataset with format torch, not batches
                return self.from_model_inputs(everything, "examples in memory")
            return self.from_batches(everything)
        raise DataError(f"cannot calibrate on a {type(source).__name__} of {type(first).__name__}: {_ACCEPTED}")

    def from_name(self, name: str) -> Built:
        """Build from the path of a local file, a Hub id, or ``"random"``."""
        if name == "random":
            return self.from_random()
        # A card is published: it names a local file without its folder on this machine.
        shown = Path(name).name if datasets.is_local(name) else name
        split = {} if datasets.is_local(name) else {"split": self.data.split}
        examples = datasets.load_examples(self.data)
        batches, description = self.from_examples(examples, shown, datasets.shuffle_buffer(self.data))
        return batches, {**description, **split}

    def from_dataset(self, source: Any) -> Built:
        """Build from a ``datasets.Dataset`` or ``IterableDataset``; only the start of the latter is read."""
        name = getattr(source, "info", None) and source.info.dataset_name
        samples = self.data.samples
        buffer = datasets.SHUFFLE_FACTOR * samples if samples and not hasattr(source, "__len__") else None
        return self.from_examples(source, name or "dataset in memory", buffer)

    def from_examples(self, examples: Iterable[Any], name: str, shuffle_buffer: int | None) -> Built:
        """Build from mappings of columns: model inputs, images or texts."""
        stream = iter(examples)
        first = next(stream, None)
        if first is None:
            raise DataError(f"{name} is empty")
        if holds_model_inputs(first):
            return self.from_model_inputs(chain([first], stream), name)
        rows = chain([first], stream)
        image, chat = find_image_column(first), find_chat_column(first, self.data)
        made = self.rows
        shown = image is not None or (chat is not None and made.mentions_images(first, chat))
        if image is not None and (not made.takes("input_ids") or not (chat or datasets.string_columns(first))):
            return made.images(rows, image, name, shuffle_buffer)
        if shown and made.takes("input_ids", "pixel_values") and (self.accepted is not None or made.processor):
            text = None if chat else datasets.find_text_column(first, self.data)
            return self._checked(
                made.image_texts(rows, {"image": image, "text": text, "chat": chat}, name, shuffle_buffer)
            )
        if image is not None:
            log.warning("%s: the model reads no images: column %r is left out", name, image)
        if chat is not None:
            if self.data.chat is None:
                log.info("%s: column %r holds conversations, which the chat template renders", name, chat)
            return self._checked(made.conversations(rows, chat, name, shuffle_buffer))
        column = datasets.find_text_column(first, self.data)
        texts = datasets.texts_of(rows, column, name)
        batches, description = self.from_texts(texts, name, shuffle_buffer)
        return batches, {**description, "text_column": column}

    def from_texts(self, texts: Iterable[str], name: str, shuffle_buffer: int | None = None) -> Built:
        """Tokenize and join the texts, and sample sequences from them."""
        self.rows.require_no_images(name)
        tokenizer = self.tokenizer
        if is_multimodal(tokenizer):
            tokenizer = tokenizer.tokenizer
        if tokenizer is None:
            raise no_tokenizer(f"{name}: texts need")
        if not hasattr(tokenizer, "bos_token_id"):
            raise DataError(f"{name}: texts need a tokenizer, not a {type(tokenizer).__name__}")
        length = sequence_length(self.config, tokenizer, self.data.seq_len)
        ids = sample_sequences(
            texts, tokenizer, length, self.data.samples, self.data.seed, shuffle_buffer=shuffle_buffer
        )
        return self.from_token_ids(ids, name, sampled=True)

    def from_token_ids(self, ids: Tensor, name: str, sampled: bool = False) -> Built:
        """Build from token ids ``[n, seq_len]``; ``sampled``: take all of them instead of ``data.samples``."""
        require_ordinary(ids, name)
        if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            raise DataError(f"token ids must be a LongTensor [n, seq_len], not {ids.dtype} {list(ids.shape)}")
        if not sampled:
            ids = torch.stack(reservoir(ids.detach().cpu().long(), self.data.samples, self.data.seed))
        self._check_vocabulary(ids)
        batches = [add_decoder_inputs({"input_ids": part}, self.config) for part in ids.split(self.batch_size)]
        return batches, {"dataset": name, "samples": len(ids), "seq_len": ids.shape[1], "tokens": ids.numel()}

    @cached_property
    def rows(self) -> RowBatches:
        """Builds batches of conversations and images."""
        return RowBatches(self.config, self.tokenizer, self.load_processor, self.data, self.batch_size, self.accepted)

    def _checked(self, built: Built) -> Built:
        """Return batches that a processor made, with decoder inputs. Raises ``DataError`` for unknown token ids."""
        batches, description = built
        for batch in batches:
            if "input_ids" in batch:
                self._check_vocabulary(batch["input_ids"])
        return [self._with_decoder_inputs(batch) for batch in batches], description

    def from_model_inputs(self, examples: Iterable[Any], name: str) -> Built:
        """Build from examples that hold model inputs already, unbatched: every column that the model's forward takes.

        Raises ``DataError`` for a column that some rows lack.
        """
        chosen = reservoir(enumerate(examples), self.data.samples, self.data.seed)
        for row, example in chosen:
            if not isinstance(example, Mapping):
                raise DataError(f"{name}: row {row} is a {type(example).__name__}, not a mapping of columns")
        present = dict.fromkeys(key for _, example in chosen for key, value in example.items() if value is not None)
        accepted = self.accepted if self.accepted is not None else forward_inputs(None, self.tokenizer)
        columns = taken(present, accepted, name)
        if not columns:
            raise DataError(f"{name}: no column is an input of the model; the columns are {', '.join(present)}")
        tensors = [to_tensors(example, columns, row, name) for row, example in chosen]
        # Examples of unequal shape cannot share a batch without padding.
        equal = len({tuple((key, value.shape) for key, value in example.items()) for example in tensors}) == 1
        size = self.batch_size if equal else 1
        return self.from_batches(
            [join_examples(tensors[start : start + size]) for start in range(0, len(tensors), size)], name
        )

    def from_batches(self, source: Iterable[Any], name: str = "batches in memory") -> Built:
        """Take batches in order, up to ``data.samples`` examples; the last one is shortened to fit."""
        batches: list[dict[str, Tensor]] = []
        examples = 0
        logged: set[str] = set()
        for item in source:
            if self.data.samples is not None and examples >= self.data.samples:
                break
            columns = None
            if self.accepted is not None and isinstance(item, Mapping):
                fresh = [key for key in map(str, item) if key not in logged]
                taken(fresh, self.accepted, name)
                logged.update(fresh)
                columns = self.accepted
            batch = self._with_decoder_inputs(to_cpu_batch(item, len(batches), columns))
            room = batch_size(batch) if self.data.samples is None else self.data.samples - examples
            batches.append(take_rows(batch, slice(room)) if can_split(batch) else batch)
            examples += batch_size(batches[-1])
            if "input_ids" in batch:
                self._check_vocabulary(batch["input_ids"])
        tokens = sum(map(count_tokens, batches))
        counted = (
            {"tokens": tokens, "seq_len": max(b["input_ids"].shape[-1] for b in batches if "input_ids" in b)}
            if tokens
            else {}
        )
        return batches, {"dataset": name, "samples": examples, **counted}

    def _with_decoder_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = {key: value for key, value in batch.items() if key == LABELS}
        return {**add_decoder_inputs(batch, self.config, self.accepted), **labels}

    def from_random(self) -> Built:
        """Build random token ids, or random pixels for a vision model."""
        name, inputs = random_inputs(self.config, self.data)
        if name == "input_ids":
            return self.from_token_ids(inputs, "random", sampled=True)
        batches = [{name: part} for part in inputs.split(self.batch_size)]
        return batches, {"dataset": "random", "samples": len(inputs)}

    def _check_vocabulary(self, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise DataError(f"input_ids must be whole numbers (int64), not {ids.dtype} of shape {list(ids.shape)}")
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            raise DataError(
                f"token ids range from {int(ids.min())} to {int(ids.max())}, but the vocabulary of the model has "
                f"{vocabulary}: pass the tokenizer that belongs to the model"
            )


def _only_texts(items: Iterable[Any]) -> Iterator[str]:
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise DataError(f"item {number} of the calibration texts is a {type(item).__name__}, not text")
        yield item

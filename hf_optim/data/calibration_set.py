"""Data: rows of a Hub dataset or a local file, windows of tokens, and calibration batches.

Whatever a caller brings as calibration data (a path, a Hub id, a ``datasets.Dataset``, texts, token windows, batches, a
``DataLoader``) becomes one frozen ``CalibrationData``: CPU tensors of model inputs and a description for the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from ..recipes.config import DataConfig
from ..runs.distributed import share_of
from .batches import cpu_batch, hash_batches, with_decoder_inputs
from .datasets import find_column, image_column, is_local, is_streamed, load_image, load_rows, string_columns
from .token_windows import random_tokens, reservoir, window_length, windows

# Of a stream, so many windows are looked at for each one that is kept: past the head of the data, and bounded.
POOL = 32


@dataclass(frozen=True)
class CalibrationData:
    """Calibration batches, ready to be fed to a model.

    Attributes:
        batches: keyword arguments of the model's forward, CPU tensors whose first dimension is the batch.
        description: ``{"dataset", "split", "text_column", "samples", "seq_len", "tokens", "seed", "sha256"}`` where
            they apply; ``sha256`` is over the tensors, so that a run can be repeated and checked.
    """

    batches: list[dict[str, Tensor]]
    description: dict[str, Any]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def texts(config: DataConfig) -> Iterator[str]:
    """The texts of a dataset, in order; empty ones are left out. Raises ``DataError``."""
    rows = iter(load_rows(config))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{config.dataset}: split {config.split!r} has no rows")
    column = find_column(first, config)
    yield from _column_texts(first, rows, column, str(config.dataset))


def _column_texts(first: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[str]:
    for number, row in enumerate(chain([first], rows)):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{name}: row {number} has a {type(value).__name__} in column {column!r}, not text")
        if value and value.strip():
            yield value


def calibration_data(
    source: Any = None,
    *,
    model_config: PretrainedConfig,
    tokenizer: Any = None,
    data: DataConfig | None = None,
    batch_size: int | None = None,
) -> CalibrationData:
    """Calibration batches from anything that a caller may bring.

    Args:
        source: None (then ``data.dataset``); the path of a local file or a Hub id; ``"random"`` (random inputs, for
            methods that permit it); a ``datasets.Dataset``; a list of texts; token windows ``[n, seq_len]``; a list
            of batches (mappings of tensors, any modality); a ``torch.utils.data.DataLoader``; or ``CalibrationData``.
        model_config: of the model to be calibrated.
        tokenizer: the model's tokenizer for texts, or its image processor for images.
        data: how much to take, which column, and the seed.
        batch_size: rows per batch, where batches are made here; None takes ``data.batch_size``.

    Where several ranks calibrate together, each gets its share of the batches (``ranks.share_of``), and the
    description is that of all. ``CalibrationData`` is taken as it is.

    Raises ``DataError``.
    """
    if isinstance(source, CalibrationData):
        return source
    data = data or DataConfig()
    if isinstance(source, (str, Path)):
        data, source = replace(data, dataset=str(source)), None
    if source is None and data.dataset is None:
        raise DataError(
            "this recipe needs calibration data: pass calibration=..., "
            "or name it in the recipe (calibration: {dataset: ...})"
        )
    maker = _Maker(model_config, tokenizer, data, batch_size or data.batch_size)
    batches, described = maker.make(source)
    kept = {"dataset": described.pop("dataset", None), "seed": data.seed, **described}
    return CalibrationData(share_of(batches), {**kept, "sha256": hash_batches(batches)})


@dataclass(frozen=True)
class _Maker:
    """Makes batches and their description of one kind of source each."""

    config: PretrainedConfig
    tokenizer: Any
    data: DataConfig
    batch_size: int

    def make(self, source: Any) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        if source is None:
            return self.named(str(self.data.dataset))
        if isinstance(source, Tensor):
            return self.tokens(source, "token ids in memory")
        if hasattr(source, "features") and hasattr(source, "column_names"):
            return self.dataset(source)
        if isinstance(source, Mapping):
            raise DataError(
                f"calibration data is a mapping with keys {_few(source)}: pass a list of such batches, or one split"
            )
        if not isinstance(source, Iterable):
            raise DataError(f"cannot calibrate on a {type(source).__name__}: {_ACCEPTED}")
        items = iter(source)
        first = next(items, None)
        if first is None:
            raise DataError("the calibration data is empty")
        everything = source if isinstance(source, Sequence) else chain([first], items)
        if isinstance(first, str):
            return self.texts(_only_texts(everything), "texts in memory")
        if isinstance(first, Mapping):
            return self.ready(everything)
        raise DataError(f"cannot calibrate on a {type(source).__name__} of {type(first).__name__}: {_ACCEPTED}")

    def named(self, name: str) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        if name == "random":
            return self.random()
        # A card is published: it names a local file, not where it lies on this machine.
        shown = Path(name).name if is_local(name) else name
        split = {} if is_local(name) else {"split": self.data.split}
        pool = POOL * self.data.samples if self.data.samples and is_streamed(self.data) else None
        batches, description = self.rows(load_rows(self.data), shown, pool)
        return batches, {**description, **split}

    def dataset(self, source: Any) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        name = getattr(source, "info", None) and source.info.dataset_name
        pool = POOL * self.data.samples if self.data.samples and not hasattr(source, "__len__") else None
        return self.rows(source, name or "dataset in memory", pool)

    def rows(self, rows: Iterable[Any], name: str, pool: int | None) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        stream = iter(rows)
        first = next(stream, None)
        if first is None:
            raise DataError(f"{name}: no rows")
        if isinstance(first.get("input_ids"), (list, Tensor)) or isinstance(first.get("pixel_values"), (list, Tensor)):
            return self.prepared(chain([first], stream), name)
        image = image_column(first)
        if image is not None and not string_columns(first):
            return self.images(chain([first], stream), image, name, pool)
        column = find_column(first, self.data)
        batches, description = self.texts(_column_texts(first, stream, column, name), name, pool)
        return batches, {**description, "text_column": column}

    def texts(
        self, texts: Iterable[str], name: str, pool: int | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        if self.tokenizer is None:
            raise DataError(
                f"{name}: texts need a tokenizer, and the model's folder has none: "
                "pass tokenizer=AutoTokenizer.from_pretrained(...)"
            )
        if not hasattr(self.tokenizer, "bos_token_id"):
            raise DataError(f"{name}: texts need a tokenizer, and a {type(self.tokenizer).__name__} was given")
        length = window_length(self.config, self.tokenizer, self.data.seq_len)
        ids = windows(texts, self.tokenizer, length, self.data.samples, self.data.seed, pool=pool)
        return self.tokens(ids, name, chosen=True)

    def tokens(self, ids: Tensor, name: str, chosen: bool = False) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            raise DataError(f"token ids must be a LongTensor [n, seq_len], not {ids.dtype} {list(ids.shape)}")
        if not chosen:
            ids = torch.stack(reservoir(ids.detach().cpu().long(), self.data.samples, self.data.seed))
        self.check_vocabulary(ids)
        batches = [with_decoder_inputs({"input_ids": part}, self.config) for part in ids.split(self.batch_size)]
        return batches, {"dataset": name, "samples": len(ids), "seq_len": ids.shape[1], "tokens": ids.numel()}

    def check_vocabulary(self, ids: Tensor) -> None:
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            raise DataError(
                f"token ids reach from {int(ids.min())} to {int(ids.max())}, and the model has {vocabulary}: "
                "pass the tokenizer that belongs to the model"
            )

    def images(
        self, rows: Iterable[Any], column: str, name: str, pool: int | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        processor = getattr(self.tokenizer, "image_processor", self.tokenizer)
        if "pixel_values" not in getattr(processor, "model_input_names", ()):
            raise DataError(
                f"{name}: images (column {column!r}) need the model's image processor: "
                "pass tokenizer=AutoImageProcessor.from_pretrained(...)"
            )
        chosen = reservoir(islice(rows, pool), self.data.samples, self.data.seed)
        batches = []
        for start in range(0, len(chosen), self.batch_size):
            pictures = [load_image(row[column]) for row in chosen[start : start + self.batch_size]]
            batches.append({"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"]})
        return batches, {"dataset": name, "image_column": column, "samples": len(chosen)}

    def prepared(self, rows: Iterable[Any], name: str) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        chosen = reservoir(rows, self.data.samples, self.data.seed)
        main = "input_ids" if "input_ids" in chosen[0] else "pixel_values"
        keys = [key for key in chosen[0] if key in _MODEL_INPUTS]
        batches = []
        # Rows of unequal length cannot share a batch without padding, which calibration should not see.
        equal = len({len(row[main]) for row in chosen}) == 1
        size = self.batch_size if equal else 1
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            batches.append({key: torch.stack([torch.as_tensor(row[key]) for row in part]) for key in keys})
        return self.ready(batches, name)

    def ready(
        self, source: Iterable[Any], name: str = "batches in memory"
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        batches: list[dict[str, Tensor]] = []
        rows = 0
        for item in source:
            if self.data.samples is not None and rows >= self.data.samples:
                break
            batch = with_decoder_inputs(cpu_batch(item, len(batches)), self.config)
            room = len(next(iter(batch.values()))) if self.data.samples is None else self.data.samples - rows
            batches.append({key: value[:room] for key, value in batch.items()})
            rows += len(next(iter(batches[-1].values())))
            if "input_ids" in batch:
                self.check_vocabulary(batch["input_ids"])
        tokens = sum(b["input_ids"].numel() for b in batches if "input_ids" in b)
        counted = {"tokens": tokens, "seq_len": max(b["input_ids"].shape[-1] for b in batches)} if tokens else {}
        return batches, {"dataset": name, "samples": rows, **counted}

    def random(self) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        samples = self.data.samples or 128
        text = self.config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None)
        if vocabulary is not None:
            length = window_length(self.config, None, self.data.seq_len)
            return self.tokens(random_tokens(vocabulary, samples, length, self.data.seed), "random", chosen=True)
        size = getattr(self.config, "image_size", None)
        if size is None:
            raise DataError(f"cannot make random inputs for {type(self.config).__name__}: pass a list of batches")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (samples, getattr(self.config, "num_channels", 3), height, width)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(self.data.seed))
        batches = [{"pixel_values": part} for part in pixels.split(self.batch_size)]
        return batches, {"dataset": "random", "samples": samples}


_ACCEPTED = (
    "pass a path or Hub id, a datasets.Dataset, a list of texts, a LongTensor [n, seq_len], "
    "a list of batches, or a DataLoader"
)
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "decoder_input_ids", "labels")


def _few(source: Iterable[Any]) -> str:
    return ", ".join(str(key) for key in islice(source, 5))


def _only_texts(items: Iterable[Any]) -> Iterator[str]:
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise DataError(f"item {number} of the calibration texts is a {type(item).__name__}, not text")
        yield item

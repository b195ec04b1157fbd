"""Examples of a Hub dataset or of a local file, and which of their columns holds the text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..recipes.config import DataConfig
from ..runs.progress import silenced, stage
from ..trust.bounds import first_line, shown
from .images import find_image_column
from .processor_errors import data_errors

# A local file above this size (64 MB) is streamed instead of read completely.
STREAMED_ABOVE = 64 * 2**20
# From a stream, this many examples are read per sample drawn: more than the head of the data, but bounded.
SHUFFLE_FACTOR = 32
TEXT_COLUMNS = ("text", "sentence", "content")
# quoting=3 (csv.QUOTE_NONE): tab-separated files have no quoting, and a lone quotation mark is text.
# keep_default_na=False: "NA" and "null" are words.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".text": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3, "keep_default_na": False}),
    ".parquet": ("parquet", {}),
}
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")


def is_local(name: str) -> bool:
    """Return True if ``name`` is a local file: it exists, or looks like a path or a data file and not like a Hub id."""
    path = Path(name)
    known = path.suffix.lower() in (*BUILDERS, *PICKLES)
    return os.path.exists(path) or known or name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1


def is_streamed(config: DataConfig) -> bool:
    """Return True if the data is not read to its end: a file above 64 MB, or a sample of a Hub dataset."""
    if is_local(str(config.dataset)):
        path = _expanded(str(config.dataset))
        return os.path.isfile(path) and path.stat().st_size > STREAMED_ABOVE
    return config.samples is not None


def shuffle_buffer(config: DataConfig) -> int | None:
    """Return how many examples to draw ``config.samples`` from if the data is streamed; None to read all of it."""
    if not (config.dataset and config.samples and is_streamed(config)):
        return None
    return SHUFFLE_FACTOR * config.samples


def load_examples(config: DataConfig, *, limit: int | None = None) -> Iterable[dict[str, Any]]:
    """Return the examples of ``config.dataset``, read lazily: one mapping of columns each.

    The suffix of a local file gives its format (.txt .json .jsonl .csv .tsv .parquet). It is read in place, without a
    copy in the cache of datasets. A text file is one example (or one per paragraph, if it is above 64 MB). Any other
    name is a Hub id, followed by a colon and the name of a configuration if the dataset has several:
    ``Salesforce/wikitext:wikitext-2-v1``.

    Args:
        config: which dataset and split.
        limit: the largest number of examples to read.

    Raises ``DataError`` for a missing or unreadable file, a pickle, or an unavailable Hub dataset.
    """
    if not config.dataset:
        raise DataError("no dataset given: pass a Hub id or a local text, json, jsonl, csv, tsv or parquet file")
    name = str(config.dataset)
    examples = _with_data_errors(_open_local(_expanded(name)) if is_local(name) else _open_hub(name, config), name)
    if is_local(name) and not is_streamed(config):
        # Read to the end now: only there do the readers of datasets close their file.
        return list(examples)[:limit]
    return islice(examples, limit)


def require_readable(config: DataConfig) -> None:
    """Raise ``DataError`` unless a dataset that is named has a first example that can be read: before other work."""
    if config.dataset is not None:
        _first_example(config)


def require_texts(config: DataConfig) -> None:
    """Raise ``DataError`` unless a dataset has a column of plain texts, by its first example: before other work."""
    find_text_column(_first_example(config), config)


def _first_example(config: DataConfig) -> dict[str, Any]:
    with data_errors(str(config.dataset)):
        first = next(iter(load_examples(config, limit=1)), None)
        if first is None:
            raise DataError(f"{config.dataset}: no rows")
        return first


def load_texts(config: DataConfig) -> Iterator[str]:
    """Yield the non-empty texts of a dataset, in order. Raises ``DataError``."""
    examples = iter(load_examples(config))
    first = next(examples, None)
    if first is None:
        raise DataError(f"{config.dataset}: split {config.split!r} is empty")
    yield from texts_of(chain([first], examples), find_text_column(first, config), str(config.dataset))


def texts_of(examples: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[str]:
    """Yield the non-empty texts in one column. Raises ``DataError`` for a value that is not text."""
    for number, example in enumerate(examples):
        value = example.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{name}: column {column!r} of row {number} holds a {type(value).__name__}, not text")
        if value and value.strip():
            yield value


def _expanded(name: str) -> Path:
    return Path(os.path.expanduser(name))  # an unknown user stays as it is


def _open_local(path: Path) -> Iterable[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(f"{path.name}: {suffix} files can run code when they are read; use .parquet or .jsonl instead")
    if not os.path.exists(path):
        raise DataError(f"no data file {shown(str(path))}")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: name one file in it")
    if not path.is_file():
        raise DataError(f"{str(path)!r} is not a regular file")
    if suffix not in BUILDERS:
        raise DataError(f"{path.name}: unknown file format {suffix!r} (known: {', '.join(BUILDERS)})")
    if path.stat().st_size == 0:
        raise DataError(f"{str(path)!r} is empty")
    from datasets import load_dataset

    builder, options = BUILDERS[suffix]
    if builder == "text":
        options = {"sample_by": "paragraph" if path.stat().st_size > STREAMED_ABOVE else "document"}
    try:
        with silenced():
            return load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
    except Exception as error:
        raise DataError(f"{path.name}: cannot be read: {_reason(error)}") from error


def _open_hub(name: str, config: DataConfig) -> Iterable[dict[str, Any]]:
    import datasets

    repository, _, configuration = name.partition(":")
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    try:
        # Offline, only datasets prepared in the cache can be loaded, and those are not streamed.
        with stage(f"loading {repository}"):
            return datasets.load_dataset(
                repository,
                configuration or None,
                split=config.split,
                streaming=config.samples is not None and not offline,
            )
    except Exception as error:
        hint = (
            " (offline: HF_HUB_OFFLINE is set, so only cached datasets and local files can be read)" if offline else ""
        )
        raise DataError(
            f"cannot load the dataset {shown(name)}, split {config.split!r}: {_reason(error)}{hint}"
        ) from error


def _with_data_errors(source: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yield the examples; turn what a reader raises into a ``DataError`` that names the data."""
    examples = iter(source)
    number = 0
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{name}: cannot be read after row {number}: {_reason(error)}") from error
        number += 1
        yield example


def _reason(error: BaseException) -> str:
    # The readers of datasets wrap the error that says what is wrong.
    return first_line(error.__cause__ or error, typed=True)


def folder_of(config: DataConfig) -> Path | None:
    """Return the folder of a local data file, or None."""
    name = str(config.dataset)
    return _expanded(name).absolute().parent if config.dataset and is_local(name) else None


def string_columns(example: Mapping[str, Any]) -> list[str]:
    """Return the columns of an example that hold text, without those that name image files."""
    image = find_image_column(example)
    return [key for key, value in example.items() if isinstance(value, str) and key != image]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def find_text_column(example: Mapping[str, Any], config: DataConfig) -> str:
    """Return the column with the text.

    This is ``config.text_column`` if set; else ``text``, ``sentence`` or ``content``; else the only string column.
    Raises ``DataError``, which lists the columns.
    """
    if config.text_column is not None:
        if config.text_column not in example:
            raise DataError(f"{config.dataset}: no column {config.text_column!r} (it has {', '.join(example)})")
        return config.text_column
    for name in TEXT_COLUMNS:
        if name in example:
            return name
    strings = string_columns(example)
    if len(strings) == 1:
        return strings[0]
    reason = "several columns hold text" if strings else "no column holds text"
    chats = [name for name, value in example.items() if value and isinstance(value, list) and _is_message(value[0])]
    if chats and not strings:
        raise DataError(
            f"{config.dataset or 'the data'}: column {chats[0]!r} holds conversations, which calibration reads (chat: "
            "true); training and evaluation read texts, so add a column of texts"
        )
    found = f"{config.dataset or 'the data'}: {reason} (columns: {', '.join(example)}); name one with"
    raise DataError(f"{found} text_column", cli=f"{found} --text-column")

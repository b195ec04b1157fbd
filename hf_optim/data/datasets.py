"""Rows of a Hub dataset or of a local file, and which of their columns holds the text or the image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..recipes.config import DataConfig

LARGE = 64 * 2**20
TEXT_COLUMNS = ("text", "sentence", "content")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
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
    """Whether ``name`` means a local file: it exists, or looks like a path or a data file rather than a Hub id."""
    path = Path(name)
    known = path.suffix.lower() in (*BUILDERS, *PICKLES)
    return path.exists() or known or name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1


def is_streamed(config: DataConfig) -> bool:
    """Whether the data is too large to be read to its end: a file above 64 MB, or a sample of a Hub dataset."""
    if is_local(str(config.dataset)):
        path = Path(str(config.dataset)).expanduser()
        return path.is_file() and path.stat().st_size > LARGE
    return config.samples is not None


def load_rows(config: DataConfig, *, limit: int | None = None) -> Iterable[dict[str, Any]]:
    """The rows of ``config.dataset``, one mapping of columns each, read as they are asked for.

    A local file is known by its suffix (.txt .json .jsonl .csv .tsv .parquet); it is read in place, without a copy in
    the cache of datasets. A text file is one row (its paragraphs, when it is above 64 MB). Anything else is a Hub id,
    with the name of a configuration after a colon where the dataset has several: ``Salesforce/wikitext:wikitext-2-v1``.

    Args:
        config: which dataset and split.
        limit: read at most so many rows.

    Raises ``DataError``: no such file, an unreadable one, a pickle, or a Hub dataset that is not to be had.
    """
    if not config.dataset:
        raise DataError("no dataset is named: give a Hub id or a local text, json, jsonl, csv, tsv or parquet file")
    name = str(config.dataset)
    rows = _guarded(_local(Path(name).expanduser()) if is_local(name) else _hub(name, config), name)
    if is_local(name) and not is_streamed(config):
        # To the end at once: the readers of datasets close their file only there.
        return list(rows)[:limit]
    return islice(rows, limit)


def _local(path: Path) -> Iterable[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(
            f"{path.name}: {suffix} files can run code when they are read, and are refused; use .parquet or .jsonl"
        )
    if not path.exists():
        raise DataError(f"no data file {str(path)!r}")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: name one file in it")
    if suffix not in BUILDERS:
        raise DataError(f"{path.name}: cannot tell the format from {suffix!r} (known: {', '.join(BUILDERS)})")
    if path.stat().st_size == 0:
        raise DataError(f"{str(path)!r} is empty")
    from datasets import load_dataset

    builder, options = BUILDERS[suffix]
    if builder == "text":
        options = {"sample_by": "paragraph" if path.stat().st_size > LARGE else "document"}
    return load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)


def _hub(name: str, config: DataConfig) -> Iterable[dict[str, Any]]:
    import datasets

    repository, _, configuration = name.partition(":")
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    try:
        # Offline, only what lies prepared in the cache can be had, and that is not streamed.
        return datasets.load_dataset(
            repository, configuration or None, split=config.split, streaming=config.samples is not None and not offline
        )
    except Exception as error:
        hint = (
            " (offline: HF_HUB_OFFLINE is set, so only cached datasets and local files can be read)" if offline else ""
        )
        raise DataError(f"cannot load the dataset {name!r}, split {config.split!r}: {_line(error)}{hint}") from error


def _guarded(source: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows; what a reader raises on the way becomes a ``DataError`` that names the data."""
    rows = iter(source)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{name}: cannot be read after row {number}: {_line(error)}") from error
        number += 1
        yield row


def _line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def string_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold text."""
    return [key for key, value in row.items() if isinstance(value, str)]


def find_column(row: Mapping[str, Any], config: DataConfig) -> str:
    """The column with the text: the named one; else ``text``, ``sentence``, ``content``; else the only string column.

    Raises ``DataError`` that lists the columns.
    """
    if config.text_column is not None:
        if config.text_column not in row:
            raise DataError(f"{config.dataset}: no column {config.text_column!r} (it has {', '.join(row)})")
        return config.text_column
    for name in TEXT_COLUMNS:
        if name in row:
            return name
    strings = string_columns(row)
    if len(strings) == 1:
        return strings[0]
    why = "several columns hold text" if strings else "no column holds text"
    raise DataError(f"{config.dataset or 'the data'}: {why} (columns: {', '.join(row)}); name one with text_column")


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column with an image: ``image`` or ``img``, else the only one that holds image bytes or a picture."""
    for name in IMAGE_COLUMNS:
        if name in row and _is_image(row[name]):
            return name
    found = [key for key, value in row.items() if _is_image(value)]
    return found[0] if len(found) == 1 else None


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes) or (hasattr(value, "convert") and hasattr(value, "size"))


def load_image(value: Any) -> Any:
    """A ``PIL.Image`` in RGB from image bytes, the mapping that datasets stores, or a picture."""
    import io

    from PIL import Image, UnidentifiedImageError

    data = value.get("bytes") if isinstance(value, Mapping) else value
    try:
        picture: Any = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, AttributeError) as error:
        raise DataError(f"cannot decode an image: {error}") from error

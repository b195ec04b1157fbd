"""Images of a dataset: embedded bytes, PIL images, and files in the folder of the data. URLs are not fetched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from ..errors import CheckpointError, DataError
from ..trust.bounds import first_line, shown
from ..trust.files import require_inside

IMAGE_COLUMNS = ("image", "images", "img", "pixel_values")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A larger file is not an image of a dataset.
MAX_BYTES = 256 * 2**20


def find_image_column(example: Mapping[str, Any]) -> str | None:
    """Return the column with an image: ``image``, ``images`` or ``img``, else the only one that holds an image.

    An image is bytes, what datasets makes of them, a PIL image, or the name of an image file; or a list of these.
    """
    for name in IMAGE_COLUMNS:
        if name in example and is_image(example[name]):
            return name
    found = [key for key, value in example.items() if is_image(value, named=False)]
    return found[0] if len(found) == 1 else None


def is_image(value: Any, named: bool = True) -> bool:
    """Return True if a value is an image or a list of images; names of files count if ``named``."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_image(item, named) for item in value)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or (named and _is_name(value.get("path")))
    if isinstance(value, str):
        return named and _is_name(value)
    return isinstance(value, bytes) or (hasattr(value, "convert") and hasattr(value, "size"))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and PurePath(value).suffix.lower() in SUFFIXES


def images_in(value: Any, folder: Path | None, where: str) -> list[Any]:
    """Return the images of a column, in their order, as RGB ``PIL.Image``; empty for None. Raises ``DataError``."""
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [load_image(item, folder, where) for item in values]


def load_image(value: Any, folder: Path | None = None, where: str = "an image") -> Any:
    """Return an RGB ``PIL.Image`` from image bytes, the mapping that datasets stores, a PIL image, or a file's name.

    Args:
        value: the image.
        folder: the folder of the data file, inside which named files are read; None reads none.
        where: the data and the row, for messages.

    Raises ``DataError`` if it cannot be decoded, or names a file outside the folder or a URL.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images are read with Pillow, which is not installed: pip install pillow") from error

    data: Any = value
    if isinstance(value, Mapping):
        data = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(data, str):
        data = _read_file(data, folder, where)
    try:
        image: Any = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        return image.convert("RGB")
    except (OSError, AttributeError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot decode an image: {first_line(error)}") from error


def _read_file(name: str, folder: Path | None, where: str) -> bytes:
    if "://" in name or name.startswith("data:"):
        raise DataError(
            f"{where}: the image {shown(name)} is a URL, which is not fetched: store the image beside the data"
        )
    if folder is None:
        raise DataError(
            f"{where}: the image {shown(name)} is the name of a file; such names are read only from a local data file, "
            "relative to its folder: pass PIL images or bytes"
        )
    try:
        path = require_inside(folder, name)
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{where}: the image {shown(name)} has more than {MAX_BYTES >> 20} MB")
        return path.read_bytes()
    except CheckpointError as error:
        raise DataError(
            f"{where}: the image {shown(name)} is not a file inside the folder of the data: {first_line(error)}"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: the image {shown(name)} cannot be read: {error.strerror}") from error

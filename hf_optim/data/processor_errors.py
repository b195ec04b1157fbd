"""Errors of data, tokenizers and image processors as ``DataError``: they are input, with values of any type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import DataError, OptimError
from ..trust.bounds import first_line, shown


def no_tokenizer(need: str) -> DataError:
    """Return the error for texts without a tokenizer; ``need`` begins the message, such as ``"classifying needs"``."""
    return DataError(
        f"{need} the model's tokenizer, and its folder has none: pass tokenizer=AutoTokenizer.from_pretrained(...)",
        cli=f"{need} the model's tokenizer, and its folder has none: copy the files of the tokenizer into it "
        "(tokenizer.json, tokenizer_config.json)",
    )


def no_image_processor(need: str) -> DataError:
    """Return the error for images without an image processor; ``need`` begins the message."""
    return DataError(
        f"{need} the model's image processor, and its folder has none: pass "
        "tokenizer=AutoImageProcessor.from_pretrained(...)",
        cli=f"{need} the model's image processor, and its folder has none: copy preprocessor_config.json into it",
    )


@contextmanager
def processor_errors(processor: Any) -> Iterator[None]:
    """Raise ``DataError`` in place of the errors of a tokenizer or image processor that the body calls."""
    try:
        yield
    except (OptimError, MemoryError):
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise DataError(
            f"{type(processor).__name__} cannot read the data: {first_line(error, typed=True)}. Try it alone, and see "
            "whether its files belong to the model"
        ) from error


@contextmanager
def data_errors(name: Any) -> Iterator[None]:
    """Raise ``DataError`` in place of the errors of others while data is read and made into batches.

    A caller's dataset, its values and its generators may raise anything.
    """
    try:
        yield
    except (OptimError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{shown(name)} cannot be made into batches: {first_line(error, typed=True)}") from error


def token_limit(holder: Any, name: str) -> int | None:
    """Return a number of tokens that a configuration or tokenizer gives; None if it gives none.

    Raises ``DataError`` if it is not a number of tokens.
    """
    value = getattr(holder, name, None)
    if value is None or value is False or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < 1e40:
        raise DataError(f"{name} of {type(holder).__name__} is {shown(value)}, not a number of tokens")
    return int(value)

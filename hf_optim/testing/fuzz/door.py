"""A door: one way in for one kind of input, and what may come out of it."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from .examples import Examples

Enter = Callable[[Examples, Path, Random], None]


class WrongResult(Exception):
    """An input was accepted and gave a result that neither the unmutated one nor stock transformers gives."""


class StockError(Exception):
    """transformers refused an input before hf_optim was reached, and refuses it in a process without hf_optim, too."""


@dataclass(frozen=True)
class Door:
    """One way in.

    Attributes:
        kind: what is mutated.
        name: what reads it.
        enter: mutates an example in an empty folder, and reads it; returns after reading, or raises.
    """

    kind: str
    name: str
    enter: Enter


def frames_of_ours(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of hf_optim in the tracebacks of an error and of those that led to it, without the fuzzer's."""
    frames = [frame for each in _chain(error) for frame in traceback.extract_tb(each.__traceback__)]
    return [
        frame
        for frame in frames
        if frame.filename.startswith(_roots()) and not frame.filename.startswith(os.path.dirname(__file__))
    ]


@cache
def _roots() -> tuple[str, ...]:
    """Return the folders of hf_optim's packages."""
    found = [importlib.util.find_spec(name) for name in ("hf_optim", "hf_optim_plugins", "hf_optim_kernels")]
    return tuple(f"{home}{os.sep}" for spec in found if spec for home in spec.submodule_search_locations or ())


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [cause for cause in (each.__cause__, each.__context__) if cause is not None]

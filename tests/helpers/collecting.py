"""A plugin of pytest: the garbage collector does not walk what has been imported, and trainings do not call it.

Torch, transformers and what they import are half a million objects, and a full collection takes longer than a training
of a tiny model. So nothing is collected while tests are imported and collected; then all that is there is frozen, again
behind files of tests that have imported more. accelerate's full collections around each training are left out on a
machine without a GPU, and its own passes are rarer. Tests of freed memory do without a collector or call it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

MORE = 30  # modules
THRESHOLD = 50_000  # objects, in place of 700: a syntax tree or a traced model has that many

frozen_modules = 0
gc.disable()


def freeze() -> None:
    global frozen_modules
    gc.collect()
    gc.freeze()
    frozen_modules = len(sys.modules)


def pytest_collection_finish() -> None:
    gc.enable()
    gc.set_threshold(THRESHOLD, *gc.get_threshold()[1:])
    freeze()


def pytest_unconfigure() -> None:
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def imports_are_frozen() -> Iterator[None]:
    yield
    if len(sys.modules) > frozen_modules + MORE:
        freeze()


@pytest.fixture(autouse=True, scope="session")
def trainings_do_not_collect() -> Iterator[None]:
    from accelerate.utils import memory
    from torch import cuda

    with pytest.MonkeyPatch.context() as patch:
        if not cuda.is_available():
            patch.setattr(memory, "clear_device_cache", lambda garbage_collection=False: None)
        yield

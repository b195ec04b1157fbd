"""A test that leaves a switch of the whole process changed fails by itself: the tests after it would, at random."""

from __future__ import annotations

import logging

import pytest


def _switches() -> dict[str, object]:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as theirs

    return {
        "verbosity of transformers": theirs.get_verbosity(),
        "progress bars of transformers": theirs.is_progress_bar_enabled(),
        "progress bars of huggingface_hub": not are_progress_bars_disabled(),
        "level below which logging is off": logging.root.manager.disable,
    }


@pytest.fixture(autouse=True)
def switches_as_found():
    before = _switches()
    yield
    after = _switches()
    assert after == before, "the test left the process changed"

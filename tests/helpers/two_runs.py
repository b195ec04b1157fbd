"""A pytest plugin for the two runs of ``make test``.

The first runs the tests marked ``interpreted``, under Triton's interpreter, and leaves its counts in pytest's cache.
The second runs all others and prints the sum of both.
"""

from __future__ import annotations

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
KEY = "hf_optim/counts_of_the_interpreted_run"


def pytest_report_header() -> str:
    kind = "all but interpreted" if INTERPRETS else "interpreted, for which TRITON_INTERPRET=1 is needed"
    return f"deselected: gpu, where there is no CUDA device; {kind}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this process cannot run: hundreds of skips would hide those that a reader should see."""
    from torch import cuda

    def is_runnable(item: pytest.Item) -> bool:
        if item.get_closest_marker("gpu") and not cuda.is_available():
            return False
        return bool(item.get_closest_marker("interpreted")) == INTERPRETS

    config.hook.pytest_deselected(items=[item for item in items if not is_runnable(item)])
    items[:] = [item for item in items if is_runnable(item)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    yield
    cache = getattr(config, "cache", None)
    if cache is None or config.option.collectonly or hasattr(config, "workerinput"):
        return
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("failed", "passed", "skipped", "error")}
    if INTERPRETS:
        cache.set(KEY, counts)
    elif before := cache.get(KEY, None):
        cache.set(KEY, None)
        terminalreporter.line(f"interpreted: {_text(before)}")
        terminalreporter.line(f"both runs:   {_text({name: n + before[name] for name, n in counts.items()})}")


def _text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

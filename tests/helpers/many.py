"""A plugin of pytest: of many like cases a twelfth or a quarter runs in ``make test``, all in ``make test-models``."""

from __future__ import annotations

import zlib
from collections import defaultdict

import pytest

EVERY = 12
# Tests of the conformance suite, which others import too and which has no marker of ours.
CONFORMANCE = {
    "test_a_checkpoint_outlives_the_tool": pytest.mark.many("cls"),
    "test_a_second_run_is_bit_exact_leaves_global_and_random_state_alone_and_is_freed_when_deleted": pytest.mark.many(),
    "test_from_pretrained_gives_what_optimize_gives": pytest.mark.many(),
    "test_nothing_is_left_behind_when_it_raises": pytest.mark.many(),
    "test_an_error_about_non_finite_activations_names_the_module": pytest.mark.many(),
}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark eleven twelfths of the cases of each function marked ``many`` as ``slow``: always the same, in no pattern.

    With names of parameters, as in ``many("cls")``, of the cases that agree in them a twelfth is left, at least one;
    ``many(every=4)`` leaves a quarter, for functions with few cases.
    """
    alike: dict[tuple[str, ...], list[pytest.Item]] = defaultdict(list)
    every: dict[tuple[str, ...], int] = {}
    for item in items:
        if marker := item.get_closest_marker("many") or CONFORMANCE.get(getattr(item, "originalname", "")):
            values = (str(item.callspec.params[name]) for name in marker.args)
            # Each in a run of its own.
            runs = [name for name in ("gpu", "interpreted") if item.get_closest_marker(name)]
            key = item.nodeid.partition("[")[0], *runs, *values
            alike[key].append(item)
            every[key] = marker.kwargs.get("every", EVERY)
    for key, cases in alike.items():
        kept = [case for case in cases if zlib.crc32(case.name.encode()) % every[key] == 0] or cases[:1]
        for case in cases:
            if case not in kept:
                case.add_marker("slow")

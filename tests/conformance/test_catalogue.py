"""The conformance suite over the whole catalogue; a new technique is included automatically."""

from __future__ import annotations

import pytest

from hf_optim.recipes.catalogue import catalogue
from hf_optim.testing.conformance import *  # noqa: F403
from hf_optim.testing.conformance_records import *  # noqa: F403

del stock  # noqa: F821 - conftest has one for all test files


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cls" in metafunc.fixturenames:
        metafunc.parametrize("cls", [pytest.param(catalogue().get(name), id=name) for name in catalogue().names()])

"""The pytest plugin: ``pytest --hf-optim NAME [--hf-optim NAME ...]`` runs the conformance suite over those techniques.

``--hf-optim all`` runs it over the whole catalogue. Every pytest in an environment with hf_optim loads this plugin, so
it does nothing and imports nothing without the option.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = tuple(Path(__file__).with_name(name) for name in ("conformance.py", "conformance_records.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_optim", "conformance of hf_optim techniques")
    group.addoption("--hf-optim", action="append", default=[], metavar="NAME", help="run the suite over this technique")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hf-optim"):
        return
    # The suite replaces the tests of the project, unless those are named on the command line, too.
    named = [
        str(a) for a in config.invocation_params.args if (config.invocation_params.dir / str(a).split("::")[0]).exists()
    ]
    config.args[:] = [*(config.args if named else []), *map(str, SUITE)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if Path(metafunc.definition.path) in SUITE and "cls" in metafunc.fixturenames:
        from ..recipes.catalogue import catalogue

        requested = metafunc.config.getoption("--hf-optim")
        names = catalogue().names() if not requested or "all" in requested else requested
        metafunc.parametrize("cls", [pytest.param(catalogue().get(name), id=name) for name in names])

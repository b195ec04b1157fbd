"""The pytest plugin: ``pytest --hf-optim NAME [--hf-optim NAME ...]`` runs the conformance suite over those techniques.

``--hf-optim all`` takes the whole catalogue. The plugin is loaded by every pytest of an environment that has hf_optim,
and so does nothing, and imports nothing, until it is asked.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("conformance.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_optim", "conformance of hf_optim techniques")
    group.addoption("--hf-optim", action="append", default=[], metavar="NAME", help="run the suite over this technique")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hf-optim"):
        return
    # Instead of the project's own tests, unless they were named on the command line too.
    asked = [
        str(a) for a in config.invocation_params.args if (config.invocation_params.dir / str(a).split("::")[0]).exists()
    ]
    config.args[:] = [*(config.args if asked else []), str(SUITE)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if Path(metafunc.definition.path) == SUITE and "cls" in metafunc.fixturenames:
        from ..recipes.catalogue import catalogue

        asked = metafunc.config.getoption("--hf-optim")
        names = catalogue().names() if not asked or "all" in asked else asked
        metafunc.parametrize("cls", [pytest.param(catalogue().get(name), id=name) for name in names])

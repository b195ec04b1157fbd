"""Techniques of other packages: one that cannot be imported is named, and hides no other; the record has versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys

import pytest
from tiny_models import tiny_llama

import hf_optim
from hf_optim.cli import main
from hf_optim.recipes import catalogue as module
from hf_optim.recipes.catalogue import Catalogue

SOURCES = {
    "broken_import": "import nothing_like_this",
    "broken_class": "class A:\n    x = 1 / 0",
    "their_cast": """
from hf_optim import Contract, Reload, Technique, hookimpl, technique, traits


@technique("their_cast", family="pruning", contract=Contract(needs={traits.FLOAT_WEIGHTS}), reload=Reload.STOCK_DENSE)
class TheirCast(Technique):
    \"\"\"Changes nothing.\"\"\"

    def needs_data(self):
        return False


@hookimpl
def register_techniques(register):
    register(TheirCast)
""",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package with three techniques, two of which cannot be imported."""
    info = tmp_path / "their_package-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 2.5\n")
    entries = "\n".join(f"{name} = their_{name}" for name in SOURCES)
    (info / "entry_points.txt").write_text(f"[hf_optim]\n{entries}\n")
    for name, source in SOURCES.items():
        (tmp_path / f"their_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = Catalogue()
    for target in [m for m in list(sys.modules.values()) if getattr(m, "catalogue", None) is module.catalogue]:
        monkeypatch.setattr(target, "catalogue", lambda: found)
    return found


@pytest.mark.parametrize(("name", "reason"), [("broken_import", "nothing_like_this"), ("broken_class", "ZeroDivision")])
def test_a_technique_that_cannot_be_imported_is_named_with_its_package(installed, name, reason):
    with pytest.raises(
        hf_optim.RecipeError, match=f"{name!r} of the package their-package cannot be imported.*{reason}"
    ):
        installed.get(name)


def test_the_others_are_listed(installed, capsys, caplog):
    with caplog.at_level(logging.WARNING, "hf_optim"):
        assert main(["list"]) == 0
    printed = capsys.readouterr()
    assert "their_cast" in printed.out
    assert "gptq" in printed.out
    assert sorted(r.args[0].args[0].split("'")[1] for r in caplog.records if r.args) == [
        "broken_class",
        "broken_import",
    ]


def test_the_record_has_the_package_of_each_step(installed):
    run = hf_optim.run_of(hf_optim.optimize(tiny_llama(), installed.get("their_cast")()))
    assert run.record.versions["their-package"] == "2.5"
    assert run.record.versions["hf-optim"] == importlib.metadata.version("hf-optim")

"""The page of the experts' kernels is what its records give."""

from __future__ import annotations

import importlib
import shutil

import pytest
from conftest import ROOT

pytest.importorskip("triton")

HOME = ROOT / "model_cards" / "kernels" / "experts"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "gpu"))
    return importlib.import_module("experts_table")


def test_the_page_of_experts_is_what_the_records_give(table, monkeypatch, tmp_path):
    for record in HOME.glob("*.json"):
        shutil.copy(record, tmp_path)
    monkeypatch.setattr("sys.argv", ["experts_table.py", str(tmp_path)])
    table.main()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (HOME / "README.md").read_text(encoding="utf-8")

"""The page on linformer and set_transformer, and its claims, follow from the results."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import ROOT

HOME = ROOT / "model_cards"


@pytest.fixture
def page():
    """The module that renders the page."""
    path = ROOT / "examples" / "attention" / "projections_page.py"
    spec = importlib.util.spec_from_file_location("projections_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_claims_are_what_the_results_give(page):
    results = json.loads((HOME / "attention" / "projections.json").read_text(encoding="utf-8"))
    assert (HOME / "attention" / "projections.md").read_text(encoding="utf-8") == page.page(results)
    assert json.loads((HOME / "claims" / "projections.json").read_text(encoding="utf-8")) == page.claims(results)


def test_the_plot_is_drawn(page, tmp_path):
    results = json.loads((HOME / "attention" / "projections.json").read_text(encoding="utf-8"))
    page.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

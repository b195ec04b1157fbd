"""The page on attention within clusters and to sorted blocks follows from its results."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import ROOT

HOME = ROOT / "model_cards" / "attention"


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "attention" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_give():
    results = json.loads((HOME / "clusters.json").read_text(encoding="utf-8"))
    assert (HOME / "clusters.md").read_text(encoding="utf-8") == example("clusters_page").page(results)


def test_times_are_taken_of_what_techniques_compute(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "attention"))
    monkeypatch.delitem(sys.modules, "stories", raising=False)
    clusters = example("clusters")
    monkeypatch.delitem(sys.modules, "stories")
    for causal in (True, False):
        found = clusters.times(64, causal, 1)
        assert set(found) == {"full", "routing_transformer", "sinkhorn"}
    assert clusters.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)

"""The page on axial and compressed attention follows from its results, and its pairs are those that patterns hold."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import ROOT

from hf_optim.toolkit.attention import HeadPatterns, share_of_attention
from hf_optim_plugins.attention import _axial_pattern

HOME = ROOT / "model_cards" / "attention"


@pytest.fixture(autouse=True)
def beside_their_helpers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "attention"))
    yield
    sys.modules.pop("stories", None)


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "attention" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_give():
    results = json.loads((HOME / "grids.json").read_text(encoding="utf-8"))
    assert (HOME / "grids.md").read_text(encoding="utf-8") == example("grids_page").page(results)


@pytest.mark.parametrize("axes", ["layers", "heads", "union"])
def test_counted_pairs_are_those_of_the_patterns(axes):
    settings = {"first": 1, "rows": 4, "columns": 4, "axes": axes}
    layers = [HeadPatterns.of(_axial_pattern.build(settings, layer, 4, False), 4) for layer in (0, 1)]
    share = sum(share_of_attention(layer, 17) for layer in layers) / 2
    assert example("grids").pairs(axes, 4) == pytest.approx(share * 17**2)

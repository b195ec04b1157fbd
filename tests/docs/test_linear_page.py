"""The page on attention by random features follows from its results, and its script runs small."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import ROOT

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
    results = json.loads((HOME / "linear.json").read_text(encoding="utf-8"))
    assert (HOME / "linear.md").read_text(encoding="utf-8") == example("linear_page").page(results)


def test_small_errors_and_times_make_a_page(monkeypatch):
    linear = example("linear")
    monkeypatch.setattr(linear, "COUNTS", (16, 256))
    monkeypatch.setattr(linear, "LENGTHS", (128, 4096, 4224))
    results = {"errors": linear.errors(12), "times": linear.times(1)}
    assert set(results["errors"]["slopes"]) == {"performer", "independent", "rfa"}
    assert all(-0.7 < slope < -0.3 for slope in results["errors"]["slopes"].values())
    text = example("linear_page").page(results)
    assert "## Error" in text
    assert "## Time on a CPU" in text


@pytest.mark.real_model
def test_a_small_study_makes_a_page(shared_models, monkeypatch):
    linear = example("linear")
    monkeypatch.setattr(linear, "METHODS", linear.METHODS[1:2])
    results = {"study": linear.study(shared_models.parent, texts=2, steps=4)}
    assert [row["distill"] for row in results["study"]["rows"]] == [0, 2]
    assert "## A language model" in example("linear_page").page(results)

"""The page of claims: rendered from its records, with every figure read from the results of a script."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import ROOT

from hf_optim.recipes.catalogue import catalogue

# What the survey says nothing about by itself: `local` is one of the patterns that share a claim.
WITHOUT = {"local"}


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "examples" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_records_give(claims):
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page()


def test_every_technique_has_a_claim_and_scripts_exist(claims):
    every = [claim for family in claims.load().values() for claim in family]
    assert set(catalogue().names()) - {claim["technique"] for claim in every} - WITHOUT == set()
    for claim in every:
        for script in claims.scripts(claim):
            assert (ROOT / script).is_file(), script
        assert claim["source"]
        assert claim["claim"]


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        ([["a", "<", "b"], ["b", ">", 1]], "confirmed"),
        ([["a", "<", "b"], ["a", ">", "b"]], "mixed"),
        ([["a", ">", "b"]], "contradicted"),
        ([["a", ">", "b", 0.5]], "confirmed"),
    ],
)
def test_verdicts_follow_from_the_figures(claims, monkeypatch, tmp_path, holds, verdict):
    monkeypatch.setattr(claims, "CARDS", tmp_path)
    runs = {"x | 0": {"loss": 1.0}, "x | 1": {"loss": 2.0}, "y": [{"loss": 2.0}]}
    (tmp_path / "results.json").write_text(json.dumps(runs), encoding="utf-8")
    figures = {"a": ["results.json", "x | *", "loss"], "b": ["results.json", "y", "0", "loss"]}
    ours, found = claims.judge({"technique": "t", "figures": figures, "ours": "{a:.2f} of {b:g}", "holds": holds})
    assert (ours, found) == ("1.50 of 2", verdict)


def test_a_figure_that_is_not_there_is_an_error(claims):
    with pytest.raises((KeyError, ValueError)):
        claims.figure(["quantization/results.json", "cells", "no such row", "figure"])

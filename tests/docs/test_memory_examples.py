"""The example of memories on long text: variants hold the keys that they say, and the record is of these variants."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def memories():
    spec = importlib.util.spec_from_file_location("memories", ROOT / "examples" / "attention" / "memories.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants_hold_the_keys_that_they_say(memories):
    for name, variant in memories.VARIANTS.items():
        step = variant.get("step", {"segment": variant["keys"], "memory": 0})
        assert variant["keys"] == step["segment"] + step["memory"] + step.get("compressed", 0), name
        assert step["segment"] % memories.COUNTED == 0


def test_the_record_has_each_variant(memories):
    record = json.loads((ROOT / "model_cards" / "attention" / "memories.json").read_text(encoding="utf-8"))
    assert set(record["rows"]) == set(memories.VARIANTS)
    for name, row in record["rows"].items():
        assert (row["keys"], row["step"]) == (memories.VARIANTS[name]["keys"], memories.VARIANTS[name].get("step"))


def test_all_variants_are_measured_on_the_same_tokens(memories):
    rows = torch.arange(2 * memories.LENGTH).view(2, memories.LENGTH) % 7

    class Uniform(torch.nn.Module):
        def forward(self, ids, use_cache):
            counted.append(ids[:, 1:][:, torch.arange(1, ids.shape[1]) % memories.COUNTED != 0].sum())
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 7)})

    sums = []
    for variant in memories.VARIANTS.values():
        counted = []
        assert memories.perplexity(Uniform(), memories.pieces(rows, variant)) == 7.0
        sums.append(int(sum(counted)))
    assert len(set(sums)) == 1

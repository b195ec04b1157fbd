"""The reasons why layers are left out, and the refusal if none is left."""

from __future__ import annotations

import pytest
from torch import nn

from hf_optim import ModelError
from hf_optim.toolkit.topology import NOT_REACHED, not_reached, require_layers, summarize


def test_modules_without_statistics_have_one_reason():
    assert not_reached(["a", "b", "c"], {"b": 1}) == {NOT_REACHED: ["a", "c"]}
    assert not_reached(["b"], {"b"}) == {}
    assert not_reached([], {}) == {}


def test_a_summary_has_three_names_per_reason_and_no_empty_reason():
    assert summarize({"tied": {"lm_head"}, "odd": ["a", "b", "c", "d"], "none": []}) == "tied: lm_head; odd: a, b, c"
    assert summarize({}) == ""


def test_an_empty_selection_is_refused_with_its_reasons():
    model = nn.Linear(2, 2)
    require_layers({"a": model}, model, "step 1 (x)")
    with pytest.raises(ModelError, match=r"^step 1 \(x\): no linear layer of Linear is left; check targets and skip$"):
        require_layers([], model, "step 1 (x)")
    with pytest.raises(ModelError, match=r"check targets and skip \(odd: a; tied: b\)$"):
        require_layers({}, model, "step 1 (x)", {"odd": ["a"], "tied": {"b"}})

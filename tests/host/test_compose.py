"""Composition: what is refused, with which words, and where stages end."""

from __future__ import annotations

import pytest

from hf_optim import OptimConfig, RecipeError
from hf_optim.recipes.traits import FLOAT_WEIGHTS, QUANTIZED, SPARSE_NM


def recipe(*names: str | dict) -> OptimConfig:
    return OptimConfig.parse([name if isinstance(name, dict) else {"technique": name} for name in names])


def test_a_debt_must_be_paid():
    with pytest.raises(RecipeError) as caught:
        recipe("smoothquant").check()
    text = str(caught.value)
    assert "step 1 (smoothquant) owes a later step that adds quantized" in text
    assert "add gobo or gptq or" in text
    assert recipe("smoothquant", "rtn").check() >= {QUANTIZED}


def test_the_order_matters_and_the_error_says_what_to_move():
    with pytest.raises(RecipeError) as caught:
        recipe("rtn", "smoothquant").check()
    assert "step 2 (smoothquant) needs a model that computes with floating-point weights" in str(caught.value)
    assert "move smoothquant before rtn" in str(caught.value) or "move rtn after it" in str(caught.value)


def test_two_owners_of_one_place_are_refused():
    with pytest.raises(RecipeError, match="local"):
        recipe({"technique": "local", "window": 8}, {"technique": "local", "window": 4}).check()


def test_a_model_that_is_quantized_already_is_refused():
    with pytest.raises(RecipeError, match="start from the floating-point checkpoint"):
        recipe("rtn").check({QUANTIZED})


def test_gptq_after_nm_keeps_the_pattern():
    traits = recipe("nm", "gptq").check()
    assert {SPARSE_NM, QUANTIZED} <= traits
    assert FLOAT_WEIGHTS not in traits


def test_stages_end_where_calibration_follows_training():
    assert [str(s) for s in recipe("nm", "logit_kd", "smoothquant", "gptq").stages] == [
        "[nm, logit_kd]",
        "[smoothquant, gptq]",
    ]
    assert [str(s) for s in recipe("nm", "gptq").stages] == ["[nm, gptq]"]
    assert [s.trains for s in recipe("gmp", "rtn").stages] == [True, False]


def test_a_load_time_step_cannot_stand_in_a_later_stage():
    with pytest.raises(RecipeError, match="acts while the model is loaded"):
        recipe("gmp", "rtn", {"technique": "local", "window": 8}).check()

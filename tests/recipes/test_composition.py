"""Composition: which recipes are refused, with which message, and where stages end."""

from __future__ import annotations

import itertools

import pytest

from hf_optim import Contract, OptimConfig, RecipeError, Reload, Technique, Trait, technique
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.traits import FLOAT_WEIGHTS, MOE, QUANTIZED, SPARSE_NM


def recipe(*names: str | dict) -> OptimConfig:
    return OptimConfig.parse([name if isinstance(name, dict) else {"technique": name} for name in names])


def test_a_step_that_must_be_followed_by_another_is_refused_without_it():
    with pytest.raises(RecipeError) as caught:
        recipe("smoothquant").check()
    text = str(caught.value)
    quantizers = [cls.spec.name for cls in catalogue().all() if QUANTIZED in cls.spec.contract.adds]
    assert {"gptq", "rtn"} < set(quantizers)
    listed = f"{', '.join(quantizers[:-1])} or {quantizers[-1]}"
    assert text == f"step 1 (smoothquant) must be followed by a quantization step: add {listed} after it"
    assert recipe("smoothquant", "rtn").check() >= {QUANTIZED}


def test_the_order_matters_and_the_error_says_what_to_move():
    with pytest.raises(RecipeError) as caught:
        recipe("rtn", "smoothquant").check()
    assert str(caught.value) == (
        "move smoothquant before step 1 (rtn), or remove one of them: step 2 (smoothquant) needs a model that has "
        "floating-point weights; that no longer holds after rtn"
    )


def test_a_missing_trait_is_named_with_the_step_that_adds_it():
    @technique("follower", family="testing", contract=Contract(needs={MOE}), reload=Reload.STOCK_DENSE)
    class Follower(Technique):
        """Needs experts."""

    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(Follower()).check()
    *most, last = sorted(cls.spec.name for cls in catalogue().all() if MOE in cls.spec.contract.adds)
    assert "upcycle" in most
    assert str(caught.value) == (
        f"step 1 (follower) needs a model that routes tokens to experts: add {', '.join(most)} or {last} before it"
    )


def test_a_trait_of_a_third_party_is_named_in_its_own_words():
    rotated = Trait("rotated", "has rotated activations")

    @technique("rotator", family="testing", contract=Contract(owes={rotated}), reload=Reload.STOCK_DENSE)
    class Rotator(Technique):
        """Needs a later step."""

    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(Rotator()).check()
    assert str(caught.value) == (
        "step 1 (rotator) must be followed by a step that adds rotated: use another recipe (no technique in the "
        "catalogue adds rotated)"
    )


def test_two_steps_of_one_kind_or_one_slot_are_refused():
    with pytest.raises(RecipeError, match=r"keep only one of step 2 \(local\) and step 1 \(local\): .* support"):
        recipe({"technique": "local", "window": 8}, {"technique": "local", "window": 4}).check()
    with pytest.raises(RecipeError, match=r"keep only one of step 2 \(iterative\) and step 1 \(iterative\): both set"):
        recipe("iterative", "iterative").check()


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


def test_a_load_time_step_cannot_be_in_a_later_stage():
    with pytest.raises(RecipeError, match="acts while the model is loaded"):
        recipe("gmp", "rtn", {"technique": "local", "window": 8}).check()


def refusal(*steps) -> str:
    """Return the error of a recipe, or nothing."""
    try:
        OptimConfig(steps=steps).check()
    except RecipeError as error:
        return str(error)
    return ""


def test_an_order_that_an_error_proposes_is_one_that_composes():
    steps = [cls.for_testing() for cls in catalogue().all()]
    proposed = 0
    for first, second in itertools.permutations(steps, 2):
        if (text := refusal(first, second)).startswith(f"move {second.name} before step 1"):
            proposed += 1
            left = refusal(second, first)  # a step that owes another is in no recipe of two
            assert not left or "must be followed by" in left, text
    assert proposed > 50
    assert refusal(*recipe("local", "big_bird").steps).startswith(
        "keep only one of step 2 (big_bird) and step 1 (local)"
    )

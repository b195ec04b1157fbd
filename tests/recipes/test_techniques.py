"""The contract of a technique: frozen fields, ranges, identity, and pluggy."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest

from hf_optim import Contract, OptimConfig, RecipeError, Reload, Technique, hookimpl, option, technique
from hf_optim.lifecycle.stages import start_run
from hf_optim.recipes.contract import Phase
from hf_optim.recipes.traits import SPARSE


@technique("example", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Example(Technique):
    """An example.

    Attributes:
        rate: a fraction.
        mode: a choice.
        targets: names.
    """

    rate: float = option(0.5, low=0.0, below=1.0)
    mode: Literal["a", "b"] = "a"
    targets: tuple[str, ...] = ("Linear",)

    @hookimpl
    def calibrate(self, run, scope):
        yield


def test_fields_are_checked():
    assert Example(rate=0).rate == 0.0
    assert isinstance(Example(rate=0).rate, float)
    assert Example(targets=["x"]).targets == ("x",)
    with pytest.raises(RecipeError, match=r"rate must be < 1\.0, not 1\.0"):
        Example(rate=1.0)
    with pytest.raises(RecipeError, match="mode must be"):
        Example(mode="c")
    with pytest.raises(RecipeError, match="targets must be"):
        Example(targets="Linear")


@pytest.mark.parametrize(
    ("technique", "fields", "message"),
    [
        ("logit_kd", {"direction": "foward"}, "'forward', 'reverse', 'js', not 'foward'; did you mean 'forward'?"),
        ("gptq", {"activations": "int3"}, "must be one of 'int8', 'int4', None, not 'int3'; did you mean 'int8'?"),
        ("channel_permutation", {"score": "activations"}, "not 'activations'; did you mean 'activation'?"),
        ("gptq", {"targets": "Linear"}, "targets must be a list of names, not 'Linear'; write [Linear]"),
        ("gptq", {"targets": 3}, "targets must be a list of names, not 3"),
        ("distilbert", {"layers": "0"}, "layers must be a list of whole numbers | None, not '0'"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_the_valid_ones(technique, fields, message):
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse([{"technique": technique, **fields}])
    assert str(caught.value).endswith(message)


def test_only_similar_names_are_suggested():
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse([{"technique": "gmp", "start": 3}])
    assert str(caught.value) == (
        "step 1: gmp has no field 'start' (it has sparsity, initial, begin, end, every, scope, targets, skip)"
    )
    with pytest.raises(RecipeError, match="did you mean 'group_size'"):
        OptimConfig.parse([{"technique": "gptq", "group": 32}])


def test_a_step_is_frozen_and_compares_by_identity():
    step = Example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.rate = 0.1
    assert Example() != Example()


def test_one_technique_may_occur_twice_in_a_recipe():
    recipe = OptimConfig.parse([Example(), Example(rate=0.1)])
    run = start_run(recipe, config=None)
    run.state(recipe.steps[0]).seen = 1
    assert not hasattr(run.state(recipe.steps[1]), "seen")


def test_phases_follow_from_the_hooks():
    assert Example().phases() == {Phase.CALIBRATE}
    assert Example().needs_data()


def test_only_changed_fields_are_written():
    assert Example(rate=0.25).to_dict() == {"technique": "example", "rate": 0.25}


def test_numbers_are_finite_unless_an_option_says_otherwise():
    @technique("wide", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Wide(Technique):
        """Another example."""

        plain: float = 3.0
        several: tuple[float, ...] = ()
        open: float = option(0.0, infinite=True)

    assert Wide(open=-math.inf).open == -math.inf
    for name, value in [("plain", math.nan), ("plain", math.inf), ("several", (1.0, math.nan)), ("open", math.nan)]:
        with pytest.raises(RecipeError, match=f"wide: {name} must be a finite number, not"):
            Wide(**{name: value})
    with pytest.raises(RecipeError, match="finite number, not nan"):
        Example(rate=math.nan)


def test_a_step_and_a_fraction_are_distinguished():
    """``1`` is the first step and ``1.0`` the end of training: writing and reading a recipe preserves which."""

    @technique("positioned", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Positioned(Technique):
        """Another example."""

        end: int | float = 1.0
        rate: float = 1

    assert Positioned(end=1).to_dict() == {"technique": "positioned", "end": 1}
    assert isinstance(Positioned(end=1).to_dict()["end"], int)
    assert Positioned(end=1.0, rate=1).to_dict() == {"technique": "positioned"}


def test_a_hook_with_an_unknown_name_is_an_error():
    @technique("misspelt", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Misspelt(Technique):
        """Has a hook that the host does not call."""

        @hookimpl
        def calibrat(self, run, scope):
            yield

    with pytest.raises(RecipeError, match=r"step 1 \(misspelt\): no hook 'calibrat'; did you mean 'calibrate'\?"):
        start_run(OptimConfig.parse(Misspelt()), config=None)


def test_an_argument_that_a_hook_does_not_have_is_an_error():
    @technique("greedy", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Greedy(Technique):
        """Has a hook with an argument that the host does not pass."""

        @hookimpl
        def finalize_model(self, run, scope):
            return None

    with pytest.raises(RecipeError) as caught:
        start_run(OptimConfig.parse([Example(), Greedy()]), config=None)
    assert str(caught.value) == "step 2 (greedy): the hook finalize_model has no argument 'scope' (it has run)"


def test_a_misspelt_argument_of_a_hook_is_suggested():
    @technique("hasty", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Hasty(Technique):
        """Misspells an argument."""

        @hookimpl
        def calibrate(self, run, scop):
            yield

    with pytest.raises(
        RecipeError, match=r"hook calibrate has no argument 'scop'; did you mean 'scope'\? .*run, scope"
    ):
        start_run(OptimConfig.parse(Hasty()), config=None)


def test_a_hook_without_its_mark_is_an_error():
    class Unmarked(Technique):
        """Its method would never be called."""

        def calibrate(self, run, scope):
            yield

    declare = technique("unmarked", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    with pytest.raises(RecipeError, match="technique 'unmarked': mark its method calibrate with @hookimpl"):
        declare(Unmarked)


@pytest.mark.parametrize(("family", "nearest"), [("prunning", "pruning"), ("quantisation", "quantization")])
def test_a_misspelt_family_is_an_error(family, nearest):
    with pytest.raises(RecipeError, match=f"no family '{family}'; did you mean '{nearest}'\\?"):
        technique("lost", family=family, contract=Contract(), reload=Reload.STOCK_DENSE)


def test_a_family_of_ones_own_is_a_lower_case_word():
    technique("rotation", family="rotations", contract=Contract(), reload=Reload.STOCK_DENSE)
    for family in ("", "Big Words", 3):
        with pytest.raises(RecipeError, match="the family must be a lower-case word, not"):
            technique("lost", family=family, contract=Contract(), reload=Reload.STOCK_DENSE)


def test_a_contract_holds_traits_and_names_of_slots():
    with pytest.raises(RecipeError) as caught:
        Contract(needs={"float-weight"})
    assert str(caught.value) == (
        "Contract(needs=...): 'float-weight' is not a Trait; did you mean traits.FLOAT_WEIGHTS? "
        "(the traits are objects of hf_optim.traits)"
    )
    assert Contract(adds=SPARSE).adds == {SPARSE}
    assert Contract(owns="experts").owns == {"experts"}
    with pytest.raises(RecipeError, match="is not the name of a slot"):
        Contract(owns={SPARSE})

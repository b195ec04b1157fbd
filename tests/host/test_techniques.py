"""The contract of a technique: frozen fields, ranges, identity, and pluggy."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from hf_optim import Contract, OptimConfig, RecipeError, Reload, Technique, hookimpl, option, technique
from hf_optim.run import Run
from hf_optim.techniques import Phase


@technique("example", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Example(Technique):
    """An example.

    Attributes:
        rate: a share.
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


def test_a_step_is_frozen_and_compares_by_identity():
    step = Example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.rate = 0.1
    assert Example() != Example()


def test_one_technique_may_stand_twice_in_a_recipe():
    recipe = OptimConfig.parse([Example(), Example(rate=0.1)])
    run = Run(recipe, config=None)
    run.state(recipe.steps[0]).seen = 1
    assert not hasattr(run.state(recipe.steps[1]), "seen")


def test_phases_are_read_off_the_hooks():
    assert Example().phases() == {Phase.CALIBRATE}
    assert Example().needs_data()


def test_only_changed_fields_are_written():
    assert Example(rate=0.25).to_dict() == {"technique": "example", "rate": 0.25}


def test_a_hook_with_an_unknown_name_is_an_error():
    @technique("misspelt", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Misspelt(Technique):
        """Has a hook that nobody calls."""

        @hookimpl
        def calibrat(self, run, scope):
            yield

    with pytest.raises(Exception, match="unknown hook 'calibrat'"):
        Run(OptimConfig.parse(Misspelt()), config=None)


def test_an_argument_that_a_hook_does_not_have_is_an_error():
    @technique("greedy", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
    class Greedy(Technique):
        """Asks for an argument that nobody passes."""

        @hookimpl
        def finalize_model(self, run, scope):
            return None

    with pytest.raises(Exception, match="scope"):
        Run(OptimConfig.parse(Greedy()), config=None)

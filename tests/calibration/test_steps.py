"""The hook ``calibrate``: a generator, or a function of a step that needs no data."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

import hf_optim
from hf_optim import Contract, RecipeError, Reload, Technique, hookimpl, technique
from hf_optim.recipes.traits import SPARSE, SPARSE_NM

DATA = [{"input_ids": torch.arange(8)[None]}]


def declared(**settings):
    return technique("tested", family="testing", contract=Contract(**settings), reload=Reload.STOCK_DENSE)


@declared()
class Plain(Technique):
    """Has no ``yield``."""

    data: bool = True
    answer: bool = False

    def needs_data(self):
        return self.data

    @hookimpl
    def calibrate(self, run, scope):
        run.state(self).called = getattr(run.state(self), "called", 0) + 1
        return [1] if self.answer else None


def test_a_function_without_yield_is_refused_if_it_needs_data():
    with pytest.raises(RecipeError) as caught:
        hf_optim.optimize(tiny_llama(), Plain(), calibration=DATA)
    assert str(caught.value).startswith(
        "step 1 (tested): its hook calibrate is not a generator, so it sees no calibration batch: `yield` once"
    )


def test_a_function_without_yield_runs_once_for_each_scope_if_it_needs_no_data():
    step = Plain(data=False)
    run = hf_optim.run_of(hf_optim.optimize(tiny_llama(), step))
    assert run.state(step).called == 2  # blocks


def test_another_result_than_a_generator_is_refused():
    with pytest.raises(
        RecipeError, match=r"step 1 \(tested\): its hook calibrate returned a list; it must be a generator"
    ):
        hf_optim.optimize(tiny_llama(), Plain(data=False, answer=True))


@declared(adds={SPARSE, SPARSE_NM})
class Boasting(Technique):
    """Declares sparsity, and prunes only if it is told to."""

    prune: bool = False

    def needs_data(self):
        return False

    @hookimpl
    def calibrate(self, run, scope):
        yield
        for name, layer in scope.linears.items():
            if self.prune:
                kept = torch.ones_like(layer.weight, dtype=torch.bool)
                kept[:, ::2] = False
                run.masks[f"{name}.weight"] = kept
                run.nm_patterns[f"{name}.weight"] = (1, 2)
                with torch.no_grad():
                    layer.weight.mul_(kept)


def test_a_trait_that_a_step_declares_but_does_not_make_is_named(caplog):
    run = hf_optim.run_of(hf_optim.optimize(tiny_llama(), Boasting()))
    assert run.record.notes == [
        "step 1 (tested): it declares that it adds sparse, but run.masks is empty, so nothing would keep weights at "
        "zero",
        "step 1 (tested): it declares that it adds sparse-nm, but run.nm_patterns is empty, so nothing would keep the "
        "pattern",
    ]
    assert "it declares that it adds sparse," in caplog.text


def test_a_step_that_makes_what_it_declares_is_not_named():
    assert hf_optim.run_of(hf_optim.optimize(tiny_llama(), Boasting(prune=True))).record.notes == []

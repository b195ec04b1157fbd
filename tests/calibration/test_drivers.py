"""The whole-model and blockwise drivers: activations, coverage, errors, and what they restore."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, tiny_llama

import hf_optim
from hf_optim import (
    Contract,
    DataError,
    ModelError,
    NumericalError,
    OptimConfig,
    Reload,
    Technique,
    hookimpl,
    technique,
)
from hf_optim.toolkit import topology


@technique("watcher", family="testing", contract=Contract(), reload=Reload.STOCK_DENSE)
class Watcher(Technique):
    """Sums the inputs of every linear, and changes nothing by default.

    Attributes:
        passes: passes over the data.
        scale: factor for the weights of a block after its inputs were summed.
        fail: raise after the passes.
        targets: the linears.
    """

    passes: int = 1
    scale: float = 1.0
    fail: bool = False
    targets: tuple[str, ...] = ("Linear",)

    @hookimpl
    def calibrate(self, run, scope):
        state = run.state(self)
        state.sums = getattr(state, "sums", {})
        state.calls = getattr(state, "calls", {})
        modules = scope.select(self.targets)

        def watch(name):
            def hook(module, args):
                state.sums[name] = state.sums.get(name, 0.0) + args[0].double().sum().item()
                state.calls[name] = state.calls.get(name, 0) + 1

            return hook

        handles = [m.register_forward_pre_hook(watch(n)) for n, m in modules.items()]
        try:
            for _ in range(self.passes):
                yield
            if self.fail:
                raise NumericalError("model.layers.0 is not finite")
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for module in modules.values():
                module.weight.mul_(self.scale)
        run.cover(self, modules)


def batches(model, count=3):
    generator = torch.Generator().manual_seed(0)
    base = topology.dummy_inputs(model)
    made = []
    for _ in range(count):
        made.append(
            {
                k: torch.randint(3, 60, (2, 7), generator=generator)
                if not v.is_floating_point()
                else torch.randn(v.shape, generator=generator)
                for k, v in base.items()
            }
        )
    return made


def watch(model, driver, **fields):
    step = Watcher(**fields)
    made = hf_optim.optimize(model, OptimConfig(steps=(step,), driver=driver), calibration=batches(model))
    return hf_optim.run_of(made).state(step)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", sorted(TINY))
def test_blockwise_shows_the_same_activations_as_the_whole_model(name):
    targets = ("Conv1D",) if name == "gpt2" else ("Linear",)
    whole = watch(TINY[name](), "whole_model", targets=targets)
    block = watch(TINY[name](), "blockwise", targets=targets)
    assert set(block.sums) == set(whole.sums)
    for linear, total in whole.sums.items():
        assert block.sums[linear] == pytest.approx(float(total), rel=1e-6, abs=1e-4)
        assert block.calls[linear] == whole.calls[linear] == 3


def test_blockwise_calibrates_on_what_the_changed_blocks_compute():
    plain = watch(tiny_llama(), "blockwise")
    changed = watch(tiny_llama(), "blockwise", scale=0.5)
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert changed.sums[first] == plain.sums[first]
    assert changed.sums[second] != plain.sums[second]


def test_every_yield_is_one_pass():
    assert set(watch(tiny_llama(), "blockwise", passes=2).calls.values()) == {6}
    assert set(watch(tiny_llama(), "whole_model", passes=2).calls.values()) == {6}


@pytest.mark.parametrize("driver", ["blockwise", "whole_model"])
def test_an_error_names_the_step_and_leaves_the_model_as_it_was(driver):
    model = tiny_llama()
    before = [(name, dict(vars(m))) for name, m in model.named_modules()]
    with pytest.raises(NumericalError, match=r"step 1 \(watcher\).*model.layers.0"):
        watch(model, driver, fail=True)
    for (name, now), (other, was) in zip(((n, vars(m)) for n, m in model.named_modules()), before, strict=True):
        assert name == other
        assert "forward" not in now
        assert not now["_forward_pre_hooks"]
        assert now["training"] == was["training"]


def test_modes_and_cache_are_restored():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    watch(model, "blockwise")
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert model.config.use_cache


def test_a_head_is_modified_only_if_named():
    assert "lm_head" not in watch(tiny_llama(), "blockwise").sums
    assert set(watch(tiny_llama(), "blockwise", targets=("lm_head",)).sums) == {"lm_head"}


def test_nothing_to_work_on_is_an_error():
    with pytest.raises(ValueError, match="k_prj"):
        watch(tiny_llama(), "blockwise", targets=("re:.*k_prj",))


def test_data_must_be_named():
    with pytest.raises(DataError, match=r"step 1 \(watcher\) needs calibration data"):
        hf_optim.optimize(tiny_llama(), Watcher())


def test_blockwise_needs_blocks():
    model = tiny_llama()
    model.model.layers = model.model.layers[:0]
    with pytest.raises(ModelError, match="no sequence of blocks"):
        watch(model, "blockwise")

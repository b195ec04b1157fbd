"""The conformance suite: what every technique must do. ``testing.plugin`` parametrizes it over techniques (``cls``).

The suite builds the smallest recipe around a technique (with techniques of the catalogue that must precede or follow
it), runs it on tiny random models of six architectures, and checks the results. An architecture that a technique does
not support must be refused with a ``ModelError`` or ``RecipeError`` that gives the reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, Trainer

import hf_optim
from hf_optim import DataError, NumericalError, OptimConfig, RecipeError, Reload, Technique
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.traits import FLOAT_WEIGHTS
from hf_optim.runs.run import run_of
from hf_optim.testing.models import TINY
from hf_optim.testing.stock import StockTransformers
from hf_optim.testing.tiny_runs import ARCHITECTURES, AUTO, Attempts, inputs_for, optimize_tiny, recipe_for
from hf_optim.toolkit import attention

from .memory_checks import held_tensors, kept_after_deletion
from .trait_checks import holds

LOUD = 60  # this token and the next are only in padding


@pytest.fixture(scope="module")  # while a model lives, its attention stays registered
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    return Attempts(tmp_path_factory.mktemp("attempts"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def stock() -> Iterator[StockTransformers]:
    with StockTransformers() as process:
        yield process


# -- the class ----------------------------------------------------------------------------------------------------
def test_defaults_construct_and_are_frozen(cls: type[Technique]) -> None:
    step = cls.for_testing()
    assert step.name == cls.spec.name
    for field in dataclasses.fields(step):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, field.name, None)
    given = {f.name for f in dataclasses.fields(step) if getattr(step, f.name) != f.default}  # type: ignore[arg-type]
    assert step.to_dict().keys() == {"technique", *given}


def test_it_survives_yaml_and_a_wrong_field_suggests_the_right_one(cls: type[Technique]) -> None:
    recipe = recipe_for(cls)
    assert OptimConfig.parse(_yaml(recipe)).to_dict() == recipe.to_dict()
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as caught:
        cls.from_dict({names[0] + "x": 1})
    assert f"did you mean {names[0]!r}" in str(caught.value)


def _yaml(recipe: OptimConfig) -> Any:
    import yaml

    return yaml.safe_load(recipe.to_yaml())


def test_every_field_is_documented_and_the_module_has_its_equation_and_paper(cls: type[Technique]) -> None:
    text = inspect.getdoc(cls) or ""
    assert "Attributes:" in text
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert re.search(rf"^\s*(\w+, )*{field.name}(, \w+)*:", text, re.MULTILINE), f"{field.name} is not documented"
    assert cls.spec.summary
    module = importlib.import_module(cls.__module__).__doc__ or ""
    assert re.search(r"[=≈∝]", module), "the module's docstring has no equation"
    if cls.spec.paper is not None:
        assert cls.spec.paper.id in module, "the module's docstring does not name the paper"


def test_it_is_in_the_catalogue(cls: type[Technique]) -> None:
    assert catalogue().get(cls.spec.name) is cls
    assert hasattr(importlib.import_module(cls.__module__), "register_techniques")


def test_its_recipe_composes(cls: type[Technique]) -> None:
    traits = recipe_for(cls).check()
    assert cls.for_testing().contract().adds - {t for s in recipe_for(cls).steps for t in s.contract().drops} <= traits


def test_it_is_refused_without_the_step_that_must_follow(cls: type[Technique]) -> None:
    if not cls.for_testing().contract().owes:
        OptimConfig(steps=(cls.for_testing(),)).check({*cls.for_testing().contract().needs, FLOAT_WEIGHTS})
        return
    with pytest.raises(RecipeError, match="must be followed by"):
        OptimConfig(steps=(cls.for_testing(),)).check()


# -- on models ----------------------------------------------------------------------------------------------------
def test_some_architecture_is_supported(cls: type[Technique], attempts: Attempts) -> None:
    assert attempts.first(cls)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_outlives_the_tool(
    cls: type[Technique], architecture: str, tmp_path: Path, attempts: Attempts, stock: StockTransformers
) -> None:
    """Reload it where hf_optim cannot be imported: equal logits, after an error without trust for REMOTE_CODE."""
    model = attempts(cls, architecture)
    if model is None:
        return
    run = run_of(model)
    for trait in run.traits:
        assert holds(trait, run), f"{trait} does not hold in the tensors"
    _assert_clean(model)
    inputs = inputs_for(model, seed=99)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "out")
    assert {"hf_optim.json", "README.md", "config.json"} <= set(os.listdir(tmp_path / "out"))
    auto = AUTO.get(architecture, "AutoModelForCausalLM")
    if run.record.reload == Reload.REMOTE_CODE.name:
        with pytest.raises(OSError, match=r"trust_remote_code|custom code"):
            stock.logits(tmp_path / "out", auto, inputs)
    name, logits = stock.logits(
        tmp_path / "out", auto, inputs, trust_remote_code=run.record.reload == Reload.REMOTE_CODE.name
    )
    assert name == type(model).__name__
    assert torch.equal(logits, expected), f"largest difference {(logits - expected).abs().max()}"


def test_from_pretrained_gives_what_optimize_gives(cls: type[Technique], tmp_path: Path, attempts: Attempts) -> None:
    architecture, direct = attempts.first(cls)
    if recipe_for(cls).stages[0].trains:
        pytest.skip("a technique that trains goes through a trainer, not through from_pretrained alone")
    source = TINY[architecture]()
    source.save_pretrained(tmp_path / "source")
    batches = [inputs_for(source, seed=s) for s in range(3)]
    loaded = type(source).from_pretrained(tmp_path / "source", optim_config=recipe_for(cls), calibration=batches)
    hf_optim.restore(loaded)  # off the kernels, which may add in another order
    attention.attach_again(loaded)  # detached with them
    inputs = inputs_for(source, seed=99)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, direct(**inputs).logits)


def test_a_second_run_is_bit_exact_leaves_global_and_random_state_alone_and_is_freed_when_deleted(
    cls: type[Technique], tmp_path: Path, attempts: Attempts
) -> None:
    architecture, first = attempts.first(cls)  # the first run may import and register
    torch.manual_seed(7)
    random_before, globals_before = torch.random.get_rng_state(), _globals()
    made = [optimize_tiny(cls, TINY[architecture](), tmp_path)]
    assert _globals() == globals_before
    if not any(stage.trains for stage in recipe_for(cls).stages):
        assert torch.equal(random_before, torch.random.get_rng_state())
    for (name, a), (other, b) in zip(first.state_dict().items(), made[0].state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), f"{name} differs between two runs"
    run = run_of(made[0])
    held, masks = ({id(tensor) for tensor in tensors} for tensors in (held_tensors(run), run.masks.values()))
    assert held == masks, "a finished run holds tensors besides its masks"
    assert kept_after_deletion(made.pop) == [], "reference cycles keep a deleted model until the garbage collector runs"


def test_nothing_is_left_behind_when_it_raises(cls: type[Technique], attempts: Attempts) -> None:
    architecture, _ = attempts.first(cls)
    recipe = recipe_for(cls)
    if not any(stage.needs_data for stage in recipe.stages[:1]):
        pytest.skip("it uses no data that could fail")
    model = TINY[architecture]()
    globals_before = _globals()
    with pytest.raises(DataError, match="the data broke"):
        hf_optim.optimize(model, recipe, calibration=[inputs_for(model), _Broken(inputs_for(model, 1))])
    _assert_clean(model, allow_quantized=False)
    assert _globals() == globals_before


def test_an_error_about_non_finite_activations_names_the_module(cls: type[Technique], attempts: Attempts) -> None:
    architecture, _ = attempts.first(cls)
    if not (cls.for_testing().implements("calibrate") and cls.for_testing().needs_data()):
        pytest.skip("it observes no activations")
    model = TINY[architecture]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.fill_(3e38)  # finite, but their products are not
    with pytest.raises(NumericalError) as caught:
        hf_optim.optimize(model, recipe_for(cls), calibration=[inputs_for(model)])
    assert f"({cls.spec.name})" in str(caught.value)
    assert any(name in str(caught.value) for name, _ in model.named_modules() if name)


def test_padding_does_not_count(cls: type[Technique], attempts: Attempts) -> None:
    """Calibrate with two fillings of the padding: the result must be the same."""
    recipe = recipe_for(cls)
    if not recipe.stages[0].needs_data or any(stage.trains for stage in recipe.stages):
        pytest.skip("it uses no calibration data alone")
    architecture = next((name for name in ("llama", "bert", "t5") if attempts(cls, name) is not None), None)
    if architecture is None:
        pytest.skip("it supports no tiny model that takes a mask")
    found = [
        hf_optim.optimize(_loud_padding(TINY[architecture]()), recipe, calibration=_padded(TINY[architecture](), token))
        for token in (LOUD, LOUD + 1)
    ]
    inputs = inputs_for(found[0], seed=99)
    with torch.no_grad():
        first, second = (model(**inputs).logits for model in found)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4), "the tokens of padding change the result"


# -- checks ------------------------------------------------------------------------------------------------------
def _loud_padding(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with large embeddings of the tokens that are only in padding."""
    with torch.no_grad():
        weight = model.get_input_embeddings().get_parameter("weight")
        weight[LOUD : LOUD + 2] *= torch.tensor([[30.0], [90.0]])
    return model


def _padded(model: PreTrainedModel, token: int) -> list[dict[str, torch.Tensor]]:
    """Return batches whose sequences end in padding, filled with ``token``, with their masks."""
    batches = [inputs_for(model, seed=seed) for seed in range(3)]
    for batch in batches:
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if ids in batch:
                real = torch.arange(batch[ids].shape[1]) < torch.tensor([[5], [9]])
                batch[ids], batch[mask] = batch[ids].masked_fill(~real, token), real.long()
    return batches


class _Broken(dict):
    """A batch that raises when it is read."""

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("the data broke")

    keys = items = values = __iter__  # type: ignore[assignment]


def _assert_clean(model: nn.Module, allow_quantized: bool = True) -> None:
    """Assert that the model has no hook, no replaced forward and no parametrization."""
    for name, module in model.named_modules():
        hooks = [
            *module._forward_hooks,
            *module._forward_pre_hooks,
            *module._backward_hooks,
            *module._backward_pre_hooks,
        ]
        assert not hooks, f"{name or 'the model'} keeps hooks"
        assert not parametrize.is_parametrized(module), f"{name} keeps a parametrization"
        quantized = getattr(module, "quantization_scheme", None) is not None
        assert "forward" not in vars(module) or (quantized and allow_quantized), f"{name} keeps a replaced forward"
        assert module.training is False, f"{name} is in training mode"


def _globals() -> Mapping[str, Any]:
    """Return what a technique must not patch: methods of base classes, functions of torch, the default dtype."""
    watched: dict[str, Any] = {"dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled()}
    for holder in (nn.Module, nn.Linear, nn.functional, torch, PreTrainedModel, Trainer):
        for key, value in vars(holder).items():
            if callable(value):
                watched[f"{getattr(holder, '__name__', holder)}.{key}"] = id(value)
    return watched

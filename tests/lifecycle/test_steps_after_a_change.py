"""What is refused behind a step that changes the architecture: before any work, with the words of the run."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, tiny_t5, tiny_vit

import hf_optim
from hf_optim import ModelError, OptimConfig
from hf_optim.cli.check import check
from hf_optim.lifecycle.step_checks import require_supported_steps
from hf_optim.testing.tiny_runs import inputs_for

UPCYCLED = {"technique": "upcycle", "experts": 4, "top_k": 2}
MOEFIED = {"technique": "moefication", "experts": 4, "active": 2, "epochs": 1}
RESIDUAL = {"technique": "pr_moe", "experts": [2]}
VISION = {"technique": "vmoe", "experts": 4, "top_k": 2}
TASKS = {"technique": "task_moe", "tasks": ["de", "fr"], "experts": 4, "top_k": 2}
ZERO_POINTS = {"technique": "rtn", "bits": 4, "symmetric": False}

REFUSED = [
    (tiny_llama, MOEFIED, ZERO_POINTS, "cannot store integer weights of MoeficationLlamaForCausalLM"),
    (tiny_llama, MOEFIED, {"technique": "gobo"}, "has code of its own, and gobo brings code of its own"),
    (tiny_llama, MOEFIED, {"technique": "batch_priority_routing", "measure": False}, "a gate of 1"),
    (tiny_llama, MOEFIED, {"technique": "structured", "neurons": 0.25}, "no neurons that can be removed"),
    (tiny_llama, UPCYCLED, ZERO_POINTS, "cannot store integer weights of MixtralForCausalLM"),
    (tiny_llama, UPCYCLED, {"technique": "zeroquant"}, "which this technique leaves unquantized"),
    (tiny_llama, UPCYCLED, {"technique": "structured", "neurons": 0.25}, "no neurons that can be removed"),
    (tiny_t5, TASKS, {"technique": "capacity_routing", "measure": False}, "routes by task"),
]


@pytest.mark.many
@pytest.mark.parametrize(("build", "first", "second", "message"), REFUSED)
def test_check_refuses_what_the_run_refuses(build, first, second, message, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message) as expected:
        check([first, second], str(tmp_path))
    model = build()
    data = None if build is tiny_vit else [inputs_for(model)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ModelError) as found:
        hf_optim.optimize(model, [first, second], calibration=data or [inputs_for(model)])
    assert str(found.value) == str(expected.value)
    # Nothing was changed: it was known before the first step.
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())


@pytest.mark.parametrize(
    ("build", "step"),
    [(tiny_llama, UPCYCLED), (tiny_llama, MOEFIED), (tiny_llama, RESIDUAL), (tiny_vit, VISION), (tiny_t5, TASKS)],
)
def test_the_expected_model_is_the_one_that_the_step_makes(build, step):
    dense = build()
    technique = OptimConfig.parse([step]).steps[0]
    expected = technique.model_after(dense, "step 1")
    assert type(dense) is type(build())
    made = hf_optim.optimize(dense, [step], calibration=[inputs_for(dense)])
    assert type(expected) is type(made)
    shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in expected.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in expected.parameters())
    field = getattr(technique, "remote_code", None)
    if field is not None:
        assert getattr(expected.config, field.field) == getattr(made.config, field.field)


def test_steps_behind_a_change_are_checked_again_once_it_has_run():
    recipe = OptimConfig.parse([MOEFIED, {"technique": "rtn", "bits": 4}])
    assert require_supported_steps(recipe, tiny_llama()) == 0

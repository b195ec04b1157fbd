"""Lottery tickets: the surviving weights are rewound bit-exactly to an early step and trained again."""

from __future__ import annotations

import itertools

import pytest
import torch
from real_stories import Stories
from round_training_runs import original_rates, train
from tiny_models import tiny_gpt2, tiny_llama

import hf_optim
from hf_optim import OptimConfig, RecipeError, run_of
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.pruning.rewinding import reinitialized_copy


@pytest.mark.many
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    ("rewind_to", "k", "steps", "starts"), [(0, 0, 9, (3, 6)), (2, 2, 14, (6, 10)), (0.5, 3, 12, (6, 9))]
)
def test_rewound_weights_equal_those_of_step_k_where_the_mask_is_1(tmp_path, make, rewind_to, k, steps, starts):
    model = make()
    step = {"technique": "lottery_ticket", "sparsity": 0.75, "rounds": 2, "rewind_to": rewind_to}
    seen = train(model := hf_optim.optimize(model, step), tmp_path / "a", steps, warmup_steps=1)
    assert not seen.masks[starts[0] - 1]
    for number, start in enumerate(starts, 1):
        for name, early in seen.weights[k].items():
            mask = seen.masks[start].get(name, torch.ones_like(early, dtype=torch.bool))
            assert torch.equal(seen.weights[start][name][mask], early[mask])
            assert not seen.weights[start][name][~mask].any()
            if name in seen.masks[start]:
                # Ranked by what training had made of them, not by what they go back to.
                kept = seen.masks[start - 1].get(name)
                share = 0.5 if number == 1 else 0.75
                ranked = masks.layer_masks(
                    {"w": seen.before[start][name]}, share, {"w": kept} if kept is not None else None
                )
                assert torch.equal(mask, ranked["w"])
    original = original_rates(make(), tmp_path / "b", starts[0], warmup_steps=1)
    assert seen.rates == [*original, *original[k:], *original[k:]]
    assert (tmp_path / "a" / f"rewind-{k}" / "model.safetensors").is_file()
    assert run_of(model).record.steps["0"]["sparsity"] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize(
    ("other", "place"),
    [*itertools.product(["l0", "variational_dropout", "sr_ste", "top_kast"], [0, 1]), ("qat", 1)],
)
def test_a_step_whose_parameters_are_not_rewound_is_refused(other, place):
    """Gates, variances, masks and scales are not weights, and rewinding does not restore them."""
    steps = [{"technique": "lottery_ticket"}]
    steps.insert(place, {"technique": other})
    with pytest.raises(RecipeError, match=r"keep only one of .* both set 'the training forward of linear layers'"):
        OptimConfig.parse(steps).check()
    OptimConfig.parse([{"technique": "logit_kd"}, {"technique": "lottery_ticket"}]).check()


def test_without_a_dense_phase_the_initial_weights_are_ranked_and_restored(tmp_path):
    model = tiny_llama()
    came = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = {"technique": "lottery_ticket", "sparsity": 0.75, "rounds": 2, "dense": False}
    seen = train(hf_optim.optimize(model, step), tmp_path, 6)
    for name, mask in seen.masks[0].items():
        assert torch.equal(mask, masks.layer_masks({"w": came[name]}, 0.5)["w"])
    for start in (0, 3):
        for name, weight in came.items():
            assert torch.equal(seen.weights[start][name], weight * seen.masks[start].get(name, torch.ones_like(weight)))


@pytest.mark.slow
def test_the_control_has_the_masks_of_the_ticket_and_random_weights(tmp_path):
    step = {"technique": "lottery_ticket", "rounds": 2, "rewind_to": 1, "sparsity": 0.6}
    ticket, control = tiny_llama(), tiny_llama()
    seen = train(hf_optim.optimize(ticket, step), tmp_path / "a", 7)
    other = train(hf_optim.optimize(control, {**step, "reinitialize": True, "seed": 3}), tmp_path / "b", 7)
    drawn = dict(reinitialized_copy(tiny_llama(), 3).named_parameters())
    for name, mask in run_of(ticket).masks.items():
        assert torch.equal(run_of(control).masks[name], mask)
    for name, weight in drawn.items():
        assert torch.equal(other.weights[3][name], seen.weights[3][name])
        assert torch.equal(other.weights[5][name], weight * seen.masks[5].get(name, torch.ones_like(weight)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewind_to": 1.0}, r"rewind_to is a share of one phase in \[0, 1\) or a whole number of steps"),
        ({"rewind_to": -1}, "rewind_to must be >= 0"),
        ({"dense": False, "rewind_to": 5}, "dense=False leaves out"),
        ({"rewind": 5}, "did you mean 'rewind_to'"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "lottery_ticket", **fields}])


@pytest.mark.real_model
def test_a_ticket_is_better_than_a_random_start_with_its_mask(tmp_path, shared_models, shared_data):
    """The pretrained weights are the rewinding point, as for pretrained transformers (2007.12223)."""
    stories = Stories(shared_models, shared_data)
    step = {"technique": "lottery_ticket", "sparsity": 0.6, "rounds": 2}
    ticket = stories.loss_after([step], tmp_path / "a", 120)
    assert stories.sparsity == pytest.approx(0.6, abs=1e-3)
    random = stories.loss_after([{**step, "reinitialize": True}], tmp_path / "b", 120)
    assert stories.sparsity == pytest.approx(0.6, abs=1e-3)
    assert ticket < random - 0.5

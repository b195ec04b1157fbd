"""Learning-rate rewinding: the weights stay, and the schedule of the original training is repeated."""

from __future__ import annotations

import pytest
import torch
from real_stories import Stories
from round_training_runs import original_rates, train
from tiny_models import tiny_gpt2, tiny_llama

import hf_optim
from hf_optim import OptimConfig, RecipeError, run_of

SCHEDULES = [
    {"lr_scheduler_type": "linear", "warmup_steps": 2},
    {"lr_scheduler_type": "cosine", "warmup_steps": 0.25},
    {"lr_scheduler_type": "constant"},
]


@pytest.mark.many
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["lr_scheduler_type"])
@pytest.mark.parametrize("rewind_to", [0, 3])
def test_the_learning_rates_are_those_of_the_original(tmp_path, schedule, rewind_to):
    original = original_rates(tiny_gpt2(), tmp_path / "a", 6, **schedule)
    model = hf_optim.optimize(tiny_gpt2(), {"technique": "lr_rewinding", "rounds": 2, "rewind_to": rewind_to})
    seen = train(model, tmp_path / "b", 6 + 2 * (6 - rewind_to), **schedule)
    assert seen.rates == [*original, *original[rewind_to:], *original[rewind_to:]]


def test_a_trained_model_starts_with_a_round(tmp_path):
    original = original_rates(tiny_llama(), tmp_path / "a", 8, warmup_steps=2)
    step = {"technique": "lr_rewinding", "rounds": 3, "rewind_to": 0.25, "dense": False, "sparsity": 0.875}
    seen = train(hf_optim.optimize(tiny_llama(), step), tmp_path / "b", 18, warmup_steps=2)
    assert seen.rates == original[2:] * 3
    for after, share in ((0, 0.5), (5, 0.5), (6, 0.75), (12, 0.875), (18, 0.875)):
        found = seen.masks[after].values()
        assert 1 - sum(int(m.sum()) for m in found) / sum(m.numel() for m in found) == pytest.approx(share, abs=1e-3)


def test_weights_are_not_rewound(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "lr_rewinding", "rounds": 2, "sparsity": 0.6})
    seen = train(model, tmp_path, 9)
    for start in (3, 6):
        for name, trained in seen.before[start].items():
            mask = seen.masks[start].get(name, torch.ones_like(trained))
            assert torch.equal(seen.weights[start][name], trained * mask)
    assert run_of(model).record.steps["0"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert not list(tmp_path.glob("rewind-*"))


def test_a_position_outside_the_schedule_is_refused():
    with pytest.raises(RecipeError, match=r"share of one phase in \[0, 1\)"):
        OptimConfig.parse([{"technique": "lr_rewinding", "rewind_to": 1.5}])


@pytest.mark.real_model
def test_it_beats_fine_tuning_at_the_small_rate(tmp_path, shared_models, shared_data):
    """Equal rounds, steps and peak rate; fine-tuning uses a tenth of it, as at the end of a schedule."""
    stories = Stories(shared_models, shared_data)
    step = {"technique": "lr_rewinding", "sparsity": 0.8, "rounds": 4, "dense": False}
    rewound = stories.loss_after([step], tmp_path, 160)
    assert stories.sparsity == pytest.approx(0.8, abs=1e-3)
    tuned = stories.loss_after([{**step, "technique": "iterative", "rate": 0.1}], tmp_path, 160)
    assert stories.sparsity == pytest.approx(0.8, abs=1e-3)
    assert rewound < tuned - 0.2

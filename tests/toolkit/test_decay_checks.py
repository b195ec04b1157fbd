"""Whether a weight decay fits a learning rate: negligible, stable, and the peak of a schedule."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_optim import RecipeError
from hf_optim.toolkit.pruning.decay_checks import check_decay_stability, following_decay, negligible_decay, peak_rate


def test_a_decay_below_one_percent_of_training_is_negligible():
    assert "lose at most 0.2 % in 100 steps" in negligible_decay(1e-2, 2e-3, 100)
    assert negligible_decay(1e-2, 1e-2, 100) == ""  # 1 %
    assert negligible_decay(1e-2, 0.0, 100) == ""


def test_a_decay_that_follows_the_rate_has_the_total_of_the_papers_training():
    assert following_decay(0.1, 500_000) == pytest.approx(2e-4)  # SGD on ImageNet
    assert following_decay(5e-4, 1000) == pytest.approx(20.0)
    assert following_decay(5e-4, 10) == pytest.approx(200.0)  # a tenth of a weight in a step, not all of it
    assert following_decay(0.0, 10) == 0.0


def test_a_decay_that_turns_signs_is_refused():
    check_decay_stability(0.1, 10.0, "step 1 (x)")
    with pytest.raises(RecipeError, match=r"step 1 \(x\): at a learning rate of 0\.1, a decay of 15 takes 1\.5 times"):
        check_decay_stability(0.1, 15.0, "step 1 (x)")


def test_the_peak_rate_is_that_of_the_weights_within_training():
    ours, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [ours], "lr": 0.2}, {"params": [other], "lr": 5.0}])
    assert peak_rate(optimizer, None, [ours], 10) == 0.2
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, step / 8))
    assert peak_rate(optimizer, warm_up, [ours], 5) == pytest.approx(0.1)  # the warm-up is cut off at 4 / 8
    assert peak_rate(optimizer, warm_up, [ours], 20) == pytest.approx(0.2)
    optimizer = torch.optim.SGD([{"params": [ours], "lr": 0.2}])
    assert peak_rate(optimizer, StepLR(optimizer, 1, gamma=3.0), [ours], 20) == 0.2

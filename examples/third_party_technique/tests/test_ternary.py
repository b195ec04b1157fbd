"""The closed form of the paper; the conformance suite tests the rest (``pytest --hf-optim ternary``)."""

import torch
from hf_optim_ternary.ternary import ternary


def test_the_closed_form_on_a_row_worked_by_hand():
    row = torch.tensor([[4.0, -3.0, 0.5, -0.5]])  # mean magnitude 2, threshold 1.4, scale 3.5
    assert torch.equal(ternary(row, 0.7), torch.tensor([[3.5, -3.5, 0.0, 0.0]]))


def test_three_values_per_channel_and_zeros_stay():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[2, ::3] = 0
    made = ternary(weight, 0.7)
    assert all(len(row.unique()) <= 3 for row in made)
    assert (made[2, ::3] == 0).all()

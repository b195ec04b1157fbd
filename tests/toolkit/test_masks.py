"""Masks: exact counts, ties by index, N:M against the enumeration of all patterns."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn

from hf_optim import NumericalError
from hf_optim.toolkit.pruning import masks


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best_by_enumeration(score: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """The mask of the best of all ``keep``-of-``group`` patterns; of equal sums the first in lexicographic order."""
    patterns = torch.zeros(0, group)
    for chosen in itertools.combinations(range(group), keep):
        patterns = torch.cat([patterns, torch.zeros(1, group).index_fill_(1, torch.tensor(chosen), 1.0)])
    sums = score.double().abs().view(-1, group) @ patterns.double().T
    return patterns[sums.argmax(1)].view_as(score).bool()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 5), (4, 4)])
def test_nm_mask_is_the_best_of_all_patterns(keep, group):
    score = normal(7, group * 9)
    mask = masks.nm_mask(score, keep, group)
    assert torch.equal(mask, best_by_enumeration(score, keep, group))
    assert masks.has_nm_pattern(score * mask, keep, group)
    assert not masks.has_nm_pattern(score, keep, group) or keep == group


def test_nm_ties_go_to_the_lower_index():
    score = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, -1.0, 1.0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(masks.nm_mask(score, 2, 4), expected)


def test_nm_mask_keeps_removed_weights_removed():
    kept = torch.tensor([[False, True, True, True, False, False, False, True]])
    score = torch.tensor([[9.0, 1.0, 3.0, 2.0, 9.0, 9.0, 9.0, 0.0]])
    expected = torch.tensor([[False, False, True, True, False, False, False, True]])
    assert torch.equal(masks.nm_mask(score, 2, 4, kept), expected)


def test_nm_mask_refuses_invalid_widths_and_patterns():
    with pytest.raises(ValueError, match="width 6 is not a multiple of the group size 4"):
        masks.nm_mask(normal(2, 6), 2, 4)
    with pytest.raises(ValueError, match="5:4 is not a pattern"):
        masks.nm_mask(normal(2, 8), 5, 4)


def test_has_nm_pattern_counts_along_the_input():
    across = torch.zeros(4, 4)
    across[0] = 1.0
    assert not masks.has_nm_pattern(across, 2, 4)
    assert masks.has_nm_pattern(across.T, 2, 4)
    assert not masks.has_nm_pattern(torch.zeros(2, 6), 2, 4)


def test_parameter_has_nm_pattern_handles_conv1d():
    model = tiny_gpt2()
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    stored = masks.as_stored(layer, masks.nm_mask(layer.weight.detach().T, 2, 4))
    assert stored.shape == layer.weight.shape == (32, 128)
    kept = {}
    masks.prune_(model, kept, {f"{name}.weight": stored})
    assert masks.parameter_has_nm_pattern(model, f"{name}.weight", 2, 4)
    assert not masks.has_nm_pattern(layer.weight.detach(), 2, 4)
    assert torch.equal(masks.mask_out_in(layer, kept, f"{name}.weight"), stored.T)
    assert not masks.parameter_has_nm_pattern(model, "transformer.h.1.mlp.c_fc.weight", 2, 4)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_masks_remove_exactly_the_smallest(sparsity, dtype):
    score = normal(13, 17).to(dtype)
    mask = masks.layer_masks({"w": score}, sparsity)["w"]
    order = score.abs().flatten().double().sort(stable=True, descending=True).indices
    expected = torch.zeros(13 * 17, dtype=torch.bool)
    expected[order[: 13 * 17 - masks.removed_count(13 * 17, sparsity)]] = True
    assert torch.equal(mask, expected.view(13, 17))


def test_counts_are_rounded_to_the_nearest():
    assert [masks.removed_count(10, s) for s in (0.0, 0.04, 0.05, 0.3, 0.96, 1.0)] == [0, 0, 1, 3, 10, 10]


def test_ties_at_the_threshold_are_kept_in_order_of_their_index():
    score = torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0])
    assert masks.layer_masks({"w": score}, 0.4)["w"].tolist() == [True, True, True, False, False]
    both = masks.global_masks({"a": torch.ones(3), "b": torch.ones(3)}, 0.5)
    assert both["a"].tolist() == [True] * 3
    assert both["b"].tolist() == [False] * 3


def test_global_masks_share_one_threshold():
    scores = {"small": 0.1 * normal(8, 8), "large": normal(8, 16, seed=1)}
    found = masks.global_masks(scores, 0.6)
    both = torch.cat([scores["small"].flatten(), scores["large"].flatten()]).abs()
    cut = both.sort().values[masks.removed_count(192, 0.6)]
    assert sum(int((~mask).sum()) for mask in found.values()) == masks.removed_count(192, 0.6)
    for name, mask in found.items():
        assert torch.equal(mask, scores[name].abs() >= cut)
    kept = {name: mask.float().mean() for name, mask in found.items()}
    assert kept["small"] < kept["large"]


def test_removed_weights_stay_removed_and_count():
    score = normal(10, 10)
    earlier = {"w": torch.ones(10, 10, dtype=torch.bool)}
    earlier["w"][:3] = False
    mask = masks.layer_masks({"w": score}, 0.5, earlier)["w"]
    assert not mask[:3].any()
    assert int((~mask).sum()) == 50
    assert torch.equal(masks.layer_masks({"w": score}, 0.1, earlier)["w"], earlier["w"])


def test_prune_intersects_masks_and_zeroes_weights():
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    kept: masks.Masks = {}
    masks.prune_(model, kept, masks.layer_masks({name: before}, 0.5))
    first = kept[name].clone()
    masks.prune_(model, kept, {name: torch.rand(first.shape, generator=torch.Generator().manual_seed(1)) > 0.5})
    assert not (kept[name] & ~first).any()
    assert int(kept[name].sum()) < int(first.sum())
    assert torch.equal(weight.detach(), before * kept[name])


def test_shared_weights_are_ranked_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert masks.weight_names(dict(model.named_children())) == {"0": "0.weight"}


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(NumericalError, match=r"step 1 \(nm\): b holds infinite or NaN"):
        masks.require_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, "step 1 (nm)")

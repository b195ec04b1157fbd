"""Matrices of experts as weights that pruning ranks, masks in stacked parameters, and experts in sparse training."""

from __future__ import annotations

import copy

import pytest
import tiny_mixtures
import torch
import transformers
from tiny_models import tiny_mixtral
from torch import nn

from hf_optim.toolkit import topology
from hf_optim.toolkit.modules.swap_class import swap_class
from hf_optim.toolkit.pruning import masked_layers, masks, nm_groups
from hf_optim.toolkit.pruning.matrices import MaskParts, locate, parameters_of

EXPERTS = "model.layers.0.mlp.experts"
MODELS = {
    "aria": ("AriaTextForCausalLM", "AriaTextConfig"),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig"),
}


def build(model, config):
    """Build a tiny mixture of a class of transformers, with random weights."""
    base = getattr(transformers, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model)(base(**tiny_mixtures.sizes(base, {}))).eval()


def views_of(model, prefix=EXPERTS):
    return {name: view for name, view in topology.expert_linears(model).items() if name.startswith(prefix)}


def random_masks(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


# -- names -------------------------------------------------------------------------------------------------------------
def test_the_name_of_an_expert_is_a_part_of_the_stack():
    model = tiny_mixtral()
    assert locate(model, f"{EXPERTS}.3.down_proj") == (f"{EXPERTS}.down_proj", 3)
    assert locate(model, f"{EXPERTS}.down_proj") == (f"{EXPERTS}.down_proj", None)
    assert locate(model, "model.norm.weight") == ("model.norm.weight", None)
    for unknown in (f"{EXPERTS}.4.down_proj", f"{EXPERTS}.0.nothing", "model.nothing"):
        with pytest.raises(AttributeError):
            locate(model, unknown)
    layers = {**topology.linears(model), **topology.expert_linears(model)}
    names = masks.weight_names({**layers, "again": topology.expert_linears(model)[f"{EXPERTS}.0.down_proj"]})
    assert len(names) == len(layers)
    assert "again" not in names
    assert names[f"{EXPERTS}.0.down_proj"] == f"{EXPERTS}.0.down_proj"
    assert names["lm_head"] == "lm_head.weight"


def test_parts_of_masks():
    whole = {f"{EXPERTS}.down_proj": random_masks((4, 6, 8)), "lm_head.weight": random_masks((3, 3))}
    parts = MaskParts(whole)
    assert f"{EXPERTS}.1.down_proj" in parts
    assert f"{EXPERTS}.1.gate_up_proj" not in parts
    assert 3 not in parts
    assert torch.equal(parts[f"{EXPERTS}.1.down_proj"], whole[f"{EXPERTS}.down_proj"][1])
    assert parts["lm_head.weight"] is whole["lm_head.weight"]
    assert parts.get("layers.3.weight") is None
    found = parameters_of(whole, [f"{EXPERTS}.0.down_proj", f"{EXPERTS}.1.down_proj", "lm_head", "dense"])
    assert found == [f"{EXPERTS}.down_proj", "lm_head.weight"]


def test_a_matrix_loses_its_share_whatever_the_others_hold():
    model = tiny_mixtral()
    views = views_of(model)
    views[f"{EXPERTS}.0.down_proj"].weight.mul_(100.0)
    before = {name: view.weight.clone() for name, view in views.items()}
    kept: masks.Masks = {}
    chosen = {name: view for name, view in views.items() if ".2." not in name}
    weights = masks.MatrixWeights(model, masks.weight_names(chosen).values())
    masks.prune_(model, kept, masks.layer_masks(weights, 0.25))
    assert kept.keys() == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for name, view in views.items():
        assert int((view.weight == 0).sum()) == (view.weight.numel() // 4 if name in chosen else 0)
        assert torch.equal(view.weight[view.weight != 0], before[name][view.weight != 0])
    first = kept[f"{EXPERTS}.down_proj"]
    # Zeros of before stay and count, and a changed mask is another tensor, by which callbacks know it.
    masks.prune_(model, kept, masks.layer_masks(weights, 0.5, kept))
    assert kept[f"{EXPERTS}.down_proj"] is not first
    assert not bool((kept[f"{EXPERTS}.down_proj"] & ~first).any())
    assert {int((views[name].weight == 0).sum()) * 2 for name in chosen} == {v.weight.numel() for v in chosen.values()}


@pytest.mark.parametrize("kind", ["gpt_oss", "aria", "mixtral"])
def test_groups_lie_along_the_inputs_in_both_layouts(kind):
    model = build(*MODELS[kind])
    views = topology.expert_linears(model)
    assert {view.transposed for view in views.values()} == {kind != "mixtral"}
    layers, skipped = nm_groups.select_divisible(views, 4)
    assert layers == views
    assert not skipped
    kept: masks.Masks = {}
    found = {name: masks.as_stored(view, masks.nm_mask(view.weight, 2, 4)) for name, view in views.items()}
    masks.prune_(model, kept, found)
    for name, view in views.items():
        assert masks.has_nm_pattern(view.weight, 2, 4)
        assert int((view.weight != 0).sum()) == view.weight.numel() // 2
        assert torch.equal(masks.mask_out_in(view, kept, name), view.weight != 0)
    for parameter in kept:
        assert masks.parameter_has_nm_pattern(model, parameter, 2, 4)
    patterns: dict[str, tuple[int, int]] = {}
    nm_groups.record_patterns(patterns, {**views, "lm_head": model.get_submodule("lm_head")}, 2, 4)
    assert patterns == dict.fromkeys([*kept, "lm_head.weight"], (2, 4))
    patterns.clear()
    some = dict([*views.items()][1:])  # a stack of which one matrix stays dense has no pattern
    nm_groups.record_patterns(patterns, some, 2, 4)
    assert len(patterns) == len(kept) - 1


# -- sparse training ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_every_forward_computes_with_the_masked_weight(kind, implementation):
    model = build(*MODELS[kind])
    model.config._experts_implementation = implementation
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    views = topology.expert_linears(model)
    names = {name for name, _ in model.named_parameters()}
    pruned = copy.deepcopy(model)
    stacks = masked_layers.attach_all(views)
    assert stacks.keys() == {view.parameter_name for view in views.values()}
    assert masked_layers.masked_layers(model).keys() == stacks.keys()
    forward, backward = {}, {}
    for seed, (name, stack) in enumerate(stacks.items()):
        forward[name] = random_masks(stack.weight.shape, seed)
        backward[name] = forward[name] | random_masks(stack.weight.shape, seed + 100)
        stack.set_masks(forward[name], backward[name])
        with torch.no_grad():
            pruned.get_parameter(name).mul_(forward[name])
    expected, found = pruned(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    (expected.square().sum() + found.square().sum()).backward()
    for name, stack in stacks.items():
        # The parameter is the dense weight, before and after a forward.
        assert bool((model.get_parameter(name)[~forward[name]] != 0).any())
        dense = pruned.get_parameter(name).grad
        torch.testing.assert_close(stack.weight.grad, dense * backward[name], atol=1e-5, rtol=1e-4)
        assert bool((stack.weight.grad[backward[name] & ~forward[name]] != 0).any())
    assert {name for name, _ in model.named_parameters()} == names
    for stack in stacks.values():
        masked_layers.detach_masks(stack)
    assert not masked_layers.masked_layers(model)
    assert all(type(module) is type(pruned.get_submodule(name)) for name, module in model.named_modules())


def test_only_the_targets_of_a_stack_are_masked():
    model = tiny_mixtral()
    views = {name: view for name, view in views_of(model).items() if name.endswith(("1.down_proj", "3.down_proj"))}
    ((name, stack),) = masked_layers.attach_all(views).items()
    assert list(stack.matrices(name)) == list(views)
    mask = stack.whole(name, masks.layer_masks(stack.matrices(name), 0.5))
    assert [int((~part).sum()) for part in mask] == [0, 768, 0, 768]
    assert stack.targeted().flatten().tolist() == [False, True, False, True]
    everything = masked_layers.attach_all(views_of(model, "model.layers.1.mlp.experts"))
    assert {one.targeted() for one in everything.values()} == {None}


def test_masks_move_with_the_model_and_copies_have_their_own():
    model = tiny_mixtral()
    stacks = masked_layers.attach_all(views_of(model))
    for stack in stacks.values():
        stack.set_masks(random_masks(stack.weight.shape))
    other = copy.deepcopy(model)
    for stack in masked_layers.masked_layers(other).values():
        stack.set_masks(None)
    assert all(stack.forward_mask is not None for stack in stacks.values())
    model.to("meta")
    assert {stack.forward_mask.device.type for stack in stacks.values()} == {"meta"}


def test_experts_whose_forward_was_replaced_are_left_out():
    model = tiny_mixtral()

    class Other(type(model.get_submodule(EXPERTS))):
        pass

    swap_class(model.get_submodule(EXPERTS), Other)
    found, skipped = masked_layers.select_supported(model, topology.expert_linears(model))
    assert {name.split(".")[2] for name in found} == {"1"}
    ((reason, names),) = skipped.items()
    assert reason == "the forward of this Other was replaced"
    assert len(names) == 8


# -- what a step leaves alone ------------------------------------------------------------------------------------------
def test_experts_that_a_step_leaves_alone():
    model = tiny_mixtral()
    both = [f"model.layers.{index}.mlp.experts" for index in (0, 1)]
    assert topology.unprunable_experts(model, ["Linear"]) == {}
    assert topology.unprunable_experts(model, ["Linear"], why="reason") == {"reason": both}
    assert topology.unprunable_experts(model, ["*.experts.*"], why="reason") == {"reason": both}
    assert topology.unprunable_experts(model, ["*self_attn*"], why="reason") == {}
    assert topology.unprunable_experts(model, ["Linear"], ["*.layers.0.*"], why="reason") == {"reason": both[1:]}
    assert topology.unprunable_experts(model, ["Linear"], why="x", inside="model.layers.1") == {"x": both[1:]}
    assert topology.unprunable_experts(nn.Linear(2, 2), ["Linear"], why="reason") == {}


def test_experts_with_a_layout_of_their_own_are_named():
    model = build("Llama4ForCausalLM", "Llama4TextConfig")
    ((reason, names),) = topology.unprunable_experts(model, ["Linear"]).items()
    assert "Llama4TextExperts stores its experts in a layout of its own" in reason
    assert names == [f"model.layers.{index}.feed_forward.experts" for index in (0, 1)]
    assert topology.unprunable_experts(model, ["*self_attn*"]) == {}
    assert topology.unprunable_experts(model, ["Linear"], ["*experts*"]) == {}

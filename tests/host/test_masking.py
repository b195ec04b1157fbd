"""Masks hold through any optimizer, at any event, under accumulation, and go with their parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from toy_training import ToyRamp, arguments, begin, sentences
from transformers import Trainer, TrainerCallback

import hf_optim
from hf_optim import ModelError
from hf_optim.masking import MaskKeeper, apply_masks, stray_weights

NAME = "model.layers.0.mlp.up_proj.weight"


def half(parameter: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


class Watch(TrainerCallback):
    """Notes stray weights at every event; stands behind the keeper."""

    def __init__(self, run) -> None:
        self.run, self.found, self.seen = run, [], 0

    def _look(self, *args, **kwargs) -> None:
        self.seen += 1
        self.found += stray_weights(self.run)

    on_step_begin = on_optimizer_step = on_step_end = on_substep_end = on_train_end = _look


@pytest.mark.parametrize(
    ("at", "optim"),
    [
        ("on_step_begin", "adamw_torch"),
        ("on_pre_optimizer_step", "adafactor"),
        ("on_optimizer_step", "sgd"),
        ("on_step_end", "adamw_torch"),
    ],
)
def test_renewed_masks_hold_in_a_stock_trainer(tmp_path, at: str, optim: str):
    model = tiny_llama()
    run = begin(model, ToyRamp(at=at))
    callbacks = hf_optim.callbacks(model)
    watch = Watch(run)
    args = arguments(tmp_path, optim=optim, gradient_accumulation_steps=2, weight_decay=0.1)
    Trainer(
        model=model, args=args, train_dataset=sentences(), callbacks=[*callbacks[:-1], watch, callbacks[-1]]
    ).train()
    assert watch.seen > 8
    assert watch.found == []
    removed = 1 - run.masks[NAME].float().mean()
    assert 0.25 < removed < 0.45  # four times a tenth
    assert (model.get_parameter(NAME)[run.masks[NAME]] != 0).all()  # and no more than that


def keeper_of(model) -> tuple[hf_optim.Run, MaskKeeper]:
    run = begin(model, ToyRamp())
    return run, MaskKeeper(run)


def step(keeper: MaskKeeper, optimizer, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """One optimizer step as the Trainer makes it."""
    none = SimpleNamespace()
    keeper.on_step_begin(none, none, none, optimizer=optimizer)
    parameter.grad = gradient.clone()
    keeper.on_pre_optimizer_step(none, none, none, optimizer=optimizer)
    optimizer.step()
    keeper.on_optimizer_step(none, none, none, optimizer=optimizer)
    optimizer.zero_grad()
    keeper.on_step_end(none, none, none, optimizer=optimizer)


def test_momentum_of_masked_weights_is_gone_when_they_grow_again():
    model = tiny_llama()
    run, keeper = keeper_of(model)
    parameter = model.get_parameter(NAME)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    gradient = torch.ones_like(parameter)
    step(keeper, optimizer, parameter, gradient)
    mask = half(parameter)
    run.masks[NAME] = mask
    for _ in range(3):
        step(keeper, optimizer, parameter, gradient)
    moment = optimizer.state[parameter]["exp_avg"]
    assert (moment[~mask] == 0).all()
    assert (moment[mask] > 0).all()
    run.masks[NAME] = torch.ones_like(mask)
    step(keeper, optimizer, parameter, torch.zeros_like(parameter))
    assert (parameter[~mask] == 0).all()  # free again, and nothing drives them
    assert (parameter[mask] != 0).all()


class Mastered(torch.optim.Optimizer):
    """Half-precision parameters, and the values that count in float32 copies: what mixed-precision optimizers do."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master"] = p.detach().float().clone()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master"].sub_(0.1 * p.grad.float())
                p.copy_(self.state[p]["master"])


def test_master_copies_do_not_bring_weights_back():
    model = tiny_llama().bfloat16()
    run, keeper = keeper_of(model)
    parameter = model.get_parameter(NAME)
    optimizer = Mastered([parameter])
    run.masks[NAME] = mask = half(parameter)
    for _ in range(3):
        step(keeper, optimizer, parameter, torch.ones_like(parameter))
        assert (parameter[~mask] == 0).all()
        assert parameter[mask].count_nonzero() > 0.9 * mask.sum()


def test_steps_see_dense_gradients_and_the_optimizer_masked_ones():
    model = tiny_llama()
    run, keeper = keeper_of(model)
    parameter = model.get_parameter(NAME)
    run.masks[NAME] = mask = half(parameter)
    parameter.grad = torch.ones_like(parameter)
    keeper.on_pre_optimizer_step(None, None, None)
    assert (parameter.grad == mask).all()


def test_masks_move_once_and_are_not_copied():
    model = tiny_llama()
    run, keeper = keeper_of(model)
    run.masks[NAME] = mask = half(model.get_parameter(NAME))
    keeper.on_step_begin(None, None, None)
    assert run.masks[NAME] is mask
    assert keeper._groups[0][1][0] is mask


def test_groups_by_dtype_and_conv1d():
    model = tiny_gpt2()
    run, keeper = keeper_of(model)
    names = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"]
    model.transformer.h[1].attn.c_attn.bfloat16()
    run.masks |= {name: half(model.get_parameter(name), i) for i, name in enumerate(names)}
    assert len(stray_weights(run)) == 3
    keeper.on_step_begin(None, None, None)
    assert sorted(len(parameters) for parameters, _ in keeper._groups) == [1, 2]
    assert stray_weights(run) == []


def test_a_mask_that_fits_nothing_is_named():
    model = tiny_llama()
    run, keeper = keeper_of(model)
    run.masks["model.layers.9.mlp.up_proj.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"layers\.9\.mlp\.up_proj\.weight has a mask, but LlamaForCausalLM"):
        keeper.on_step_begin(None, None, None)
    run.masks.clear()
    run.masks[NAME] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"mask of model\.layers\.0\.mlp\.up_proj\.weight is \(2, 2\)"):
        apply_masks(run)

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
from hf_optim.runs.masking import apply_masks, stray_weights
from hf_optim.training import fused_masking, mask_callback
from hf_optim.training.mask_callback import STAY_AT_ZERO, MaskCallback, stays_at_zero

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


def keeper_of(model) -> tuple[hf_optim.Run, MaskCallback]:
    run = begin(model, ToyRamp())
    return run, MaskCallback(run)


def step(keeper: MaskCallback, optimizer, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
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
    assert next(iter(keeper._zeroing._parts))[1]._masks[0] is mask


def test_groups_by_dtype_and_conv1d():
    model = tiny_gpt2()
    run, keeper = keeper_of(model)
    names = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"]
    model.transformer.h[1].attn.c_attn.bfloat16()
    run.masks |= {name: half(model.get_parameter(name), i) for i, name in enumerate(names)}
    assert len(stray_weights(run)) == 3
    keeper.on_step_begin(None, None, None)
    assert sorted(len(places) for places, _ in keeper._zeroing._parts) == [1, 2]
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


def test_parameters_of_zero_3_are_refused_with_the_remedy():
    model = tiny_llama()
    run, keeper = keeper_of(model)
    parameter = model.get_parameter(NAME)
    run.masks[NAME] = half(parameter)
    parameter.ds_id, parameter.data = 0, torch.empty(0)  # as DeepSpeed leaves a partitioned parameter
    with pytest.raises(ModelError, match=r"not those of FSDP1 or ZeRO-3; train with FSDP2, DDP"):
        keeper.on_step_begin(None, None, None)


@pytest.mark.parametrize("optimizer_class", STAY_AT_ZERO)
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_leaves_zeros_alone_needs_no_second_pass(optimizer_class, fused: bool):
    """Bit by bit what zeroing the weights after every step gives, also through masks that narrow and widen."""
    found = []
    for twice in (False, True):
        model = tiny_llama()
        run, keeper = keeper_of(model)
        parameter = model.get_parameter(NAME)
        more = {"momentum": 0.9, "nesterov": True} if optimizer_class is torch.optim.SGD else {"amsgrad": True}
        optimizer = optimizer_class([parameter], lr=0.01, weight_decay=0.1, fused=fused, **more)
        assert stays_at_zero(optimizer)
        passes = []
        keeper.apply = lambda keeper=keeper, passes=passes: (passes.append(1), MaskCallback.apply(keeper))
        for turn in range(8):
            if turn in (1, 3, 6):
                run.masks[NAME] = half(parameter, seed=turn) if turn != 6 else torch.ones_like(half(parameter))
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(turn))
            step(keeper, optimizer, parameter, gradient)
            if twice:
                MaskCallback.apply(keeper)
            assert stray_weights(run) == []
        assert passes == []
        found.append(parameter.detach().clone())
    assert torch.equal(*found)


def test_an_optimizer_nobody_knows_gets_the_second_pass():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not stays_at_zero(None)
    assert not stays_at_zero(Mastered([parameter]))
    assert not stays_at_zero(torch.optim.AdamW([parameter], eps=0.0))
    assert not stays_at_zero(torch.optim.RMSprop([parameter], centered=True))


def test_on_cuda_the_kernel_takes_what_it_can_and_foreach_the_rest(monkeypatch):
    """The seam alone: the kernel has tests of its own."""
    seen = []

    class Kernel:
        class Zeroing:
            def __init__(self, masks) -> None:
                self.masks = masks

            def __call__(self, tensors) -> None:
                seen.append(len(tensors))
                if not all(tensor.is_contiguous() for tensor in tensors):
                    raise ValueError("in another order")
                for tensor, mask in zip(tensors, self.masks, strict=True):
                    tensor.masked_fill_(~mask, 0.0)

    monkeypatch.setattr(fused_masking, "_part", lambda masks: fused_masking._Fused(masks, Kernel))
    masks = [half(torch.empty(4, 4), i) for i in range(3)]
    tensors = [torch.ones(4, 4), torch.ones(4, 4).bfloat16(), torch.ones(4, 4)]
    zero = fused_masking.FusedMasking(masks, tensors)
    zero(tensors)
    assert sorted(seen) == [1, 2]
    transposed = [torch.ones(4, 4).as_strided((4, 4), (1, 4)), torch.ones(4, 4).bfloat16(), torch.ones(4, 4)]
    zero(transposed)
    for group in (tensors, transposed):
        assert all(torch.equal(tensor != 0, mask) for tensor, mask in zip(group, masks, strict=True))


def test_a_kernel_that_cannot_be_compiled_is_tried_once(caplog):
    tried = []

    class Kernel:
        class Zeroing:
            def __init__(self, masks) -> None:
                pass

            def __call__(self, tensors) -> None:
                tried.append(1)
                raise RuntimeError("Failed to find C compiler")

    mask, tensor = half(torch.empty(4, 4)), torch.ones(4, 4)
    zero = fused_masking._Fused([mask], Kernel)
    for _ in range(2):
        zero([tensor.fill_(1.0)])
        assert torch.equal(tensor != 0, mask)
    assert tried == [1]
    assert "without the fused kernel, which failed: Failed to find C compiler" in caplog.text


def test_without_triton_foreach_serves(monkeypatch):
    def fails(name: str):
        raise ImportError(name)

    fused_masking._kernel.cache_clear()
    monkeypatch.setattr(fused_masking.importlib, "import_module", fails)
    assert fused_masking._kernel() is None
    fused_masking._kernel.cache_clear()
    assert isinstance(fused_masking._part([torch.ones(2, dtype=torch.bool)]), fused_masking._Foreach)


def test_nothing_is_looked_up_while_masks_stay_the_same(monkeypatch):
    model = tiny_llama()
    run, keeper = keeper_of(model)
    run.masks[NAME] = half(model.get_parameter(NAME))
    keeper.on_step_begin(None, None, None)
    monkeypatch.setattr(mask_callback, "masked_parameter", lambda run, name: pytest.fail("looked up again"))
    keeper.on_step_end(None, None, None)
    keeper.on_pre_optimizer_step(None, None, None)
    keeper.on_optimizer_step(None, None, None)
    monkeypatch.undo()
    other = "model.layers.1.mlp.up_proj.weight"
    run.masks[other] = run.masks.pop(NAME)  # the same tensor under another name is another mask
    keeper.on_step_begin(None, None, None)
    assert stray_weights(run) == []


def test_masks_are_held_against_the_codes_of_layers_on_kernels(tmp_path):
    """Such a layer has no parameter ``weight``; what its codes decode to is zero where the mask is."""
    model = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1).to(torch.bfloat16)
    hf_optim.optimize(model, [{"technique": "nm"}, {"technique": "rtn", "bits": 4, "group_size": 32}])
    hf_optim.accelerate(model)
    run = hf_optim.run_of(model)
    assert "weight" not in model.get_submodule(NAME.rpartition(".")[0])._parameters
    assert stray_weights(run) == []
    model.save_pretrained(tmp_path / "out")
    back = type(model).from_pretrained(tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        back(ids)  # decompresses
    assert ((back.get_parameter(NAME) != 0) <= run.masks[NAME]).all()
    run.masks[NAME] = torch.zeros_like(run.masks[NAME])
    assert stray_weights(run) == [NAME]
    with pytest.raises(hf_optim.CheckpointError, match="where they were pruned"):
        model.save_pretrained(tmp_path / "other")

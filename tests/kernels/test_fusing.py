"""Norms that quantize for the W8A8 layers behind them, through ``accelerate``.

The tests of the Triton kernels run interpreted on a CPU, and on a CUDA device (see ``interpreting``).
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from interpreting import on_triton, relative
from tiny_models import tiny_bert, tiny_llama
from torch import nn

import hf_optim
from hf_optim import Kernel, optimize
from hf_optim.compressed.packed.fused_norm import QuantizingNorm
from hf_optim_kernels.w8a8 import layer, norm_fusion, tiles

LONG = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
NORM = "model.layers.0.input_layernorm"


@pytest.fixture(autouse=True)
def pays_from_eight_rows(monkeypatch):
    """Not from 65: the interpreter takes each row by itself."""
    importlib.import_module("hf_optim_kernels.w8a8.launch")  # takes the limit when it is first imported, and keeps it
    monkeypatch.setattr(tiles, "MOST_DECODE_ROWS", 7)


def supports_all(weight):
    return None


def bind_triton(weight):
    return layer.PackedWeight.of(weight)


def w8a8(model, device, **fields):
    step = {"technique": "zeroquant", **fields}
    model = optimize(model.requires_grad_(False), [step]).to(device)
    return hf_optim.accelerate(model, [Kernel("w8a8", supports=supports_all, prepack=bind_triton, join=layer.join)])


def fused_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantizingNorm)]


def run(model, ids=LONG):
    with torch.no_grad():
        return model(ids.to(next(model.parameters()).device)).logits


def unfused(model):
    """A copy whose norms are ordinary."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, QuantizingNorm):
            module.unfuse()
    return model


@on_triton
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_fused_codes_equal_unfused_ones_to_one_ulp_of_the_scale(dtype, symmetric, device):
    from hf_optim_kernels.w8a8 import quantize

    model = w8a8(tiny_llama().to(dtype), device, symmetric_activations=symmetric)
    norm, up = model.get_submodule(NORM), model.model.layers[0].self_attn.q_proj
    norm.weight.data.normal_(generator=torch.Generator(device).manual_seed(1))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    with torch.no_grad():
        y = norm(x)
        plain = norm._former.forward(norm, x)
        made = up.packed_weight.fused.handoff.take(y, 1)
    # What is quantized is what the norm gives out, exactly as a launch of its own would do it.
    assert all(torch.equal(a, b) for a, b in zip(made, quantize.quantize_rows(y, False, symmetric)[:3], strict=True))
    # The norm's own sums, in float32, may end in another order: at most one place of a shorter type.
    _, scale, _, _ = quantize.quantize_rows(plain, False, symmetric)
    ulp = torch.exp2(scale.log2().floor()) * (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert bool(((made[1] - scale).abs() <= ulp).all())
    assert relative(y, plain) < torch.finfo(dtype).eps
    with torch.no_grad():
        assert torch.equal(up(norm(x)), up(y.clone()))


@on_triton
def test_a_fused_model_computes_the_same(device, monkeypatch):
    model = w8a8(tiny_llama(), device)
    assert fused_norms(model) == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    taken = []
    real = norm_fusion.Handoff.take
    monkeypatch.setattr(norm_fusion.Handoff, "take", lambda *a: taken.append(real(*a)) or taken[-1])
    fused = run(model)
    assert sum(found is not None for found in taken) == 4  # joined q, k, v and joined gate, up of two blocks
    assert model.model.layers[0].self_attn.q_proj.packed_weight.fused.handoff.held is None
    # A value in the middle between two codes may go either way, and moves those of the next layer.
    apart, rounding = run(unfused(model)), run(tiny_llama().to(device))
    assert relative(fused, apart) < relative(apart, rounding) / 2
    # A few rows are quantized where they are multiplied.
    taken.clear()
    run(model, LONG[:, :5])
    assert not any(found is not None for found in taken)


@on_triton
def test_a_layer_norm_that_a_residual_sum_reads_too(device):
    model = w8a8(tiny_bert(), device)
    names = fused_norms(model)
    assert any("attention.output.LayerNorm" in name for name in names)
    norm = model.get_submodule(names[0])
    x = torch.randn(1, 9, norm.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        y = norm(x)
        assert norm._fused.handoff.held is not None
        assert relative(y, norm._former.forward(norm, x)) < 1e-6


@on_triton
def test_restore_and_moving_undo_it(device):
    dense = optimize(tiny_llama().requires_grad_(False), [{"technique": "zeroquant"}]).to(device)
    model = w8a8(tiny_llama(), device)
    assert fused_norms(copy.deepcopy(model)) == fused_norms(model)
    moved = copy.deepcopy(model).to(torch.float64)
    assert not fused_norms(moved)
    hf_optim.restore(model)
    assert not fused_norms(model)
    assert type(model.get_submodule(NORM)) is type(dense.get_submodule(NORM))
    assert torch.equal(run(model), run(dense))
    assert "_fused" not in vars(model.get_submodule(NORM))


@on_triton
def test_gradients_take_the_plain_way(device):
    model = w8a8(tiny_llama(), device)
    x = torch.randn(2, 5, 32, device=device, requires_grad=True)
    norm = model.get_submodule(NORM)
    y = norm(x)
    assert norm._fused.handoff.held is None
    y.sum().backward()
    assert x.grad is not None


@on_triton
def test_codes_of_a_tensor_that_was_written_to_are_not_taken(device):
    handoff = norm_fusion.Handoff(2)
    x = torch.randn(4, 8, device=device)
    parts = (torch.ones(4, 8), torch.ones(4), torch.empty(0))
    handoff.give(x, *parts)
    assert handoff.take(x.clone(), 1) is None
    assert handoff.take(x, 1) is not None
    assert handoff.take(x, 1) is None
    x += 1
    assert handoff.take(x, 2) is None
    handoff.give(x, *parts)
    assert copy.deepcopy(handoff).held is None
    assert handoff.take(x, 2) is not None
    assert handoff.take(x, 1) is not None
    assert handoff.held is None


class Shifted(nn.Module):
    """As Gemma's: the gain is one more than the weight."""

    def __init__(self, inner):
        super().__init__()
        self.weight, self.eps = inner.weight, inner.eps

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


def test_a_norm_is_known_by_what_it_computes():
    pytest.importorskip("triton")
    from hf_optim_kernels.w8a8.quantize import LAYER_NORM, RMS_NORM

    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        rms, ln = nn.RMSNorm(24, eps=1e-6).to(dtype), nn.LayerNorm(24, eps=1e-5).to(dtype)
        for norm in (rms, ln):
            norm.weight.data.normal_()
        assert norm_fusion.norm_kind(rms, 24, dtype, cpu) == (RMS_NORM, 1e-6)
        assert norm_fusion.norm_kind(ln, 24, dtype, cpu) == (LAYER_NORM, 1e-5)
        assert norm_fusion.norm_kind(Shifted(rms), 24, dtype, cpu) is None
        assert norm_fusion.norm_kind(rms, 24, torch.float16, cpu) is None
        assert norm_fusion.norm_kind(nn.BatchNorm1d(24).to(dtype).eval(), 24, dtype, cpu) is None
    wrong = nn.RMSNorm(24, eps=1e-6)
    wrong.variance_epsilon = 1e-5  # is not what it computes with
    assert norm_fusion.norm_kind(wrong, 24, torch.float32, cpu) is None

"""Feed-forward layers with a gate: which are recognized, by what they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_optim.generation.gated_layers import ACTIVATIONS, activation_of, on_one_row
from hf_optim_kernels.experts import naive

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


class Gated(nn.Module):
    """A gated layer whose gate and result a test may change."""

    def __init__(self, act=nn.SiLU, before=lambda x: x, behind=lambda x: x):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn, self.before, self.behind = act(), before, behind

    def forward(self, x):
        return self.down_proj(self.behind(self.act_fn(self.before(self.gate_proj(x))) * self.up_proj(x)))


def found(module, takes=lambda module: True):
    return activation_of(module, takes)


@pytest.mark.parametrize(
    ("module", "act"),
    [
        (LlamaMLP(LlamaConfig(**SIZES)), naive.SILU),
        (LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu", mlp_bias=True)), naive.GELU),
        (GemmaMLP(GemmaConfig(**SIZES)), naive.GELU_TANH),
        (Gated(nn.ReLU), naive.RELU),
        (Gated(lambda: lambda x: x.relu().square()), naive.RELU_SQUARED),
        (Gated(behind=nn.Dropout(0.5)).eval(), naive.SILU),
        (Gated(nn.Tanh), None),
        (Gated(behind=nn.Dropout(0.5)), None),
        (Gated(before=lambda x: x.clamp(max=7)), None),
        (Gated(behind=lambda x: 0.999999 * x), None),
        (Gated(behind=lambda x: x.cpu().numpy()), None),
        (nn.Sequential(nn.Linear(4, 4)), None),
    ],
)
def test_a_layer_is_known_by_what_it_computes(module, act):
    state = torch.get_rng_state()
    assert found(module) == act
    assert torch.equal(torch.get_rng_state(), state)


def test_activations_stand_in_the_order_of_the_kernels():
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for number, function in enumerate(ACTIVATIONS):
        torch.testing.assert_close(function(x), naive.activate(x, number))


def test_projections_that_differ_or_do_more_are_left():
    def changed(change):
        module = Gated()
        change(module)
        return found(module)

    assert found(Gated()) == naive.SILU
    assert found(Gated(), lambda module: module.out_features != 24) is None
    assert changed(lambda m: setattr(m, "gate_proj", nn.Linear(16, 1))) is None
    assert changed(lambda m: setattr(m, "gate_proj", nn.Linear(16, 24, bias=False))) is None
    assert changed(lambda m: m.up_proj.register_forward_pre_hook(print)) is None
    assert changed(lambda m: m.act_fn.register_forward_hook(print)) is None
    assert changed(lambda m: setattr(m, "act_fn", nn.PReLU())) is None
    assert changed(lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1)))) is None
    assert changed(lambda m: setattr(m, "forward", lambda x: x)) is None
    assert changed(lambda m: m.register_forward_hook(lambda *given: None)) == naive.SILU


def test_the_subclass_calls_the_kernel_for_one_row_and_its_parent_for_others():
    class Kernel:
        calls = 0

        @classmethod
        def dense_rows(cls, x, weights, biases, act):
            cls.calls += 1
            assert (act, len(biases)) == (0, 2)
            return [F.silu(F.linear(x, weights[0], biases[0])) * F.linear(x, weights[1], biases[1])]

    module = Gated()
    x = torch.randn(1, 1, 16)
    expected, kind = module(x), on_one_row(Gated, 0, Kernel)
    assert kind is on_one_row(Gated, 0, Kernel)
    module.__class__ = kind
    assert torch.equal(module(x), expected)
    torch.testing.assert_close(module(x.expand(3, 1, 16))[:1], expected)
    assert Kernel.calls == 1

"""Tokens that halt by the operator of a whole step: as in plain PyTorch, in fewer calls, and off by default."""

from __future__ import annotations

import sys

import pytest
import torch
from test_act import IDS, act, passage_of, unit_of
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from hf_optim_kernels.halting import op
from hf_optim_plugins.adaptive import _halting_kernel

RULES = [
    {"mix": "graves", "halted": "copied", "reads": "after"},
    {"mix": "t2t", "halted": "recomputed", "reads": "before"},
    {"mix": "t2t", "halted": "copied", "reads": "after"},
]


@pytest.fixture
def door(monkeypatch):
    """Open or shut the door of a model's code, which is that of its checkpoint; count the calls of the operator."""
    calls, own = [], op.halting_step
    monkeypatch.setattr(op, "halting_step", lambda *given: calls.append(given[0].shape) or own(*given))

    def set_to(model, devices):
        calls.clear()
        monkeypatch.setitem(vars(sys.modules[type(model).__module__]), "HALTING_KERNEL_DEVICES", devices)
        return calls

    return set_to


def read(model, mask):
    """Return the output, the cost and the steps of a training step, and all gradients."""
    model.zero_grad()
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    out = model.base_model(IDS, attention_mask=mask, **cached)[0]
    pondered = passage_of(model).pondered
    ((out * mask[..., None]).square().sum() + pondered.cost).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.detach() * mask[..., None], pondered.cost.detach(), *grads], pondered.steps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("build", "fields"), list(zip([tiny_llama, tiny_gpt2, tiny_bert], RULES, strict=True)))
def test_a_model_computes_the_same_by_the_operator(build, fields, training, door, monkeypatch):
    monkeypatch.setattr(op, "unsupported", lambda *given: None)  # the specification computes in float64, too
    model = act(build().double(), **fields).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    calls = door(model, ())
    expected, steps = read(model, mask)
    assert not calls
    calls = door(model, ("cpu",))
    found, taken = read(model, mask)
    assert len(calls) >= 3
    assert set(calls) == {(3, 9, unit_of(model).weight.numel())}
    assert torch.equal(taken, steps)
    assert len(steps.unique()) >= 3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def test_a_cpu_does_not_use_the_operator_by_default(door):
    assert _halting_kernel.HALTING_KERNEL_DEVICES == ("cuda",)
    model = act(tiny_llama())
    calls = door(model, vars(sys.modules[type(model).__module__])["HALTING_KERNEL_DEVICES"])
    with torch.no_grad():
        model(IDS)
    assert not calls


def test_what_the_kernel_does_not_compute_is_computed_in_plain_pytorch(door, monkeypatch):
    model = act(tiny_llama().double())
    calls = door(model, ("cpu",))
    with torch.no_grad():
        model(IDS)
        assert not calls  # float64
        model = act(tiny_llama())
        calls = door(model, ("cpu",))
        expected = model(IDS).logits
        assert calls
        calls.clear()
        monkeypatch.setitem(vars(sys.modules[type(model).__module__]), "_halting_kernels", [None])
        torch.testing.assert_close(model(IDS).logits, expected)
        assert not calls  # not installed


class Counted(TorchDispatchMode):
    """Names operators that compute: on a device, each is a launch."""

    VIEWS = ("view", "unsqueeze", "expand", "detach", "alias", "empty", "t.default", "_unsafe_view", "reshape")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_besides_its_block_is_one_call(door):
    model = act(tiny_llama())
    code = sys.modules[type(model).__module__]
    unit = unit_of(model).bfloat16()
    rule = code.Rule(5, 0.01, "graves", "copied", "after", 0.0)
    state = torch.randn(2, 3, unit.weight.numel()).bfloat16().requires_grad_()
    found = {}
    for devices in ((), ("cpu",)):
        door(model, devices)
        progress = code.Progress(state, None, rule)
        unit(state, progress, state, False)
        with Counted() as counted:
            unit(state, progress, state, False)
        forward = list(counted.names)
        with Counted() as counted:
            (progress.output.sum() + progress.total.sum()).backward()
        found[bool(devices)] = forward, counted.names
    plain, fused = found[False], found[True]
    assert fused[0] == ["hf_optim.halting_step.default"]
    assert len(plain[0]) > 20
    assert sum("halting_step_gradient" in name for name in fused[1]) == 2  # of two steps
    assert len(plain[1]) > 4 * len(fused[1])

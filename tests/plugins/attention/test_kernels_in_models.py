"""Models whose attention runs on the operators of kernels compute what they do in plain PyTorch.

Operators run their specifications on a CPU, here also in float64.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama

import hf_optim
from hf_optim_kernels.bucket_attention import op as chunks
from hf_optim_kernels.bucket_order import op as orders
from hf_optim_kernels.linear_attention import op as linear
from hf_optim_kernels.run_attention import op as runs

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
DOORS = "LSH_KERNEL_DEVICES", "CLUSTER_KERNEL_DEVICES", "SORTED_KERNEL_DEVICES", "LINEAR_KERNEL_DEVICES"
CASES = {
    "reformer": (tiny_llama, {"technique": "reformer", "chunk": 4, "rounds": 3, "buckets": [4]}),
    "reformer-paper": (
        tiny_gpt2,
        {"technique": "reformer", "chunk": 4, "rounds": 2, "buckets": [4], "scheme": "paper"},
    ),
    "reformer-encoder": (tiny_bert, {"technique": "reformer", "chunk": 4, "rounds": 2, "buckets": [4], "after": 1}),
    "routing": (tiny_llama, {"technique": "routing_transformer", "clusters": 3, "window": 5, "init": "first_batch"}),
    "routing-l2": (
        tiny_gpt2,
        {"technique": "routing_transformer", "clusters": 3, "window": 5, "init": "first_batch", "normalize": "l2"},
    ),
    "sinkhorn": (tiny_llama, {"technique": "sinkhorn", "block": 4}),
    "sinkhorn-cumulative": (tiny_gpt2, {"technique": "sinkhorn", "block": 4, "prefix": "cumulative"}),
    "sinkhorn-encoder": (tiny_bert, {"technique": "sinkhorn", "block": 4}),
    "performer": (tiny_llama, {"technique": "performer", "features": 16}),
    "rfa": (tiny_llama, {"technique": "rfa", "features": 16}),
    "rfa-gate": (tiny_llama, {"technique": "rfa", "features": 16, "gate": True}),
    "rfa-encoder": (tiny_bert, {"technique": "rfa", "features": 16}),
}
DECODERS = [name for name in CASES if "encoder" not in name]


@pytest.fixture
def doors(monkeypatch):
    """Open or shut the doors to the operators; count their calls."""
    calls = []

    def counted(module, name):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **more: calls.append(name) or own(*given, **more))

    for module in (chunks, runs, linear):
        monkeypatch.setattr(module, "unsupported", lambda *given: None)
    monkeypatch.setattr(orders, "unsupported", lambda *given: None)
    for module, name in ((chunks, "bucket_attention"), (runs, "run_attention"), (linear, "linear_attention")):
        counted(module, name)

    def set_to(devices):
        calls.clear()
        # A model runs the code that would be stored with it, which has the names of several modules.
        for module, name in itertools.product(list(sys.modules.values()), DOORS):
            if name in getattr(module, "__dict__", {}):
                monkeypatch.setitem(vars(module), name, devices)
        return calls

    return set_to


def converted(name):
    build, step = CASES[name]
    torch.manual_seed(0)
    model = hf_optim.optimize(build().double(), [step]).eval()
    with torch.no_grad():
        for place, part in model.named_parameters():
            if "sigma" in place or "gate_" in place:
                part.add_(0.2 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1), dtype=part.dtype))
    return model


def read(model, mask=None):
    """Return hidden states, and gradients of the parameters."""
    out = model.base_model(
        IDS, attention_mask=mask, **({} if model.config.model_type.endswith("bert") else {"use_cache": False})
    )[0]
    if mask is not None:
        out = out * mask[..., None]
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    model.zero_grad()
    (out * slope).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.many("name")
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_plain_pytorch(name, padding, doors):
    model, mask = converted(name), None
    if padding:
        mask = torch.ones_like(IDS)
        mask[1, slice(0, 7) if padding == "left" else slice(14, 24)] = 0
    doors(())
    plain, grads = read(model, mask)
    calls = doors(("cpu",))
    found, others = read(model, mask)
    assert calls or (padding and name == "sinkhorn-encoder")  # whose sorted places may be padding in part
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
    assert grads.keys() == others.keys()
    for place in grads:
        scale = grads[place].abs().max().clamp_min(1.0)
        torch.testing.assert_close(others[place] / scale, grads[place] / scale, rtol=0, atol=1e-9)


@pytest.mark.many("name")
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_plain_pytorch(name, doors):
    model = converted(name)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    doors(())
    plain = model.generate(IDS, **settings)
    calls = doors(("cpu",))
    assert torch.equal(model.generate(IDS, **settings), plain)
    assert calls

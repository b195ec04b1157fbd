"""The attention of a step on hf_optim's operator: on a CPU its specification, by the same path as the kernel."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from generating import FAMILIES, both, make, prompt
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache

import hf_optim
from hf_optim.generation import attention, capture, sessions
from hf_optim.toolkit.compat import CACHE

pytest.importorskip("triton")


@pytest.fixture
def calls(monkeypatch):
    """Let models attend through the operator on a CPU; return what it was given."""
    monkeypatch.setattr(attention, "_available", lambda model: type(model)._can_set_attn_implementation())
    attention._register()
    (real,) = attention._KERNEL
    seen = []

    class Operator:
        unsupported = staticmethod(real.unsupported)

        @staticmethod
        def mask_ranges(mask):
            seen.append("ranges")
            return real.mask_ranges(mask)

        @staticmethod
        def decode_attention(*args):
            seen.append(args)
            return real.decode_attention(*args)

    monkeypatch.setattr(attention, "_KERNEL", [Operator])
    return seen


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_models_get_the_tokens_of_transformers(name, calls):
    model = make(name)
    before = model.config._attn_implementation
    expected, found = both(model, prompt(model))
    assert torch.equal(expected, found)
    assert model.config._attn_implementation == before
    given = [each for each in calls if each != "ranges"]
    assert len(given) == 19 * model.config.get_text_config().num_hidden_layers
    # One set of ranges a step for each kind of mask, not for each layer.
    kinds = len(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    assert calls.count("ranges") == 19 * kinds


def test_a_compiled_step_computes_the_ranges_of_a_mask_once(calls):
    model, graphs = make("llama"), []

    def kept(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    hf_optim.generate(model, **prompt(model), max_new_tokens=4, mode="eager")
    session = next(iter(sessions._MODELS[model].values()))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_KERNEL", [__import__(attention.KERNEL, fromlist=["op"])])
        compiled = torch.compile(capture.call, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=kept))
        with torch.no_grad():
            session.forward(model, compiled)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert names.count("hf_optim.decode_attention.default") == 2
    assert names.count("aten.amin.default") == 1
    assert not attention._TRACED


def test_ranges_follow_a_mask_that_changes(calls):
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    assert attention.mask_ranges(mask).tolist() == [[[0, 6, 6]]]
    mask[..., :2] = False
    assert attention.mask_ranges(mask).tolist() == [[[2, 6, 4]]]
    assert calls == ["ranges", "ranges"]


@pytest.mark.parametrize("tokens", [2, 5, 16])
def test_a_few_new_tokens_over_a_dynamic_cache(tokens, calls):
    """As in speculation, and in a prefill in chunks."""
    model = make("llama")
    ids = prompt(model, rows=2, length=30)["input_ids"]
    outputs = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, : 30 - tokens], **{CACHE: cache})
            model.config._attn_implementation = name
            outputs.append(model(ids[:, 30 - tokens :], **{CACHE: cache}).logits)
    assert [each for each in calls if each != "ranges"]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_prompt_without_a_cache_is_causal(calls):
    model = make("llama")
    ids = prompt(model, rows=1, length=8)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        model.config._attn_implementation = attention.NAME
        found = model(ids).logits
    (mask, ranges), *_ = [each[3:5] for each in calls if each != "ranges"]
    assert mask is None
    assert ranges[0, :, 1].tolist() == list(range(1, 9))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{"softcap": 5.0}, {"s_aux": torch.tensor([2.0, 1.0, 3.0, 0.5])}])
def test_what_the_kernel_does_not_take_keeps_softcap_and_sinks(given):
    """More queries than it takes: PyTorch's attention has no softcap, and would leave sinks out without a word."""
    attention._register()
    try:
        torch.manual_seed(0)
        query, key, value = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
        mask = torch.rand(2, 1, 20, 30) < 0.7
        module = torch.nn.Module()
        found, _ = attention.decode_attention(module, query, key, value, mask, scaling=0.3, **given)
        k, v = (t.double().repeat_interleave(2, dim=1) for t in (key, value))
        scores = 0.3 * query.double() @ k.transpose(2, 3)
        if "softcap" in given:
            scores = 5.0 * torch.tanh(scores / 5.0)
        weights = scores.masked_fill(~mask, float("-inf")).exp()
        sink = given["s_aux"].double().exp()[None, :, None, None] if "s_aux" in given else 0.0
        expected = (weights / (weights.sum(dim=-1, keepdim=True) + sink)) @ v
        assert torch.allclose(found.double(), expected.transpose(1, 2), atol=1e-5)
    finally:
        attention._unregister()

"""Choices of experts in the graph of a compiled decoding step."""

from __future__ import annotations

import pytest
import tiny_mixtures
import torch
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from hf_optim.generation import choices, one_row
from hf_optim.generation.choices import choose_in_one_launch
from hf_optim.generation.graph_passes import compile_options


def graph_of(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)


def count(module, name):
    return sum(name in str(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("function", "shape", "replaced"),
    [
        (lambda x: x.topk(2), (3, 8), True),
        (lambda x: x.topk(2, dim=1), (3, 8), True),
        (lambda x: x.topk(2, dim=-1, sorted=False), (3, 8), True),
        (lambda x: x.topk(2, dim=0), (3, 8), False),
        (lambda x: x.topk(2, largest=False), (3, 8), False),
        (lambda x: x.topk(50), (1, 5000), False),
        (lambda x: x.topk(2), (2, 3, 8), False),
    ],
)
def test_topk_of_few_short_rows_is_replaced(function, shape, replaced):
    x = torch.randn(shape)
    module = graph_of(function, x)
    choose_in_one_launch(module.graph)
    module.recompile()
    assert count(module, "choose") == replaced
    assert count(module, "topk") == (not replaced)
    for own, right in zip(module(x), function(x), strict=True):
        assert torch.equal(own.sort().values, right.sort().values)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_routers_of_native_classes_choose_so_and_the_same(kind):
    model = tiny_mixtures.build(kind).eval()
    routers = [m for m in model.modules() if type(m).__name__.endswith(("Router", "Gate"))]
    if not routers:
        pytest.skip("its router is not a module")
    router = routers[0]
    hidden = torch.randn(2, router.weight.shape[1])
    with torch.no_grad():
        expected = router(hidden)
        tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
        call = lambda h, *given: torch.func.functional_call(router, dict(zip(tensors, given, strict=True)), h)  # noqa: E731
        module = graph_of(call, hidden, *tensors.values())
        choose_in_one_launch(module.graph)
        module.recompile()
        assert count(module, "choose") == 1
        for own, right in zip(module(hidden, *tensors.values()), expected, strict=True):
            assert torch.equal(own, right)


def test_without_any_pass_inductor_gets_no_options(monkeypatch):
    assert compile_options()
    monkeypatch.setattr(choices, "ENABLED", False)
    monkeypatch.setattr(one_row, "USED", frozenset())
    assert compile_options() == {}


def test_the_pass_is_known_to_the_cache_of_inductor(monkeypatch):
    monkeypatch.setattr(choices, "ENABLED", True)
    options = compile_options()
    assert options["post_grad_custom_pre_pass"].uuid() == compile_options()["post_grad_custom_pre_pass"].uuid()

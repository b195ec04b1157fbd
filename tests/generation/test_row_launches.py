"""Products of one row in the graph of a compiled step: what is joined, what is left, and that nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from hf_optim.generation import choices, one_row, row_launches
from hf_optim.generation.graph_passes import StepPasses, compile_options
from hf_optim.generation.row_launches import join_rows
from hf_optim_kernels.dense_row import op

ALL = frozenset(one_row.PARTS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(op, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(row_launches, "LEAST_NUMBERS", 1)


def linear(inputs, outputs, bias=False):
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight)
    if bias:  # a product and a sum in the graph of make_fx, else
        assert one_row.kernel() is op
        layer.__class__ = one_row.OneRowLinear
    return layer


class Norm(nn.Module):
    def __init__(self, size, epsilon=1e-2):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.randn(size)), epsilon

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


class Model(nn.Module):
    """Layers of a test, and what it computes with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.bfloat16().requires_grad_(False)

    def forward(self, x):
        return self.compute(self, x)


def counted(graph):
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    counts = Counter(name.split(".")[-2] for name in names if "." in name)
    return {name: counts[name] for name in ("mm", "addmm", "dense_row", "dense_rows", "add", "rsqrt") if counts[name]}


def joined(model, x, parts=ALL, runs_on=lambda device: True):
    """Return the operators of a model's graph after the pass; compare what it computes with the model."""
    tensors = dict(model.named_parameters())

    def call(x, *given):
        return torch.func.functional_call(model, dict(zip(tensors, given, strict=True)), x)

    module = make_fx(call, select_decomp_table(), tracing_mode="fake")(x, *tensors.values())
    module.graph.eliminate_dead_code()  # as before inductor's passes
    join_rows(module.graph, parts, op, runs_on)
    module.graph.lint()
    module.recompile()
    for node in module.graph.nodes:
        assert node.op == "output" or "val" in node.meta
    with torch.no_grad():
        found, expected = module(x, *tensors.values()), model(x)
    for own, right in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        assert own.shape == right.shape
        torch.testing.assert_close(own, right, rtol=2e-2, atol=2e-2)
    return counted(module.graph)


def row(size=16, rows=1):
    return torch.randn(1, rows, size, dtype=torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_the_same_row_are_one_launch(bias):
    def forward(m, x):
        flat = x.reshape(-1, 16)  # as a router reads it
        return m.q(x), m.k(x[:, -1:]) * 2, m.v(flat)

    model = Model(forward, q=linear(16, 24, bias), k=linear(16, 8, bias), v=linear(16, 8, bias))
    assert joined(model, row()) == {"dense_rows": 1}
    assert joined(model, row(), {"products"}) == {"dense_row": 3}


def test_more_than_a_launch_has_are_two_and_the_rest_stays_alone():
    model = Model(
        lambda m, x: tuple(layer(x) for layer in m.layers),
        layers=nn.ModuleList([*(linear(16, 8) for _ in range(4)), linear(16, 8, bias=True)]),
    )
    assert joined(model, row()) == {"dense_rows": 1, "dense_row": 2}


def test_other_rows_of_the_same_size_are_not_joined():
    model = Model(lambda m, x: (m.q(x), m.k(x * 2), m.v(x.flip(-1))), q=linear(16, 8), k=linear(16, 8), v=linear(16, 8))
    assert joined(model, row()) == {"dense_row": 3}


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Model(lambda m, x: m.q(x), q=linear(16, 8)), row(rows=2)),
        (Model(lambda m, x: x @ m.q.weight, q=linear(16, 16)), row()),
        (Model(lambda m, x: nn.functional.linear(x, m.q.weight * 2), q=linear(16, 8)), row()),
        (Model(lambda m, x: m.q(x), q=linear(12, 8)), row(12)),
        (Model(lambda m, x: nn.functional.linear(x.float(), m.q.weight.float()), q=linear(16, 8)), row()),
    ],
    ids=["two rows", "not transposed", "a changed weight", "12 channels", "float32"],
)
def test_other_products_are_left(model, x):
    assert joined(model, x) == {"mm": 1}


def test_small_products_and_other_devices_are_left(monkeypatch):
    model = Model(lambda m, x: m.q(x), q=linear(16, 8))
    assert joined(model, row(), runs_on=lambda device: False) == {"mm": 1}
    monkeypatch.setattr(row_launches, "LEAST_NUMBERS", 129)
    assert joined(model, row()) == {"mm": 1}


def test_a_block_is_four_launches(monkeypatch):
    """Queries, keys and values; output; gate and values; down. The head is one more; sums and norms are not theirs."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = linear(16, 32), linear(16, 32), linear(32, 16)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(m, x):
        y = m.first(x)
        x = x + m.o(torch.tanh(m.q(y) + m.k(y) * m.v(y)))
        return m.head(m.third(x + m.mlp(m.second(x)))[:, -1:])

    monkeypatch.setattr(one_row, "runs_on", lambda device: True)
    monkeypatch.setattr(one_row, "USED", ALL)
    torch.manual_seed(0)
    layers = {name: linear(16, 16) for name in "qkvo"} | {"mlp": Gated(), "head": linear(16, 40)}
    model = Model(forward, **layers, first=Norm(16), second=Norm(16), third=Norm(16))
    model.device = torch.device("cpu")
    found = []

    def compiler(module, inputs):
        (passes,) = compile_options().values()
        passes(module.graph)
        module.recompile()
        found.append(counted(module.graph))
        return make_boxed_func(module.forward)

    x = row()
    expected = model(x)
    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    with torch.no_grad(), one_row.one_row(model, 1):
        own = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)(x)
    # The sum of the block's middle, two with the residual stream, and one of each norm.
    assert found == [{"dense_row": 3, "dense_rows": 2, "add": 6, "rsqrt": 3}]
    assert float((own.double() - expected.double()).norm() / expected.double().norm()) < 2**-7


def test_inductor_s_cache_tells_the_parts_apart(monkeypatch):
    monkeypatch.setattr(choices, "ENABLED", False)
    found = set()
    for parts in ({"products"}, {"products", "joined"}, ALL):
        monkeypatch.setattr(one_row, "USED", frozenset(parts))
        assert StepPasses().uuid() == StepPasses().uuid()
        found.add(StepPasses().uuid())
    assert len(found) == 3
    monkeypatch.setattr(one_row, "USED", ALL - {"products"})
    assert compile_options() == {}

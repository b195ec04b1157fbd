"""Dense layers of a captured step of one row on the kernel: which layers, when, and what is left behind."""

from __future__ import annotations

import pytest
import torch
from generating import make, prompt
from simulated_graphs import simulated_graphs
from torch import nn

import hf_optim
from hf_optim.generation import one_row as rows
from hf_optim_kernels.dense_row import op


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def there(monkeypatch):
    """Make the CPU a device of the kernel, which its specification stands in for, and every layer large enough."""
    monkeypatch.setattr(rows, "USED", frozenset(["products"]))
    monkeypatch.setattr(rows, "runs_on", lambda device: True)
    monkeypatch.setattr(op, "LEAST_NUMBERS", 1)


@pytest.fixture
def model():
    class Model(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8, bias=False)
            self.own, self.wide = Doubled(8, 8), nn.Linear(8, 8, dtype=torch.float32)

        def forward(self, x):
            return self.wide(self.own(self.down(self.up(x))).float())

    torch.manual_seed(0)
    made = Model().half().requires_grad_(False)
    made.wide.float()
    return made


def test_plain_layers_run_on_the_kernel_and_are_themselves_again(model, there):
    x = torch.randn(1, 1, 16).half()
    expected = model(x)
    with rows.one_row(model, 1):
        kinds = [type(layer) for layer in (model.up, model.down, model.own, model.wide)]
        found = model(x)
        several = model(x.expand(3, 1, 16))
    assert kinds == [rows.OneRowLinear, rows.OneRowLinear, Doubled, nn.Linear]
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(several[2:], expected, rtol=5e-3, atol=5e-3)
    assert [type(layer) for layer in (model.up, model.down)] == [nn.Linear, nn.Linear]


def test_the_kernel_is_called_for_one_row_alone(model, there, monkeypatch):
    called = []
    real = op.dense_row
    monkeypatch.setattr(op, "dense_row", lambda *given: (called.append(given[0].shape), real(*given))[1])
    with rows.one_row(model, 1):
        model(torch.randn(1, 1, 16).half())
        model(torch.randn(2, 1, 16).half())
    assert called == [(1, 1, 16), (1, 1, 32)]


def test_an_error_inside_leaves_no_layer_changed(model, there):
    with pytest.raises(RuntimeError, match="mine"), rows.one_row(model, 1):
        raise RuntimeError("mine")
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("count", [2, 8])
def test_steps_of_more_rows_are_the_library_s(model, there, count):
    with rows.one_row(model, count):
        assert type(model.up) is nn.Linear


def test_steps_of_one_row_alone_take_it_and_none_when_it_is_off(model, there, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(rows, "runs_on", lambda device: True)
    monkeypatch.setattr(op, "LEAST_NUMBERS", 1)
    with rows.one_row(model, 1):
        assert type(model.up) is rows.OneRowLinear
    with rows.one_row(model, 2):
        assert type(model.up) is nn.Linear
    monkeypatch.setattr(rows, "USED", frozenset())
    with rows.one_row(model, 1):
        assert type(model.up) is nn.Linear


def test_a_device_that_it_was_not_written_for_keeps_the_library(model, monkeypatch):
    monkeypatch.setattr(rows, "USED", frozenset(["products"]))
    monkeypatch.setattr(op, "LEAST_NUMBERS", 1)
    with rows.one_row(model, 1):
        assert type(model.up) is nn.Linear
    assert not rows.runs_on(torch.device("cpu"))


def test_a_forward_of_its_own_and_a_weight_of_another_class_are_left(model, there):
    class Packed(torch.Tensor):
        pass

    model.up.forward = lambda x: nn.Linear.forward(model.up, x)
    model.down.weight = nn.Parameter(model.down.weight.as_subclass(Packed), requires_grad=False)
    with rows.one_row(model, 1):
        assert [type(layer) for layer in (model.up, model.down)] == [nn.Linear, nn.Linear]


def test_hooks_of_layers_run_in_it(model, there):
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with rows.one_row(model, 1):
        model(torch.randn(1, 1, 16).half())
    assert seen == [(1, 1, 32)]


def test_a_gated_layer_is_one_launch_and_itself_again(there, monkeypatch):
    monkeypatch.setattr(rows, "USED", frozenset(["products", "gates"]))
    called = []
    real = op.dense_rows
    monkeypatch.setattr(op, "dense_rows", lambda *given: (called.append(len(given[1])), real(*given))[1])

    class Gated(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(1)
    model = Gated().half().requires_grad_(False)
    x = torch.randn(1, 1, 16).half()
    expected = model(x)
    with rows.one_row(model, 1):
        found, several = model(x), model(x.expand(2, 1, 16))
        assert isinstance(model, Gated)
    assert type(model) is Gated
    assert type(model.up_proj) is nn.Linear
    assert called == [2]
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(several[1:], expected, rtol=5e-3, atol=5e-3)


def test_a_step_with_it_is_compiled_as_one_graph(model, there):
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.randn(1, 1, 16).half()
    expected = model(x)
    with rows.one_row(model, 1):
        found = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    assert len(graphs) == 1
    assert sum("dense_row" in name for name in graphs[0]) == 2


def test_tokens_of_captured_steps_are_those_of_transformers(there, monkeypatch):
    monkeypatch.setattr(rows, "USED", frozenset(rows.PARTS))
    monkeypatch.setattr(op, "DTYPES", (torch.float32,))
    called = []
    for name in ("dense_row", "dense_rows"):
        real = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *given, real=real, name=name: (called.append(name), real(*given))[1])
    model = make("qwen3")
    inputs = prompt(model, 1)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    with simulated_graphs():
        found = hf_optim.generate(model, **inputs, max_new_tokens=12, do_sample=False, mode="captured")
    assert torch.equal(found, expected)
    # In each of two blocks: q, k, v, o, down beside the gate and its values; and the head.
    assert called.count("dense_row") * 2 == called.count("dense_rows") * 11 > 0

"""Observers: their statistics, shared inputs, non-finite inputs, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_optim.errors import NumericalError
from hf_optim.toolkit.statistics import ChannelAbsMax, SecondMoment, TensorMinMax


def layer(width: int = 6, out: int = 4) -> nn.Linear:
    return nn.Linear(width, out)


def batches(count: int = 3, width: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 5, width, generator=torch.Generator().manual_seed(0)))


def hooks(*modules: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in modules)


def test_channel_abs_max():
    a = layer()
    with ChannelAbsMax({"a": a}) as found:
        for batch in batches():
            a(batch)
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.cat(batches()).flatten(0, 1).abs().amax(0))
    assert hooks(a) == 0


def test_tensor_min_max():
    a = layer()
    with TensorMinMax({"a": a}) as found:
        for batch in batches():
            a(input=batch)
    low, high = found["a"]
    assert (low.shape, high.shape) == ((1,), (1,))
    assert (low.item(), high.item()) == (torch.cat(batches()).min().item(), torch.cat(batches()).max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_moment(dtype):
    a = layer()
    with SecondMoment({"a": a}, dtype=dtype) as found:
        for batch in batches():
            a(batch)
    rows = torch.cat(batches()).reshape(-1, 6).to(dtype)
    assert found["a"].total.dtype == dtype
    assert found["a"].count == 30
    torch.testing.assert_close(found["a"].total, rows.T @ rows)
    torch.testing.assert_close(found["a"].mean, rows.T @ rows / 30)


def test_low_precision_inputs_are_summed_in_the_given_dtype():
    a = layer().bfloat16()
    ones = torch.ones(1, 600, 6, dtype=torch.bfloat16)
    with SecondMoment({"a": a}) as found:
        a(ones)
    assert found["a"].total[0, 0].item() == 600  # bfloat16 has no 601


def test_layers_that_read_one_tensor_share_their_gram_matrix():
    q, k, o = layer(), layer(), layer()
    with SecondMoment({"o": o, "k": k, "q": q}) as found:
        for batch in batches():
            q(batch)
            k(batch)
            o(batch + 1)
    assert found["q"] is found["k"]
    assert found["q"].names == ["q", "k"]
    assert found["q"].count == 30
    assert found["o"] is not found["q"]
    assert list(found) == ["q", "k", "o"]  # in order of execution
    rows = torch.cat(batches()).reshape(-1, 6)
    torch.testing.assert_close(found["k"].total, rows.T @ rows)


def test_equal_values_in_another_tensor_are_not_shared():
    q, k = layer(), layer()
    with SecondMoment({"q": q, "k": k}) as found:
        q(batches()[0])
        k(batches()[0].clone())
    assert found["q"] is not found["k"]


def test_a_tensor_changed_in_place_is_another_input():
    q, k = layer(), layer()
    x = batches()[0]
    with SecondMoment({"q": q, "k": k}) as found, torch.no_grad():
        q(x)
        x.add_(1.0)
        k(x)
    torch.testing.assert_close(found["k"].total, x.reshape(-1, 6).T @ x.reshape(-1, 6))
    assert not torch.allclose(found["q"].total, found["k"].total)


@pytest.mark.parametrize("schedule", ["part", "join", "late", "alone"])
def test_changing_sets_of_readers_are_summed_correctly(schedule):
    """The sum of each module is that of the inputs it read, whichever modules read them too."""
    q, k = layer(), layer()
    read: dict[str, list[torch.Tensor]] = {"q": [], "k": []}

    def call(name: str, x: torch.Tensor) -> None:
        read[name].append(x)
        {"q": q, "k": k}[name](x)

    with SecondMoment({"q": q, "k": k}) as found:
        for i, x in enumerate(batches(4)):
            together = {"part": i < 2, "join": i >= 2, "late": i % 2 == 0, "alone": False}[schedule]
            call("q", x)
            if together:
                call("k", x)
            elif schedule != "late":
                call("k", x * 2)
    for name, inputs in read.items():
        rows = torch.cat(inputs).reshape(-1, 6)
        torch.testing.assert_close(found[name].total, rows.T @ rows)
        assert found[name].count == len(rows)


@pytest.mark.parametrize("observer", [ChannelAbsMax, TensorMinMax, SecondMoment])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_raise_with_the_module_name_and_hooks_are_removed(observer, bad):
    a, b = layer(), layer()
    x = batches()[0]
    x[0, 0, 0] = bad

    def observe():
        with observer({"blocks.0.a": a, "blocks.1.b": b}, "step 2 (gptq)"):
            a(batches()[0])
            b(x)

    with pytest.raises(NumericalError, match=r"step 2 \(gptq\): the input of blocks.1.b "):
        observe()
    assert hooks(a, b) == 0


@pytest.mark.parametrize("observer", [ChannelAbsMax, TensorMinMax, SecondMoment])
def test_a_module_that_is_not_reached_has_no_entry(observer):
    a, b = layer(), layer()
    with observer({"a": a, "b": b}) as found:
        a(batches()[0])
        b(torch.empty(0, 6))
    assert list(found) == ["a"]


def test_observing_keeps_no_graph_and_no_input():
    a = layer()
    x = batches()[0].requires_grad_()
    observer = SecondMoment({"a": a})
    with observer as found:
        a(x)
    assert not found["a"].total.requires_grad
    assert observer._current is None

"""Reversible blocks against the same formula with stored activations, and the memory that they save."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_optim.toolkit.modules import Streams, recall, reversible_step

WIDTH = 8


class Branch(nn.Module):
    """A small non-linear function with dropout, that counts its calls."""

    def __init__(self, seed, rate=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(WIDTH, 16).double(), nn.Linear(16, WIDTH).double()
        self.rate, self.calls = rate, 0

    def forward(self, x):
        self.calls += 1
        return self.second(functional.dropout(self.first(x).tanh(), self.rate, self.training))


def steps(depth, rate=0.0):
    return [(Branch(2 * i, rate), Branch(2 * i + 1, rate)) for i in range(depth)]


def reversible(x, pairs, random=False):
    streams = Streams.of(x)
    for f, g in pairs:
        streams = reversible_step(streams, f, g, [*f.parameters()], [*g.parameters()], random)
    return streams.mean()


def stored(x, pairs):
    first = second = x
    for f, g in pairs:
        first = first + f(second)
        second = second + g(first)
    return (first + second) / 2


def gradients(function, pairs, x, **more):
    x = x.detach().requires_grad_()
    weights = [p for pair in pairs for part in pair for p in part.parameters()]
    torch.manual_seed(4)
    out = function(x, pairs, **more)
    return out, torch.autograd.grad(out.square().sum(), [x, *weights])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_stored_activations(rate):
    x, pairs = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double(), steps(4, rate)
    out, found = gradients(reversible, pairs, x, random=True)
    after = torch.rand(1)
    expected, wanted = gradients(stored, pairs, x)
    assert torch.equal(out, expected)
    assert torch.equal(torch.rand(1), after)  # the backward leaves the generator where it was
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def live_bytes():
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, nn.Parameter) and not each.is_meta:  # others may have no memory
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("function", [reversible, stored])
def test_memory_of_activations_does_not_grow_with_depth(function):
    x, sizes, held = torch.randn(64, 64, WIDTH).double().requires_grad_(), [], []
    for depth in (2, 12):
        pairs, saved = steps(depth), {}
        weights = {p.data_ptr() for pair in pairs for part in pair for p in part.parameters()}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        before = live_bytes()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x, pairs)
        sizes.append(sum(saved.values()))
        held.append(live_bytes() - before)
        del out
    if function is stored:
        assert sizes[1] > 5 * sizes[0]  # the hooks do see activations
    else:
        assert sizes[0] == sizes[1] == 0  # nothing by autograd
        assert held[0] == held[1] <= 3 * x.nbytes  # both streams at the end, and their mean


def test_branches_are_computed_once_more_in_the_backward_and_not_without_gradient():
    x, pairs = torch.randn(4, WIDTH).double(), steps(3)
    with torch.no_grad():
        reversible(x, pairs)
    assert {part.calls for pair in pairs for part in pair} == {1}
    reversible(x.requires_grad_(), pairs).sum().backward()
    assert {part.calls for pair in pairs for part in pair} == {3}


def test_frozen_weights_and_inputs_get_no_gradient():
    x, pairs = torch.randn(4, WIDTH).double(), steps(2)
    pairs[0][0].first.weight.requires_grad_(False)
    reversible(x, pairs).sum().backward()
    assert pairs[0][0].first.weight.grad is None
    assert pairs[0][0].second.weight.grad is not None


def test_what_is_recalled_is_that_of_the_first_time():
    x, made, later = torch.randn(4, WIDTH).double().requires_grad_(), [], []

    def f(y):
        drawn = recall(lambda: made.append(torch.rand(4, 1)) or made[-1])
        later.append(torch.rand(4, 1))
        return y * drawn * recall(lambda: 2.0) * later[-1]

    out = reversible_step(Streams.of(x), f, torch.sin, random=True).mean()
    (found,) = torch.autograd.grad(out.sum(), x)
    assert len(made) == 1
    assert torch.equal(*later)  # numbers that are drawn behind it are the same, too
    other = x.detach().requires_grad_()
    first = other + 2 * other * made[0] * later[0]
    (wanted,) = torch.autograd.grad(((first + other + first.sin()) / 2).sum(), other)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert recall(lambda: 5) == 5  # outside of a step


def test_a_branch_without_gradient_adds_none():
    x = torch.randn(4, WIDTH).double().requires_grad_()
    out = reversible_step(Streams.of(x), lambda y: y.round().detach(), torch.sin).mean()
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, (2 + (x + x.round()).cos()) / 2, rtol=0, atol=1e-12)


def test_a_second_backward_and_a_loss_from_the_middle_are_errors():
    x, pairs = torch.randn(4, WIDTH).double().requires_grad_(), steps(3)
    out = reversible(x, pairs)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="begins at the last of them and runs once"):
        out.sum().backward()
    streams = reversible_step(Streams.of(x), *pairs[0])
    reversible_step(streams, *pairs[1])
    with pytest.raises(RuntimeError, match="begins at the last of them"):
        streams.mean().sum().backward()


def test_dtypes_of_autocast_are_those_of_the_forward():
    x, seen = torch.randn(4, WIDTH).requires_grad_(), []
    layer = nn.Linear(WIDTH, WIDTH)

    def f(y):
        seen.append(layer(y).dtype)
        return layer(y)

    with torch.autocast("cpu", torch.bfloat16):
        out = reversible_step(Streams.of(x), f, f, [*layer.parameters()], [*layer.parameters()]).mean()
    out.sum().backward()
    assert seen == [torch.bfloat16] * 4
    assert x.grad.dtype == torch.float32

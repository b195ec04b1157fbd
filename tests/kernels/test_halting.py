"""hf_optim::halting_step: the specification against Graves' sums, and the kernels and gradients against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from interpreting import BOUND, CUDA, EVERYWHERE, INTERPRETER, on_triton, relative

from hf_optim_kernels.halting import naive, op
from hf_optim_kernels.halting.naive import Accumulators

EPSILON = 0.01
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens that are not a multiple of a tile, channels that are not a power of two, one token, and no more than one tile.
SHAPES = [((7, 5), 24), ((67,), 96), ((1,), 64), ((3,), 1000)]


def accumulators(tokens, channels, device="cpu", dtype=torch.float32, valid=None):
    zeros = torch.zeros(tokens, dtype=dtype, device=device)
    running = torch.ones(tokens, dtype=torch.bool, device=device) if valid is None else valid
    return Accumulators(zeros, zeros, zeros.long(), running, zeros.new_zeros(*tokens, channels))


def midway(tokens, channels, device="cpu", seed=0):
    """Accumulators behind some steps: tokens that run, that have halted, and padding."""
    g = torch.Generator().manual_seed(seed)
    running = torch.rand(tokens, generator=g) < 0.7
    total = torch.rand(tokens, generator=g) * 0.9
    steps = torch.randint(0, 4, tokens, generator=g)
    rest = torch.where(running, torch.zeros(tokens), 1 - total)
    output = torch.randn(*tokens, channels, generator=g)
    return Accumulators(*(part.to(device) for part in (total, rest, steps, running, output)))


def drawn(tokens, channels, dtype, device="cpu", apart=False, seed=1):
    """States, what the unit reads, its weight and its bias; logits vary by about 1."""
    g = torch.Generator().manual_seed(seed)
    state, read = (torch.randn(*tokens, channels, generator=g) for _ in range(2))
    weight, bias = torch.randn(channels, generator=g) / channels**0.5, torch.tensor(0.25)
    parts = [state, read if apart else None, weight, bias]
    return [None if part is None else part.to(device, dtype) for part in parts]


def wide(parts):
    return [part.double() if part is not None and part.is_floating_point() else part for part in parts]


def floating(*parts):
    return [part.requires_grad_() for part in parts if part is not None and part.is_floating_point()]


def run(function, given, before, epsilon=EPSILON, last=False, blend=False):
    found = function(*given, *before, epsilon, last, blend)
    return Accumulators(*found[:5]), found[5]


def specified(*args):
    after, p = naive.halting_step(*args[:4], Accumulators(*args[4:9]), *args[9:])
    return (*after, p)


# -- the specification ------------------------------------------------------------------------------------------------
def graves(logits, states, epsilon):
    """Return y, N and R of a token, number by number."""
    total, y = 0.0, 0.0
    for n, (z, s) in enumerate(zip(logits, states, strict=True), 1):
        p = 1 / (1 + math.exp(-z))
        if total + p >= 1 - epsilon or n == len(logits):
            return y + (1 - total) * s, n, 1 - total
        total, y = total + p, y + p * s
    raise AssertionError


@pytest.mark.parametrize("device", EVERYWHERE)
def test_steps_make_the_sum_of_graves(device):
    g = torch.Generator().manual_seed(0)
    logits, states = torch.randn(6, 40, generator=g) * 1.5 - 1, torch.randn(6, 40, generator=g)
    state = accumulators((40,), 2, device)
    one = [torch.tensor([1.0, 0.0], device=device), torch.zeros((), device=device)]
    for n in range(6):  # the unit reads a logit, and the second channel is what is mixed
        given = torch.stack([logits[n], states[n]], 1).to(device)
        state, _ = run(op.halting_step, (given, None, *one), state, last=n == 5)
    rows = [graves(logits[:, t].tolist(), states[:, t].tolist(), EPSILON) for t in range(40)]
    y, steps, rest = (torch.tensor(part) for part in zip(*rows, strict=True))
    torch.testing.assert_close(state.output[:, 1].cpu(), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.remainder.cpu(), rest, rtol=0, atol=1e-5)
    assert torch.equal(state.steps.cpu(), steps)
    assert len(steps.unique()) == 5 or len(steps.unique()) == 6
    assert not state.running.any()


@pytest.mark.parametrize(("last", "blend", "apart"), list(itertools.product([False, True], repeat=3)))
def test_the_gradient_is_that_of_autograd(last, blend, apart):
    given, before = wide(drawn((6, 5), 8, torch.float32, apart=apart)), Accumulators(*wide(midway((6, 5), 8)))
    leaves = floating(*given, *before)
    g = torch.Generator().manual_seed(2)
    ups = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 5), (6, 5), (6, 5, 8))]
    for chosen in ((0, 1, 2), (2,), (1,), (0, 1)):  # some results are not used
        found = []
        for function in (op.halting_step, specified):
            after, _ = run(function, given, before, last=last, blend=blend)
            results = [(after.total, after.remainder, after.output)[i] for i in chosen]
            loss = sum((result * ups[i]).sum() for result, i in zip(results, chosen, strict=True))
            found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for mine, other, leaf in zip(*found, leaves, strict=True):
            mine, other = (torch.zeros_like(leaf) if part is None else part for part in (mine, other))
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# -- the kernels ------------------------------------------------------------------------------------------------------
@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("last", "blend", "apart"), [(False, False, False), (True, True, True), (False, True, False)])
def test_the_kernel_equals_the_specification_in_float64(last, blend, apart, dtype, device):
    for tokens, channels in SHAPES:
        given, before = drawn(tokens, channels, dtype, device, apart), midway(tokens, channels, device)
        after, p = run(op.halting_step, given, before, last=last, blend=blend)
        exact, q = run(specified, wide(given), Accumulators(*wide(before)), last=last, blend=blend)
        for found, wanted in zip((*after, p), (*exact, q), strict=True):
            assert found.shape == wanted.shape
            if found.dtype in (torch.bool, torch.int64):
                assert torch.equal(found, wanted)
        ran = before.running
        torch.testing.assert_close(p[ran].double(), q[ran], rtol=0, atol=2e-6)  # others are not computed
        for found, wanted in zip(after, exact, strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-5)
        for found, held in zip(after, before, strict=True):  # of tokens that do not run, to the bit
            assert torch.equal(found[~ran], held[~ran])


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("last", "blend", "apart"), [(False, False, False), (True, True, True), (False, True, False)])
def test_the_gradient_of_the_kernel_equals_that_of_autograd_in_float64(last, blend, apart, dtype, device):
    for tokens, channels in SHAPES:
        grads = []
        g = torch.Generator().manual_seed(5)
        ups = [torch.randn(shape, generator=g).to(device) for shape in (tokens, tokens, (*tokens, channels))]
        for exact in (False, True):
            given, before = drawn(tokens, channels, dtype, device, apart), midway(tokens, channels, device)
            given, before = (wide(given), wide(before)) if exact else (given, before)
            leaves = floating(*given, *before)
            function = specified if exact else op.halting_step
            after, _ = run(function, given, Accumulators(*before), last=last, blend=blend)
            results = (after.total, after.remainder, after.output)
            loss = sum((result * up).sum() for result, up in zip(results, ups, strict=True))
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            pairs = zip(found, leaves, strict=True)
            grads.append([torch.zeros_like(leaf) if part is None else part for part, leaf in pairs])
        for mine, other in zip(*grads, strict=True):
            assert mine.shape == other.shape
            assert (mine.double() - other).norm() <= 4 * BOUND[mine.dtype] * other.norm() + 1e-6


@on_triton
def test_limits(device):
    """A first step with p = 1 halts, p = 0 goes on to the last step, and exactly 1 - epsilon is enough."""
    tokens, channels = (9,), 40
    state, _, weight, _ = drawn(tokens, channels, torch.bfloat16, device)
    weight = torch.zeros_like(weight)
    begin = accumulators(tokens, channels, device)
    after, _ = run(op.halting_step, (state, None, weight, weight.new_tensor(math.inf)), begin)
    assert not after.running.any()
    assert torch.equal(after.output, state.float())
    assert (after.remainder == 1).all()
    assert (after.steps == 1).all()
    never = (state, None, weight, weight.new_tensor(-math.inf))
    after = begin
    for n in range(4):
        after, _ = run(op.halting_step, never, after, last=n == 3)
        assert bool(after.running.all()) == (n < 3)
        assert bool(after.output.any()) == (n == 3)
    assert torch.equal(after.output, state.float())
    assert (after.steps == 4).all()
    assert (after.remainder == 1).all()
    half = (state, None, weight, weight.new_zeros(()))  # p = 0.5
    quarter = begin._replace(total=begin.total + 0.25)
    assert not run(op.halting_step, half, quarter, epsilon=0.25)[0].running.any()
    below = begin._replace(total=begin.total + 0.25 - 2**-20)
    after, _ = run(op.halting_step, half, below, epsilon=0.25)
    assert after.running.all()
    assert torch.equal(after.total, below.total + 0.5)


@on_triton
def test_states_of_tokens_that_do_not_run_are_not_read(device):
    tokens, channels = (33,), 48
    given, before = drawn(tokens, channels, torch.float32, device), midway(tokens, channels, device)
    given[0][~before.running] = math.nan
    leaves = floating(*given)
    after, _ = run(op.halting_step, given, before)
    assert torch.equal(after.output[~before.running], before.output[~before.running])
    of_state, *others = torch.autograd.grad(after.output.sum() + after.remainder.sum(), leaves)
    assert not of_state[~before.running].any()
    assert all(bool(part.isfinite().all()) for part in (of_state, *others))


@on_triton
def test_equal_calls_give_equal_bits_whatever_the_programs(device, monkeypatch):
    from hf_optim_kernels.halting import launch

    tokens, channels = (70,), 96
    given, before = drawn(tokens, channels, torch.bfloat16, device), midway(tokens, channels, device)
    after, p = launch.halting_step(*given, before, EPSILON, False, False)
    about = (*given, before.total, before.running, None, after.running, p, (after.total, before.total, before.output))
    first, second = launch.gradient(*about), launch.gradient(*about)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    monkeypatch.setattr(launch, "PROGRAMS", 2)  # each has several tiles
    third, exact = launch.gradient(*about), naive.gradient(*about)
    for found in (first, third):
        for mine, other in zip(found, exact, strict=True):
            assert mine.shape == other.shape
            assert not mine.numel() or relative(mine, other) < 4 * BOUND[mine.dtype]


@on_triton
def test_no_tokens_and_views(device):
    given, before = drawn((0,), 24, torch.float32, device), midway((0,), 24, device)
    leaves = floating(*given)
    after, _ = run(op.halting_step, given, before)
    assert after.output.shape == (0, 24)
    assert not torch.autograd.grad(after.output.sum(), leaves)[1].any()
    given, before = drawn((6, 5), 24, torch.float32, device), midway((6, 5), 24, device)
    turned = [given[0].transpose(0, 1).contiguous().transpose(0, 1), *given[1:]]
    pairs = zip(*(run(op.halting_step, each, before)[0] for each in (turned, given)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


# -- the operator -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", CUDA, INTERPRETER])
@pytest.mark.parametrize("blend", [False, True])
def test_the_operator_is_one(blend, device):
    given, before = drawn((3, 5), 16, torch.float32, device, apart=blend), midway((3, 5), 16, device)
    floating(*given, *before)
    torch.library.opcheck(op.halting_step, (*given, *before, EPSILON, False, blend))


def test_what_does_not_fit_is_refused():
    given, before = drawn((6,), 16, torch.float32), midway((6,), 16)
    for change in ({"total": before.total[:5]}, {"output": before.output[:, :8]}):
        with pytest.raises(ValueError, match="do not fit"):
            run(op.halting_step, given, before._replace(**change))
    with pytest.raises(ValueError, match="accumulators in"):
        run(op.halting_step, given, before._replace(steps=before.total))
    with pytest.raises(ValueError, match="do not fit"):
        run(op.halting_step, [given[0], None, given[2][:8], given[3]], before)


def test_reasons_are_given_for_what_the_kernels_do_not_compute():
    assert op.unsupported(*drawn((6,), 16, torch.bfloat16)) is None
    assert "float64" in op.unsupported(*wide(drawn((6,), 16, torch.float32)))
    state = torch.zeros(1, 1).expand(1, 10_000)
    assert "at most 8192" in op.unsupported(state, None, state[0], state[0, 0])

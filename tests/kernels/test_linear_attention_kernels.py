"""hf_optim::linear_attention: specification, kernels, gradients and steps against a recurrence in float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.linear_attention import op
from hf_optim_kernels.linear_attention.op import Settings, State


class Case(NamedTuple):
    """The sizes of a call, how its features are made, and what it is given besides."""

    settings: Settings
    H: int = 2
    G: int = 2
    L: int = 1
    N: int = 40
    M: int | None = None
    m: int = 16
    B: int = 1
    D: int = 16
    DV: int = 16
    masked: bool = False
    gated: bool = False
    started: bool = False
    size: float = 1.0

    @property
    def P(self):
        return self.H if self.L == self.H else self.G

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        """Query, key, value; and W, mask, gate, state."""
        random = torch.Generator().manual_seed(seed)
        M, P = self.M or self.N, self.P

        def draw(*size):
            return torch.randn(*size, generator=random, dtype=torch.float64)

        three = [draw(self.B, h, n, d) for h, n, d in ((self.H, self.N, self.D), (self.G, M, self.D))]
        three = [each * self.size for each in three] + [draw(self.B, self.G, M, self.DV)]
        weight, mask, gate, state = draw(self.L, self.m, self.D), None, None, None
        if self.masked:
            mask = torch.rand(self.B, M, generator=random) < 0.7
            mask[0, :5] = False
        if self.gated:
            gate = torch.nn.functional.logsigmoid(draw(self.B, P, M) * 2)
        if self.started:
            F = self.m * (1 + (self.settings.kind == "trig"))
            reference = draw(self.B, P) if self.settings.kind == "positive" else torch.zeros(self.B, P).double()
            state = State(draw(self.B, P, F, self.DV), draw(self.B, P, F).abs() + 1, reference)
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        three = [each.to(device, dtype) for each in three]
        more = [each if each is None else each.to(device) for each in (mask,)]
        gate = gate if gate is None else gate.to(device, wide)
        state = state if state is None else State(*(each.to(device, wide).contiguous() for each in state))
        return three, (weight.to(device, wide), *more, gate, state)


POSITIVE = Settings("positive", 0.25)
ALL_POSITIVE = POSITIVE._replace(causal=False)
TRIG = Settings("trig", 1.0, floor=0.1)
UNIT = TRIG._replace(eps=1e-3)
CASES = {
    "positive": Case(POSITIVE),
    "positive-grouped": Case(POSITIVE, H=4, G=2, L=2, N=70, m=20, D=24, DV=32),
    "positive-by-head": Case(POSITIVE, H=4, G=2, L=4, started=True),
    "positive-masked": Case(POSITIVE, B=2, masked=True, G=1),
    "positive-gated": Case(POSITIVE, G=1, masked=True, gated=True, started=True, N=70),
    "positive-large": Case(POSITIVE, N=70, size=4.0),
    "positive-unit": Case(POSITIVE._replace(eps=1e-3)),
    "encoder": Case(ALL_POSITIVE, G=1, B=2, masked=True, m=40),
    "positive-cross": Case(ALL_POSITIVE, N=20, M=70, started=True),
    "trig": Case(TRIG, D=20),
    "trig-gated": Case(UNIT, N=70, gated=True, started=True),
    "trig-masked": Case(UNIT, H=1, G=1, B=2, masked=True, gated=True, m=20),
    "trig-all": Case(UNIT._replace(causal=False), masked=True, started=True, L=2, M=20),
}

# Of each kind some cases run always.
KINDS = [(case.settings.kind if case.settings.causal else "all", name) for name, case in CASES.items()]


def recurrence(case, three, given, bare=False):
    """Attention and the sums, token by token, with features as in the papers: nothing is taken out of exponents."""
    weight, mask, gate, state = given
    query, key, value = three
    kind, scale, causal, floor, eps = case.settings
    H, G, P, M = case.H, case.G, case.P, key.shape[2]

    def phi(x):
        y = x * scale**0.5
        if eps >= 0:
            y = y / (x.norm(dim=-1, keepdim=True) + eps)
        rows = weight.repeat_interleave(H // weight.shape[0], 0)
        if kind == "positive":
            return (y @ rows.mT - y.square().sum(-1, keepdim=True) / 2).exp()
        return torch.cat([(y @ rows.mT).sin(), (y @ rows.mT).cos()], -1) / math.sqrt(case.m)

    queries, keys = phi(query), phi(key.repeat_interleave(H // G, 1))
    values = value.repeat_interleave(H // G, 1)
    held = torch.zeros(case.B, H, keys.shape[-1], case.DV, dtype=torch.float64)
    sums = torch.zeros(case.B, H, keys.shape[-1], dtype=torch.float64)
    if state is not None:
        held, sums, reference = (each.double().repeat_interleave(H // P, 1) for each in state)
        held, sums = held * reference.exp()[..., None, None], sums * reference.exp()[..., None]
    out = []

    def read(i):
        bottom = (queries[:, :, i] * sums).sum(-1)
        if kind == "trig":
            bottom = bottom.clamp(min=floor)
        top = torch.einsum("bhf,bhfv->bhv", queries[:, :, i], held)
        out.append(torch.where(bottom[..., None] == 0, 0.0, top / torch.where(bottom == 0, 1.0, bottom)[..., None]))

    for j in range(M):
        seen = torch.ones(case.B, 1) if mask is None else mask[:, j, None].double()
        g, kept = torch.ones(case.B, H, dtype=torch.float64), seen
        if gate is not None:
            g = gate[:, :, j].double().repeat_interleave(H // P, 1).exp()
            g, kept = torch.where(seen > 0, g, 1.0), (1 - g) * seen
        held = g[..., None, None] * held + kept[..., None, None] * keys[:, :, j, :, None] * values[:, :, j, None]
        sums = g[..., None] * sums + kept[..., None] * keys[:, :, j]
        if causal:
            read(j)
    if not causal:
        for i in range(query.shape[2]):
            read(i)
    return torch.stack(out, 2), held[:, :: H // P], sums[:, :: H // P]


def upstream(case, seed=5):
    size = case.B, case.H, case.N, case.DV
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wanted(case, three=None, given=None):
    """out, gradients (with the gate's), and the state in float64."""
    drawn, others = case.tensors()
    three, given = [each.double() for each in three or drawn], given or others
    inputs = [each.clone().requires_grad_() for each in three]
    weight, mask, gate, state = given
    gate = gate if gate is None else gate.double().requires_grad_()
    out, held, sums = recurrence(case, inputs, (weight.double(), mask, gate, state))
    every = inputs + ([] if gate is None else [gate])
    return out.detach(), torch.autograd.grad((out * upstream(case)).sum(), every), held.detach(), sums.detach()


def computed(case, dtype, device):
    three, (weight, mask, gate, state) = case.tensors(dtype, device)
    inputs = [each.requires_grad_() for each in three]
    gate = gate if gate is None else gate.requires_grad_()
    out, after = op.linear_attention(*inputs, weight, case.settings, mask, gate, state, return_state=True)
    every = inputs + ([] if gate is None else [gate])
    gradients = torch.autograd.grad(out, every, upstream(case).to(device, dtype))
    scale = after.reference.double().exp()
    held, sums = after.state.double() * scale[..., None, None], after.sums.double() * scale[..., None]
    return [out.detach().cpu(), [each.cpu() for each in gradients], held.cpu(), sums.cpu()]


def compare(found, right, bound, gradient_bound):
    assert relative(found[0], right[0]) < bound
    assert len(found[1]) == len(right[1])
    for one, other in zip(found[1], right[1], strict=True):
        assert torch.isfinite(one).all()
        assert relative(one, other) < gradient_bound
    assert relative(found[2], right[2]) < bound
    assert relative(found[3], right[3]) < bound


@pytest.fixture
def tiled(monkeypatch):
    """A function that sets the tokens of a chunk and the rows of W that are read at a time."""
    launch = pytest.importorskip("hf_optim_kernels.linear_attention.launch")
    chosen = launch.Tiles(16, 16, 4, 1)
    return lambda **sizes: monkeypatch.setattr(launch, "_tiles", lambda *_: chosen._replace(**sizes))


# -- the specification -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_specification(name):
    case = CASES[name]
    compare(computed(case, torch.float64, "cpu"), wanted(case), 1e-11, 1e-10)


def test_many_features_give_softmax():
    """phi(q) phi(k) of positive features is exp(scale q k) in expectation; trig features are a Gaussian kernel."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 12, 8, generator=random, dtype=torch.float64) * 0.5 for _ in range(3))
    weight = torch.randn(1, 200_000, 8, generator=random, dtype=torch.float64)
    scores = (q @ k.mT * 0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    out, _ = op.linear_attention(q, k, v, weight, Settings("positive", 0.5))
    assert relative(out, scores.softmax(-1) @ v) < 0.02
    gaussian = torch.cdist(q[0], k[0]).square().mul(-0.5)[None].masked_fill(scores.isinf(), float("-inf"))
    out, _ = op.linear_attention(q, k, v, weight, Settings("trig", 1.0, floor=1e-3))
    assert relative(out, gaussian.softmax(-1) @ v) < 0.02


def test_what_is_refused():
    (q, k, v), (weight, *_) = CASES["positive"].tensors()

    def refused(match, *given, settings=POSITIVE, **more):
        with pytest.raises(ValueError, match=match):
            op.linear_attention(*given, settings, **more)

    refused("queries, keys and values of", q, k[..., :8], v, weight)
    refused("queries, keys and values of", q[:, :1], k, v, weight)
    refused("W of", q, k, v, weight[..., :8])
    refused("W of", q, k, v, weight.expand(3, -1, -1))
    refused("features of kind 'cos'", q, k, v, weight, settings=POSITIVE._replace(kind="cos"))
    refused("a scale of 0.0", q, k, v, weight, settings=POSITIVE._replace(scale=0.0))
    refused("a floor of 0.0", q, k, v, weight, settings=TRIG._replace(floor=0.0))
    refused("40 queries and 20 keys that are causal", q, k[:, :, :20], v[:, :, :20], weight)
    refused("a mask of torch.int64", q, k, v, weight, mask=torch.ones(1, 40).long())
    refused("gates of", q, k, v, weight, log_gate=torch.zeros(1, 2, 40), settings=ALL_POSITIVE)
    refused("gates of", q, k, v, weight, log_gate=torch.zeros(1, 1, 40))
    empty = op.empty_state(q, v, 2, weight, "trig")
    refused("a state of", q, k, v, weight, state=empty)
    refused("requires a gradient", q, k, v, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="40 tokens in a step"):
        op.step(q, k, v, weight, TRIG, empty)
    assert "float64" in op.unsupported(q, k, v, weight)
    assert op.unsupported(q.float(), k.float(), v.float(), weight.float()) is None
    assert "heads of 144" in op.unsupported(*(torch.zeros(1, 1, 4, 144) for _ in range(3)), torch.zeros(1, 16, 144))
    assert "W of 600 rows" in op.unsupported(*(torch.zeros(1, 1, 4, 16) for _ in range(3)), torch.zeros(1, 600, 16))


# -- the operators ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["positive", "trig-masked"])
def test_the_operators_pass_pytorchs_own_checks(name):
    case = CASES[name]
    three, (weight, mask, gate, state) = case.tensors(torch.float32)
    inputs = [each.requires_grad_() for each in three]
    arguments = (*inputs, weight, mask, gate, None, None, *(state or (None,) * 3), *case.settings, True)
    torch.library.opcheck(op._operator, arguments)
    out, tops, logs, *after = op._operator(*arguments)
    given = [each if each is None else each.detach() for each in (out, tops, logs, *arguments[:11])]
    torch.library.opcheck(
        op._gradients, (torch.ones_like(out), *given, *case.settings), test_utils=("test_schema", "test_faketensor")
    )
    token = [each.detach()[:, :, :1] for each in three]
    gate = gate if gate is None else gate[:, :, :1]
    torch.library.opcheck(
        op._step, (*token, weight, gate, None, *after, *case.settings), test_utils=("test_schema", "test_faketensor")
    )


def test_tiles_that_triton_compiles_to_wrong_addresses_are_not_guessed():
    tiles = pytest.importorskip("hf_optim_kernels.linear_attention.tiles")
    for direction, size, trig, m in itertools.product(("forward", "backward"), (64, 128), (True, False), (16, 64)):
        guess = tiles.guessed(direction, m, size, trig, torch.bfloat16)
        assert guess.features >= (64 if direction == "backward" or size > 64 else 32), (direction, size, trig, m)


# -- the kernels -----------------------------------------------------------------------------------------------------
@pytest.mark.many("kind")
@on_triton
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_the_kernels(kind, name, device, tiled):
    case = CASES[name]
    tiled(chunk=32)
    # A device rounds the powers of two that decay with the gates.
    bound = 8e-6 if device == "cuda" and case.gated else 4e-6
    compare(computed(case, torch.float32, device), wanted(case), bound, 2e-5)


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    case = CASES["positive"]
    three, given = case.tensors(dtype)
    right = wanted(case, three, given)
    found = computed(case, dtype, device)
    assert found[0].dtype == found[1][0].dtype == dtype
    compare(found, right, 4 * BOUND[dtype], 8 * BOUND[dtype])


@on_triton
def test_more_chunks_than_the_scan_adds_up_at_once(device, tiled):
    case = Case(POSITIVE, H=1, G=1, N=280)
    tiled()
    compare(computed(case, torch.float32, device), wanted(case), 4e-6, 2e-5)


@on_triton
def test_outputs_do_not_depend_on_what_follows(device):
    """Bit for bit, whatever the later keys are: references are those of the keys that a query sees."""
    case = CASES["positive-large"]
    three, (weight, *_) = case.tensors(torch.float32, device)
    first, _ = op.linear_attention(*three, weight, case.settings)
    for t in (1, 20, 33, 69):
        changed = [each.clone() for each in three]
        for each in changed:
            each[:, :, t:] *= -3
        second, _ = op.linear_attention(*changed, weight, case.settings)
        assert torch.equal(first[:, :, :t], second[:, :, :t])
        assert not torch.equal(first[:, :, t:], second[:, :, t:])


@on_triton
@pytest.mark.parametrize("name", ["positive", "positive-gated", "trig-gated", "positive-by-head"])
def test_steps_are_the_whole(name, device):
    """A prefill of some tokens and a step for each of the others give what one call gives; the state is its own."""
    case = CASES[name]._replace(masked=False, N=12)
    (q, k, v), (weight, _, gate, state) = case.tensors(torch.float32, device)
    whole, end = op.linear_attention(q, k, v, weight, case.settings, None, gate, state, return_state=True)
    cut = 5

    def part(first, last):
        return [each[:, :, first:last] for each in (q, k, v)], gate if gate is None else gate[:, :, first:last]

    three, own = part(0, cut)
    out, held = op.linear_attention(*three, weight, case.settings, None, own, state, return_state=True)
    outs = [out]
    for t in range(cut, case.N):
        three, own = part(t, t + 1)
        outs.append(op.step(*three, weight, case.settings, held, own))
    assert relative(torch.cat(outs, 2), whole) < 4e-6
    for one, other in zip(held, end, strict=True):
        torch.testing.assert_close(one, other, rtol=4e-6, atol=4e-6)


@on_triton
@pytest.mark.parametrize("kind", ["positive", "trig"])
def test_steps_from_nothing(kind, device):
    case = Case(POSITIVE if kind == "positive" else UNIT, H=3, G=1, N=4, m=20, D=24, DV=40)
    (q, k, v), (weight, *_) = case.tensors(torch.float32, device)
    state = op.empty_state(q, v, 1, weight, kind)
    found = torch.cat(
        [op.step(*(each[:, :, t : t + 1] for each in (q, k, v)), weight, case.settings, state) for t in range(4)], 2
    )
    assert relative(found.cpu(), wanted(case)[0]) < 4e-6


@on_triton
def test_a_query_that_sees_nothing_gives_zeros_and_has_no_gradient(device):
    case = CASES["positive-masked"]
    three, (weight, *_) = case.tensors(torch.float32, device)
    inputs = [each.requires_grad_() for each in three]
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    mask[0, :20] = mask[1] = False
    out, after = op.linear_attention(*inputs, weight, case.settings, mask, return_state=True)
    assert not out[0, :, :20].any()
    assert out[0, :, 20:].all()
    assert not out[1].any()
    assert (after.reference[1] == float("-inf")).all()
    gradients = torch.autograd.grad(out.sum(), inputs)
    for each in gradients:
        assert torch.isfinite(each).all()
        assert not each[1].any()
        assert not each[0, :, :20].any()


@on_triton
def test_tensors_may_have_other_strides(device):
    case = CASES["positive"]
    three, (weight, *_) = case.tensors(torch.float32, device)
    right, _ = op.linear_attention(*three, weight, case.settings)
    others = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in three[:2]]
    wide = torch.zeros(*three[2].shape[:3], 40, device=device)
    wide[..., 3 : 3 + case.DV] = three[2]
    found, _ = op.linear_attention(*others, wide[..., 3 : 3 + case.DV], weight, case.settings)
    assert torch.equal(found, right)
    assert found.transpose(1, 2).is_contiguous()  # what a projection reads


@on_triton
def test_the_operators_are_part_of_a_graph(device):
    case = CASES["positive"]
    three, (weight, *_) = case.tensors(torch.float32, device)
    inputs = [each.requires_grad_() for each in three]

    def call(query, key, value):
        return op.linear_attention(query * 1.0, key, value, weight, case.settings)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, right = compiled(*inputs), call(*inputs)
    assert torch.equal(found, right)
    pairs = (torch.autograd.grad(each.square().sum(), inputs) for each in (found, right))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    torch._dynamo.reset()


@on_triton
@pytest.mark.parametrize("N", [0, 1])
def test_few_tokens(N, device):
    inputs = [torch.ones(1, 2, N, 16, device=device, requires_grad=True) for _ in range(3)]
    weight = torch.ones(1, 16, 16, device=device)
    out, after = op.linear_attention(*inputs, weight, POSITIVE, return_state=True)
    assert out.shape == (1, 2, N, 16)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert torch.isfinite(after.state).all()
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(out.sum(), inputs))


# -- on a device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 256])
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("settings", [POSITIVE, ALL_POSITIVE, UNIT], ids=["positive", "all", "trig"])
def test_bfloat16_on_a_device(m, D, settings):
    case = Case(settings, H=4, G=2, N=300, m=m, D=D, DV=D, gated=settings.causal, size=0.7)
    three, given = case.tensors(torch.bfloat16)
    bound = 4 * BOUND[torch.bfloat16]
    compare(computed(case, torch.bfloat16, "cuda"), wanted(case, three, given), bound, 2 * bound)


@pytest.mark.gpu
def test_captured_calls():
    case = CASES["positive-gated"]
    three, (weight, mask, gate, state) = case.tensors(torch.float32, "cuda")
    right, _ = op.linear_attention(*three, weight, case.settings, mask, gate, state)
    token = [each[:, :, :1].contiguous() for each in three]
    held = State(*(each.clone() for each in state))
    own = gate[:, :, :1].contiguous()
    first = op.step(*token, weight, case.settings, held, own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = op.linear_attention(*three, weight, case.settings, mask, gate, state)
        again = op.step(*token, weight, case.settings, held, own)
    for one, other in zip(held, state, strict=True):
        one.copy_(other)
    graph.replay()
    assert torch.equal(found, right)
    assert torch.equal(again, first)

"""hf_optim::run_attention: the specification, the kernels and their gradients against pairs in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.bucket_order import naive as ordering
from hf_optim_kernels.bucket_order.op import Cut
from hf_optim_kernels.run_attention import op
from hf_optim_kernels.run_attention.op import Seen

SCALE = 0.4


class Case(NamedTuple):
    """Tokens that are hashed in rounds (a cut), or queries and keys in clusters (a window)."""

    seen: Seen
    cut: Cut | None = None
    window: int = 0
    rounds: int = 1
    buckets: int = 4
    padding: int = 0
    n: int = 75
    H: int = 2
    G: int = 2
    D: int = 16
    DV: int = 16

    def hashed(self, heads, seed):
        random = torch.Generator().manual_seed(seed)
        found = torch.randint(0, self.buckets, (2, heads, self.rounds, self.n), generator=random).short()
        found[1, ..., self.n - self.padding :] = self.buckets
        return found

    def places(self):
        """The arguments of the operator after the value, and by name."""
        if self.cut is not None:
            runs = ordering.sorted_runs(self.hashed(self.H, 1), self.cut)
            more = {"codes": runs.codes, "first": runs.first, "last": runs.last}
            return (runs.order, runs.order, runs.low, runs.high), more
        both = self.hashed(self.H, 1)[:, :, 0], self.hashed(self.G, 2)[:, :, 0]
        return ordering.runs_of_last(*both, self.buckets, self.window), {}

    def tensors(self, dtype=torch.float64, device="cpu"):
        random = torch.Generator().manual_seed(0)
        shapes = (self.H, self.n, self.D), (self.G, self.n, self.D), (self.G, self.n, self.DV)
        drawn = [torch.randn(2, *shape, generator=random, dtype=torch.float64) for shape in shapes]
        return [each.to(device, dtype) for each in (drawn[::2] if self.seen.unit else drawn)]


ONCE = Seen(before=1, causal=True, unit=True)
CUT = Cut(4, 16, 1, 0, False, True, 1000)
CASES = {
    "rounds": Case(ONCE._replace(near=16, placed=True), CUT._replace(lonely=16), rounds=3),
    "padded": Case(ONCE._replace(near=16), CUT._replace(lonely=16), rounds=2, padding=9, G=1, D=20, DV=32),
    "one-round": Case(ONCE, CUT, padding=5),
    "encoder": Case(Seen(1, 1, False, True), CUT._replace(after=1, causal=False), rounds=2, padding=9),
    "whole": Case(Seen(1, 0, True, True), CUT._replace(whole=True, causal=False), rounds=2),
    "lonely": Case(ONCE, Cut(30, 2, 1, 0, False, True, 1000), rounds=1, buckets=30),
    "last": Case(Seen(own=True, placed=True), window=11),
    "last-grouped": Case(Seen(own=True), window=7, padding=9, G=1, H=3, D=20, DV=32),
}  # fmt: skip


def seen_pairs(case):
    """Which tokens each token sees, one by one: bool [2, H, n, n], and if only itself counts where it sees no other."""
    seen = torch.zeros(2, case.H, case.n, case.n, dtype=torch.bool)
    asked = case.hashed(case.H, 1).tolist()
    for b in range(2):
        tokens = case.n - (case.padding if b else 0)
        for h in range(case.H):
            if case.cut is None:
                held = case.hashed(case.G, 2)[b, h // (case.H // case.G), 0].tolist()
                for t in range(tokens):
                    found = [s for s in range(t) if s < tokens and held[s] == asked[b][h][0][t]][-case.window :]
                    seen[b, h, t, [*found, t]] = True
                continue
            for r in range(case.rounds):
                row, cut = asked[b][h][r], case.cut
                order = sorted(range(tokens), key=lambda t: (row[t], t))
                rank = {}
                for t in order:
                    same = [s for s in order if cut.whole or row[s] == row[t]]
                    rank[t] = same.index(t) // cut.chunk
                for t in range(tokens):
                    for s in range(tokens):
                        near = -cut.after <= rank[t] - rank[s] <= cut.before and (cut.whole or row[s] == row[t])
                        if near and (s <= t or not case.seen.causal) and t >= cut.lonely:
                            seen[b, h, t, s] = True
            seen[b, h, : case.seen.near, : case.seen.near] = torch.ones(case.seen.near, case.seen.near).tril().bool()
    return seen


def dense(case, query, *others):
    key, value = others if len(others) == 2 else (None, others[0])
    group, seen = case.H // case.G, seen_pairs(case)
    if key is None:
        unit = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() / query.shape[-1] ** 0.5
        own = torch.eye(case.n, dtype=torch.bool)
        seen = seen & (~own | ~(seen & ~own).any(-1, keepdim=True))
        scores = query @ unit.mT * SCALE
    else:
        scores = query @ key.repeat_interleave(group, 1).mT * SCALE
    some = seen.any(-1, keepdim=True)
    weights = torch.where(some, scores.masked_fill(~seen & some, float("-inf")).softmax(-1), 0.0)
    return weights @ value.repeat_interleave(group, 1)


def upstream(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def wanted(case, inputs=None):
    inputs = [each.double().requires_grad_() for each in inputs or case.tensors()]
    out = dense(case, *inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream(out))]


def computed(case, dtype, device):
    inputs = [each.requires_grad_() for each in case.tensors(dtype, device)]
    query, *key, value = inputs
    given, more = case.places()
    orders = [each.to(device) for each in given[:2]]
    given = (orders[0], orders[given[0] is not given[1]], *(each.to(device) for each in given[2:]))
    out = op.run_attention(
        query, key[0] if key else None, value, *given, case.seen, SCALE,
        **{name: each.to(device) for name, each in more.items()},
    )  # fmt: skip
    return [each.detach().cpu() for each in (out, *torch.autograd.grad(out, inputs, upstream(out).to(out)))]


def compare(found, right, bound):
    for one, other in zip(found, right, strict=True):
        assert relative(one, other) < bound
        bound = max(bound, 2 * bound)


# -- the specification -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_specification(name):
    compare(computed(CASES[name], torch.float64, "cpu"), wanted(CASES[name]), 1e-10)


def test_the_cases_have_lone_tokens_and_pairs_of_several_rounds():
    seen = seen_pairs(CASES["lonely"])
    assert (seen.sum(-1) == 1).any()
    case = CASES["rounds"]
    runs = ordering.sorted_runs(case.hashed(case.H, 1), case.cut)
    apart = runs.codes[..., :, None] - runs.codes[..., None, :]
    assert (((apart >= 0) & (apart <= 1)).sum(2) > 1).any()


def test_what_is_refused():
    case = CASES["rounds"]
    (q, v), (given, more) = case.tensors(), case.places()

    def refused(match, *tensors, key=None, seen=case.seen, scale=SCALE, **other):
        with pytest.raises(ValueError, match=match):
            op.run_attention(q, key, *tensors, seen, scale, **{**more, **other})

    refused("queries, keys and values of", v[:, :, :9], *given)
    refused("a scale of 0.0", v, *given, scale=0.0)
    refused("a key beside unit", v, *given, key=q)
    refused("low of torch.int64", v, *given[:2], given[2].long(), given[3])
    refused("several rounds without codes", v, *given, codes=None)
    refused("near=200 for 75 tokens", v, *given, seen=case.seen._replace(near=200))
    refused("before=-1", v, *given, seen=case.seen._replace(before=-1))
    refused("several rounds of queries and keys", v, *given, key=q, seen=Seen(own=True))
    assert "float64" in op.unsupported(q, q, v)
    assert op.unsupported(q.float(), q.float(), v.float()) is None


@pytest.mark.parametrize("name", ["padded", "last-grouped"])
def test_the_operator_passes_pytorchs_own_checks(name):
    case = CASES[name]
    query, *key, value = (each.requires_grad_() for each in case.tensors(torch.float32))
    (order_q, order_k, low, high), more = case.places()
    more = [more.get(each, low) for each in ("codes", "first", "last")]
    keys = key[0] if key else query.new_empty(0)
    given = (query, keys, value, order_q, order_k.clone(), low, high, *more, list(map(int, case.seen)), SCALE)
    torch.library.opcheck(
        op._operator, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    out, lse = (each.detach() for each in op._operator(*given))
    torch.library.opcheck(
        op._gradients, (torch.ones_like(out), out, lse, *(each.detach() for each in given[:3]), *given[3:]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# -- the kernels -----------------------------------------------------------------------------------------------------
@on_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernels(name, device):
    compare(computed(CASES[name], torch.float32, device), wanted(CASES[name]), 4e-6)


@on_triton
@pytest.mark.parametrize("name", ["rounds", "last-grouped"])
def test_half_precision(name, device):
    case = CASES[name]
    found = computed(case, torch.bfloat16, device)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    compare(found, wanted(case, case.tensors(torch.bfloat16)), 4 * BOUND[torch.bfloat16])


# -- on a device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_on_a_device(name, D):
    case = CASES[name]._replace(D=D, DV=D, n=500)
    found = computed(case, torch.bfloat16, "cuda")
    compare(found, wanted(case, case.tensors(torch.bfloat16)), 4 * BOUND[torch.bfloat16])

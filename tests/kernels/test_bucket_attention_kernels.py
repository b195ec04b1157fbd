"""hf_optim::bucket_attention: the specification, the kernels and their gradients against pairs in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.bucket_attention import op
from hf_optim_kernels.bucket_attention.op import Buckets

SCALE = 0.4


class Case(NamedTuple):
    """The sizes of a call; tokens are put at random places, of which ``empty`` have none."""

    buckets: Buckets
    chunks: int = 4
    empty: int = 0
    H: int = 2
    G: int = 2
    B: int = 1
    D: int = 16
    DV: int = 16

    @property
    def sizes(self):
        return self.chunks * self.buckets.width_q, self.chunks * self.buckets.width_k

    @property
    def shared(self):
        """Queries and keys are the same tokens, each at one place."""
        return not self.buckets.gathered

    def places(self):
        random = torch.Generator().manual_seed(1)
        found = []
        for size in self.sizes:
            own = torch.empty(self.B, self.H, size, dtype=torch.int32)
            for row in own.flatten(0, 1):
                if self.shared:
                    row[:] = torch.randperm(size, generator=random)
                    row[row >= size - self.empty] = -1
                else:  # tokens of clusters, which may share them
                    for cluster in row.view(self.chunks, -1):
                        cluster[:] = torch.randperm(30, generator=random)[: len(cluster)] - 2
                        cluster.clamp_(min=-1)
                        if self.buckets.wrap:  # chunks of several rounds of hashing, nearby
                            cluster[:] = cluster.abs() + 2
                            cluster[:2] = torch.arange(2)
            found.append(own)
        return (found[0], found[0]) if self.shared or self.buckets.wrap else found

    def tensors(self, dtype=torch.float64, device="cpu"):
        random = torch.Generator().manual_seed(0)
        n, m = (size - self.empty for size in self.sizes)
        shapes = (self.H, n, self.D), (self.G, m, self.D), (self.G, m, self.DV)
        drawn = [torch.randn(self.B, *shape, generator=random, dtype=torch.float64) for shape in shapes]
        if self.buckets.gathered:  # the places of a token have the same rows
            drawn = [torch.take_along_dim(each, self.rows(each), 2) for each in drawn]
        return [each.to(device, dtype) for each in drawn]

    def rows(self, tensor):
        """Of each place a row that all places of its token share."""
        both = self.places()
        places = both[tensor.shape[2] != both[0].shape[2]]
        return places.long().clamp(min=0)[..., None]


LSH = Buckets(16, 16, before=1, wrap=True, causal=True, no_self=True)
CASES = {
    "lsh": Case(LSH, B=2),
    "lsh-grouped": Case(LSH, empty=9, G=1, D=20, DV=32),
    "lsh-encoder": Case(LSH._replace(after=1, causal=False)),
    "ends": Case(LSH._replace(wrap=False, after=1, causal=False, no_self=False), chunks=3),
    "two-chunks": Case(LSH._replace(after=1, causal=False), chunks=2),
    "one-chunk": Case(LSH, chunks=1),
    "wide": Case(LSH._replace(width_q=40, width_k=40), chunks=3, H=1, G=1),
    "clusters": Case(Buckets(20, 24, gathered=True)),
    "ring": Case(Buckets(20, 20, before=1, wrap=True, causal=True, no_self=True, gathered=True)),
    "causal-clusters": Case(Buckets(20, 24, causal=True, no_self=True, gathered=True), B=2),
}


def pairs(case, dtype=torch.float64):
    """Which rows of keys each row of queries sees, and which are itself, place by place: bool [B, H, N, M]."""
    places_q, places_k = (each.tolist() for each in case.places())
    n, m = (size - case.empty for size in case.sizes)
    seen, same = (torch.zeros(case.B, case.H, n, m, dtype=torch.bool) for _ in range(2))
    one = case.buckets
    for b in range(case.B):
        for h in range(case.H):
            for c in range(case.chunks):
                near = [c + step for step in range(-one.before, one.after + 1)]
                near = {each % case.chunks for each in near} if one.wrap else {*near} & {*range(case.chunks)}
                for i in range(c * one.width_q, (c + 1) * one.width_q):
                    for j in (j for other in near for j in range(other * one.width_k, (other + 1) * one.width_k)):
                        q, k = places_q[b][h][i], places_k[b][h][j]
                        if q < 0 or k < 0 or (one.causal and k > q):
                            continue
                        at = (b, h, i, j) if one.gathered else (b, h, q, k)
                        seen[at] = True
                        same[at] = one.no_self and q == k
    return seen, same


def dense(query, key, value, seen, same):
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * SCALE - same * 1e5
    some = seen.any(-1, keepdim=True)
    scores = torch.where(seen | ~some, scores, float("-inf"))
    weights = torch.where(some, scores.softmax(-1), 0.0)
    lse = torch.where(some[..., 0], scores.logsumexp(-1), float("-inf"))
    return weights @ value.repeat_interleave(group, 1), lse


def upstream(out, lse):
    random = torch.Generator().manual_seed(5)
    return [torch.randn(each.shape, generator=random, dtype=torch.float64) for each in (out, lse)]


def wanted(case, inputs=None):
    inputs = [each.double().requires_grad_() for each in inputs or case.tensors()]
    out, lse = dense(*inputs, *pairs(case))
    grad_out, grad_lse = upstream(out, lse)
    loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def computed(case, dtype, device):
    inputs = [each.requires_grad_() for each in case.tensors(dtype, device)]
    out, lse = op.bucket_attention(*inputs, *(each.to(device) for each in case.places()), case.buckets, SCALE)
    grads = [g.to(device, each.dtype) for g, each in zip(upstream(out, lse), (out, lse), strict=True)]
    return [each.detach().cpu() for each in (out, lse, *torch.autograd.grad((out, lse), inputs, grads))]


def compare(found, right, bound):
    blind = right[1].isinf()
    assert torch.equal(found[1].isinf(), blind)
    assert not found[0][blind].any()
    # The log-sum of a token that sees itself alone is about -1e5, which float32 has to a hundredth.
    lone = right[1] < -5e4
    torch.testing.assert_close(found[1][~blind & ~lone].double(), right[1][~blind & ~lone], rtol=bound, atol=bound)
    torch.testing.assert_close(found[1][lone].double(), right[1][lone], rtol=0, atol=0.02)
    assert relative(found[0], right[0]) < bound
    for one, other in zip(found[2:], right[2:], strict=True):
        assert relative(one, other) < 2 * bound


# -- the specification -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_specification(name):
    compare(computed(CASES[name], torch.float64, "cpu"), wanted(CASES[name]), 1e-11)


def test_the_cases_have_lone_tokens_and_blind_rows():
    assert (wanted(CASES["lsh"])[1] < -5e4).any()
    assert (wanted(CASES["causal-clusters"])[1] < -5e4).any()
    assert wanted(CASES["causal-clusters"])[1].isinf().any()
    case = CASES["ring"]
    seen, same = pairs(case)
    lone = wanted(case)[1] < -5e4
    assert ((seen & same).sum(-1)[lone] == 2).any()  # a token that sees itself at two places


def test_rounds_are_combined_by_their_lse():
    """One round in which all tokens share a chunk is full attention; so are two such rounds, merged."""
    case = CASES["one-chunk"]
    inputs = [each.requires_grad_() for each in case.tensors()]
    outs, lses = zip(*(op.bucket_attention(*inputs, p, p, case.buckets, SCALE) for p in case.places()), strict=True)
    weights = torch.stack(lses).softmax(0)
    out = (torch.stack(outs) * weights[..., None]).sum(0)
    right, _ = dense(*inputs, *pairs(case))
    assert relative(out, right) < 1e-11
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape).double()
    both = (torch.autograd.grad((each * slope).sum(), inputs) for each in (out, right))
    for one, other in zip(*both, strict=True):
        assert relative(one, other) < 1e-10


def test_what_is_refused():
    case = CASES["lsh"]
    (q, k, v), (places, _) = case.tensors(), case.places()

    def refused(match, *given, buckets=LSH, scale=SCALE):
        with pytest.raises(ValueError, match=match):
            op.bucket_attention(*given, buckets, scale)

    refused("queries, keys and values of", q, k[..., :8], v, places, places)
    refused("a scale of 0.0", q, k, v, places, places, scale=0.0)
    refused("places of torch.int64", q, k, v, places.long(), places)
    refused("places of torch.int32", q, k, v, places[:, :1], places)
    refused("64 and 48 places in chunks of 16 and 16", q, k, v, places, places[..., :48])
    refused("62 and 62 places", q, k, v, places[..., :62], places[..., :62])
    refused("before=-1", q, k, v, places, places, buckets=LSH._replace(before=-1))
    refused("gathered", q[:, :, :50], k, v, places, places, buckets=LSH._replace(gathered=True))
    assert "float64" in op.unsupported(q, k, v)
    assert op.unsupported(q.float(), k.float(), v.float()) is None


def test_the_operator_passes_pytorchs_own_checks():
    case = CASES["lsh-grouped"]
    inputs = [each.requires_grad_() for each in case.tensors(torch.float32)]
    places = case.places()
    numbers = list(map(int, case.buckets))
    torch.library.opcheck(op._operator, (*inputs, *places, numbers, SCALE))
    out, lse = (each.detach() for each in op._operator(*inputs, *places, numbers, SCALE))
    given = (torch.ones_like(out), None, out, lse, *(each.detach() for each in inputs), *places, numbers, SCALE)
    torch.library.opcheck(op._gradients, given, test_utils=("test_schema", "test_faketensor"))


# -- the kernels -----------------------------------------------------------------------------------------------------
@on_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernels(name, device):
    compare(computed(CASES[name], torch.float32, device), wanted(CASES[name]), 4e-6)


@on_triton
def test_half_precision(device):
    case = CASES["lsh-encoder"]
    right = wanted(case, case.tensors(torch.bfloat16))
    found = computed(case, torch.bfloat16, device)
    assert found[0].dtype == found[2].dtype == torch.bfloat16
    compare(found, right, 3 * BOUND[torch.bfloat16])


@on_triton
def test_places_may_be_computed_in_a_graph(device):
    """Sorted by a hash of the tensors themselves: without a break."""
    case = Case(LSH, chunks=2, H=1, G=1)
    q, k, v = case.tensors(torch.float32, device)

    def call(query, key, value):
        places = query.sum(-1).argsort(-1).int()
        return op.bucket_attention(query, key, value, places, places, case.buckets, SCALE)

    torch._dynamo.reset()
    found = torch.compile(call, backend="eager", fullgraph=True)(q, k, v)
    assert all(torch.equal(*pair) for pair in zip(found, call(q, k, v), strict=True))
    torch._dynamo.reset()


# -- on a device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("width", [32, 64, 128, 200])
def test_bfloat16_on_a_device(width, D):
    case = Case(LSH._replace(width_q=width, width_k=width), H=4, G=2, D=D, DV=D, empty=5)
    right = wanted(case, case.tensors(torch.bfloat16))
    compare(computed(case, torch.bfloat16, "cuda"), right, 3 * BOUND[torch.bfloat16])

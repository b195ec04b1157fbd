"""hf_optim::sparse_attention: the specification, the kernels and their gradients against dense attention in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from block_layouts import layout_of, to
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.sparse_attention import naive, op

SCALE = 0.4


class Case(NamedTuple):
    """A pattern over places and the sizes of a call; ``split`` cuts lists."""

    seen: torch.Tensor
    heads: list[int]
    G: int
    N: int
    M: int
    order_q: torch.Tensor | None = None
    order_k: torch.Tensor | None = None
    segments: tuple | None = None
    B: int = 1
    D: int = 16
    DV: int = 16
    split: int = 1000

    def layout(self, **options):
        return layout_of(self.seen, 32, self.heads, self.order_q, self.order_k, **options)

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        random = torch.Generator().manual_seed(seed)
        sizes = (len(self.heads), self.N, self.D), (self.G, self.M, self.D), (self.G, self.M, self.DV)
        drawn = [torch.randn(self.B, *size, generator=random, dtype=torch.float64) for size in sizes]
        return [each.to(device, dtype) for each in drawn]

    def by_token(self):
        """Which key each query sees: bool [B, H, N, M], from the mask over places, pair by pair of places."""
        found = torch.zeros(self.B, len(self.heads), self.N, self.M, dtype=torch.bool)
        for h, kind in enumerate(self.heads):
            tokens = []
            for order, places, count in ((self.order_q, 1, self.N), (self.order_k, 2, self.M)):
                if order is None:
                    tokens.append([p if p < count else -1 for p in range(self.seen.shape[places])])
                else:
                    tokens.append(order[kind if len(order) > 1 else 0].tolist())
            for q, k in self.seen[kind].nonzero().tolist():
                if tokens[0][q] >= 0 and tokens[1][k] >= 0:
                    found[:, h, tokens[0][q], tokens[1][k]] = True
        if self.segments:
            q, k = self.segments
            found &= ((q[:, :, None] == k[:, None, :]) & (q >= 0)[:, :, None])[:, None]
        return found


def window(n, m=None, behind=20, ahead=20):
    distance = torch.arange(m or n) - torch.arange(n)[:, None]
    return ((distance >= -behind) & (distance <= ahead))[None]


def drawn(*size, share=0.4, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) < share


def shuffled(places, tokens, layouts, seed):
    """Orders: some tokens at random places of each layout, others empty."""
    random = torch.Generator().manual_seed(seed)
    found = torch.full((layouts, places), -1, dtype=torch.int32)
    for own in found:
        at = torch.randperm(places, generator=random)[:tokens]
        own[at] = torch.randperm(tokens, generator=random).int()
    return found


def _global_tokens(n):
    seen = window(n)
    seen[:, :3] = seen[:, :, :3] = True
    return seen


def _random_blocks(n):
    seen = drawn(1, n // 32, n // 32, share=0.5).repeat_interleave(32, 1).repeat_interleave(32, 2)
    return seen | window(n, behind=0, ahead=0)


def _gaps(n):
    """Whole blocks, single queries and single keys that see nothing."""
    seen = drawn(1, n, n)
    seen[:, 32:64] = seen[:, :, :32] = seen[:, 70] = seen[:, :, 71] = False
    seen[:, 64:96, 64:96] |= drawn(1, 32, 32, seed=1)
    return seen


def _by_head(n):
    seen = drawn(3, n, n, share=0.3)
    seen[0, :, 32:] = False
    seen[1, :32, :64] = True
    return seen


LEFT = torch.tensor([[-1] * 33 + [0] * 37, [-1] * 5 + [0] * 65])
PACKED = torch.tensor([[0] * 20 + [1] * 35 + [2] * 15, [0] * 50 + [-1] * 20])
CASES = {
    "window": Case(window(100), [0, 0], 2, 100, 100),
    "causal": Case(window(70, ahead=0), [0, 0, 0], 1, 70, 70, D=32),
    "dense": Case(torch.ones(1, 40, 40, dtype=torch.bool), [0], 1, 40, 40),
    "globals": Case(_global_tokens(100), [0, 0], 1, 100, 100, split=2),
    "random": Case(_random_blocks(128), [0, 0], 2, 128, 128, D=20, DV=32),
    "gaps": Case(_gaps(100), [0], 1, 100, 100),
    "by-head": Case(_by_head(96), [0, 1, 2, 2], 2, 96, 90, split=3),
    "orders": Case(
        _by_head(96), [0, 1, 2, 2], 2, 75, 83, shuffled(96, 70, 3, 0), shuffled(96, 80, 3, 1), split=2
    ),
    "one-order": Case(drawn(1, 64, 64), [0, 0], 1, 50, 64, shuffled(64, 50, 1, 2), shuffled(64, 64, 1, 3)),
    "one-order-by-head": Case(_by_head(96), [0, 1], 1, 96, 80, None, shuffled(96, 80, 1, 3)),
    "more-keys": Case(window(40, 110, 0, 70), [0, 0], 1, 40, 110),
    "padded": Case(_global_tokens(70), [0], 1, 70, 70, segments=(LEFT.int(), LEFT.int()), B=2),
    "packed": Case(_global_tokens(70), [0, 0], 1, 70, 70, segments=(PACKED.int(), PACKED.int()), B=2, split=1),
}  # fmt: skip

# Of each kind a case runs always; the specification is compared with the formula in all cases.
KINDS = [
    *(("plain", name) for name in ("window", "causal", "dense", "more-keys")),
    *(("cut", name) for name in ("by-head", "globals")),
    *(("orders", name) for name in ("orders", "one-order", "one-order-by-head")),
    *(("segments", name) for name in ("padded", "packed")),
    ("sizes", "random"),
    ("gaps", "gaps"),
]


def dense(query, key, value, seen):
    """Attention and lse under a mask, by the formula."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * SCALE
    some = seen.any(-1, keepdim=True)
    scores = torch.where(seen | ~some, scores, float("-inf"))
    weights = torch.where(some, scores.softmax(-1), 0.0)
    lse = torch.where(some[..., 0], scores.logsumexp(-1), float("-inf"))
    return weights @ value.repeat_interleave(group, 1), lse


def upstream(case, seed=5):
    random = torch.Generator().manual_seed(seed)
    H = len(case.heads)
    return (
        torch.randn(case.B, H, case.N, case.DV, generator=random, dtype=torch.float64),
        torch.randn(case.B, H, case.N, generator=random, dtype=torch.float64),
    )


def wanted(case):
    """out, lse and three gradients in float64, for the gradients of ``upstream``."""
    inputs = [each.requires_grad_() for each in case.tensors()]
    out, lse = dense(*inputs, case.by_token())
    grad_out, grad_lse = upstream(case)
    loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def computed(case, dtype, device, layout=None):
    inputs = [each.requires_grad_() for each in case.tensors(dtype, device)]
    layout = to(layout or case.layout(), device)
    segments = [each.to(device) for each in case.segments or ()]
    out, lse = op.sparse_attention(*inputs, layout, SCALE, *segments)
    grad_out, grad_lse = (each.to(device) for each in upstream(case))
    gradients = torch.autograd.grad((out, lse), inputs, (grad_out.to(dtype), grad_lse.to(lse.dtype)))
    return [each.detach().cpu() for each in (out, lse, *gradients)]


def compare(found, right, bound, gradient_bound):
    out, lse, *gradients = found
    assert relative(out, right[0]) < bound
    blind = right[1].isinf()
    assert torch.equal(lse.isinf() & (lse < 0), blind)
    torch.testing.assert_close(lse[~blind].double(), right[1][~blind], rtol=bound, atol=bound)
    assert not out[blind].any()
    assert not gradients[0][blind].any()
    for one, other in zip(gradients, right[2:], strict=True):
        assert relative(one, other) < gradient_bound


@pytest.fixture
def cut(monkeypatch):
    """A function that cuts lists of layouts as a case says."""
    items = pytest.importorskip("hf_optim_kernels.sparse_attention.items")
    return lambda case: monkeypatch.setattr(items, "piece", lambda *_: case.split)


# -- the specification -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_specification(name):
    assert name in {each for _, each in KINDS}
    case = CASES[name]
    layout = case.layout()
    seen = naive.visible(layout, case.N, case.M, *(case.segments or ()))
    assert torch.equal(seen.expand_as(case.by_token()), case.by_token())
    compare(computed(case, torch.float64, "cpu", layout), wanted(case), 1e-12, 1e-11)


def test_lists_by_key_are_those_by_query():
    for case in CASES.values():
        layout = case.layout()
        places = torch.stack(naive._expand(layout, layout.starts, layout.columns, layout.masks, by_key=False))
        assert torch.equal(places, naive.visible_by_key(layout))


def test_whole_blocks_may_have_masks():
    layout = CASES["dense"].layout(whole=False)
    assert layout.masks.min() == 0
    compare(computed(CASES["dense"], torch.float64, "cpu", layout), wanted(CASES["dense"]), 1e-12, 1e-11)


def test_what_is_refused():
    case = CASES["window"]
    tensors, layout = case.tensors(), case.layout()
    with pytest.raises(ValueError, match="scale"):
        op.sparse_attention(*tensors, layout, 0.0)
    with pytest.raises(ValueError, match="segments"):
        op.sparse_attention(*tensors, layout, 1.0, torch.zeros(1, 100, dtype=torch.int32))
    q, k, v = tensors
    for given in ((q, k[..., :8], v), (q, k, v[:, :, :50]), (torch.cat([q, q]), k, v), (q, k[:, :1], v)):
        with pytest.raises(ValueError, match="queries, keys and values of"):
            op.sparse_attention(*given, layout, 1.0)
    with pytest.raises(ValueError, match=r"segments of \[\[1, 100\], \[1, 50\]\]"):
        op.sparse_attention(q, k, v, layout, 1.0, *(torch.zeros(1, n, dtype=torch.int32) for n in (100, 50)))
    assert op.unsupported(*(each.float() for each in tensors)) is None
    assert "float64" in op.unsupported(*tensors)
    assert "evenly" in op.unsupported(torch.zeros(1, 3, 4, 16), *(torch.zeros(1, 2, 4, 16) for _ in range(2)))
    assert "heads of 144" in op.unsupported(*(torch.zeros(1, 1, 4, 144) for _ in range(3)))


# -- the operator ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["one-order", "padded"])
def test_the_operator_passes_pytorchs_own_checks(name):
    case = CASES[name]
    layout, segments = case.layout(), case.segments or (None, None)
    inputs = [each.float().requires_grad_() for each in case.tensors()]
    tensors = list(vars(layout).values())[1:]
    arguments = (*inputs, *segments, *tensors, [], [layout.block], SCALE, None)
    torch.library.opcheck(op._operator, arguments)
    out, lse = op._operator(*arguments)
    given = [out, lse, *inputs, *segments, *tensors]
    given = [each if each is None else each.detach() for each in given]
    for grad_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(
            op._gradients, (torch.ones_like(out), grad_lse, *given, [], [layout.block], SCALE, None),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_one_of_two_outputs_has_a_gradient():
    case = CASES["more-keys"]
    for index in (0, 1):
        ours, exact = ([each.requires_grad_() for each in case.tensors()] for _ in range(2))
        found = op.sparse_attention(*ours, case.layout(), SCALE)[index].sum()
        right = dense(*exact, case.by_token())[index].sum()
        for one, other in zip(
            torch.autograd.grad(found, ours), torch.autograd.grad(right, exact, allow_unused=True), strict=True
        ):
            assert not one.any() if other is None else relative(one, other) < 1e-11


# -- the kernels -----------------------------------------------------------------------------------------------------
@pytest.mark.many("kind")
@on_triton
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_the_kernels(kind, name, device, cut):
    case = CASES[name]
    cut(case)
    compare(computed(case, torch.float32, device), wanted(case), 2e-6, 4e-6)


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device, cut):
    case = CASES["globals"]
    cut(case)
    rounded = case.tensors(dtype)
    right = [each.double().requires_grad_() for each in rounded]
    out, lse = dense(*right, case.by_token())
    grad_out, grad_lse = upstream(case)
    grad_out = grad_out.to(dtype).double()
    loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
    found = computed(case, dtype, device)
    assert found[0].dtype == found[2].dtype == dtype
    assert found[1].dtype == torch.float32
    # Weights and their gradients are rounded before their products.
    bound = 2 * BOUND[dtype]
    compare(found, [out.detach(), lse.detach(), *torch.autograd.grad(loss, right)], bound, 2 * bound)


@on_triton
@pytest.mark.parametrize("block", [64, 128])
def test_larger_blocks(block, device, cut):
    """Blocks of more than one word a row, read in several steps."""
    n = block + 9
    case = Case(_global_tokens(n) | drawn(1, n, n, share=0.05), [0], 1, n, n)
    layout = layout_of(case.seen, block, case.heads)
    compare(computed(case, torch.float32, device, layout), wanted(case), 2e-6, 4e-6)


@on_triton
def test_equal_calls_give_equal_bits(device, cut):
    case = Case(_global_tokens(64), [0, 0], 1, 64, 64, split=1)
    cut(case)
    first, second = (computed(case, torch.float32, device) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@on_triton
def test_tensors_may_have_other_strides(device):
    case = CASES["more-keys"]
    inputs = case.tensors(torch.float32, device)
    layout = to(case.layout(), device)
    right = op.sparse_attention(*inputs, layout, SCALE)
    others = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs[:2]]
    wide = torch.zeros(*inputs[2].shape[:3], 40, device=device)
    wide[..., 3 : 3 + case.DV] = inputs[2]
    found = op.sparse_attention(*others, wide[..., 3 : 3 + case.DV], layout, SCALE)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])
    assert found[0].transpose(1, 2).is_contiguous()  # what a projection reads


@on_triton
def test_passes_are_merged_by_their_lse(device):
    """Attention to two disjoint sets of keys, merged, is attention to both, gradients included."""
    case = CASES["window"]
    both = _global_tokens(100)
    parts = [to(layout_of(each, 32, case.heads), device) for each in (case.seen, both & ~case.seen)]
    inputs = [each.requires_grad_() for each in case.tensors(torch.float32, device)]
    outs, lses = zip(*(op.sparse_attention(*inputs, each, SCALE) for each in parts), strict=True)
    lse = torch.logaddexp(*lses)
    out = sum(o * (each - lse).exp()[..., None] for o, each in zip(outs, lses, strict=True))
    slope = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    gradients = torch.autograd.grad((out * slope).sum(), inputs)
    exact = [each.double().cpu().detach().requires_grad_() for each in inputs]
    right, _ = dense(*exact, both[None].expand(1, 2, -1, -1))
    assert relative(out.cpu(), right) < 2e-6
    for one, other in zip(gradients, torch.autograd.grad((right * slope.cpu()).sum(), exact), strict=True):
        assert relative(one.cpu(), other) < 4e-6


@on_triton
def test_queries_that_see_nothing_have_no_gradient_whatever_is_given(device):
    """Merging two lse of -inf has a gradient of NaN."""
    case = CASES["gaps"]
    inputs = [each.requires_grad_() for each in case.tensors(torch.float32, device)]
    out, lse = op.sparse_attention(*inputs, to(case.layout(), device), SCALE)
    given = torch.where(lse.isinf(), math.nan, 1.0)
    for each in torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), given)):
        assert torch.isfinite(each).all()


@on_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_large_scores(device):
    """Exponentials of masked scores overflow where the lse of a query is far below them."""
    case = CASES["causal"]
    inputs = case.tensors(torch.float32, device)
    inputs[0][:, :, ::2] *= 40
    layout = to(case.layout(), device)
    ours = [each.clone().requires_grad_() for each in inputs]
    exact = [each.double().cpu().requires_grad_() for each in inputs]
    out, _ = op.sparse_attention(*ours, layout, SCALE)
    right, _ = dense(*exact, case.by_token())
    assert relative(out.cpu(), right) < 2e-5
    pairs = torch.autograd.grad(out.sum(), ours), torch.autograd.grad(right.sum(), exact)
    for one, other in zip(*pairs, strict=True):
        assert torch.isfinite(one).all()
        assert relative(one.cpu(), other) < 2e-4


@on_triton
def test_the_operator_on_the_kernels_passes_pytorchs_own_checks(device, cut):
    case = CASES["dense"]._replace(split=1)
    cut(case)
    inputs, layout = case.tensors(torch.float32, device), to(case.layout(), device)
    made = op.prepare(layout, *inputs[:2])
    lists = [getattr(layout, name) for name in list(layout.__dataclass_fields__)[1:]]
    tensors, numbers = list(made[: op.TENSORS]), [layout.block, *made[op.TENSORS :]]
    arguments = (*(each.requires_grad_() for each in inputs), None, None, *lists, tensors, numbers, SCALE, None)
    torch.library.opcheck(op._operator, arguments)


@on_triton
@pytest.mark.parametrize(("N", "M"), [(0, 40), (40, 0)])
def test_nothing_to_attend(N, M, device):
    inputs = [torch.ones(1, 2, n, 16, device=device, requires_grad=True) for n in (N, M, M)]
    out, lse = op.sparse_attention(*inputs, to(layout_of(torch.ones(1, N, M).bool(), 32, [0, 0]), device), SCALE)
    assert out.shape == (1, 2, N, 16)
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert not any(each.any() for each in torch.autograd.grad((out, lse), inputs, (out + 1, lse)))


@on_triton
def test_a_prepared_layout_is_part_of_a_graph(device):
    """Without a break; a layout that was never used is refused while tracing."""
    case = CASES["more-keys"]
    inputs, layout = case.tensors(torch.float32, device), to(case.layout(), device)
    right = op.sparse_attention(*inputs, layout, SCALE)

    def call(query, key, value):
        return op.sparse_attention(query * 1.0, key, value, layout, SCALE)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(compiled(*inputs), right, strict=True))
    torch._dynamo.reset()


# -- on a device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("D", [64, 80, 128])
def test_bfloat16_on_a_device(block, D, cut):
    n = 1000
    seen = _global_tokens(n) | drawn(1, n, n, share=0.01)
    case = Case(seen, [0, 0, 0, 0], 2, n, n, D=D, DV=D, split=4)
    cut(case)
    inputs = [each.requires_grad_() for each in case.tensors(torch.bfloat16, "cuda")]
    exact = [each.double().detach().requires_grad_() for each in inputs]
    out, lse = op.sparse_attention(*inputs, to(layout_of(seen, block, case.heads), "cuda"), D**-0.5)
    scores = exact[0] @ exact[1].repeat_interleave(2, 1).mT * D**-0.5
    scores = scores.masked_fill(~seen.cuda(), float("-inf"))
    right = scores.softmax(-1) @ exact[2].repeat_interleave(2, 1)
    assert relative(out, right) < 2 * BOUND[torch.bfloat16]
    slope = torch.randn_like(right).bfloat16()
    found = torch.autograd.grad((out * slope).sum() + lse.sum(), inputs)
    goal = torch.autograd.grad((right * slope.double()).sum() + scores.logsumexp(-1).sum(), exact)
    for one, other in zip(found, goal, strict=True):
        assert relative(one, other) < 4 * BOUND[torch.bfloat16]


@pytest.mark.gpu
def test_a_captured_call(cut):
    case = CASES["globals"]
    cut(case)
    inputs, layout = case.tensors(torch.float32, "cuda"), to(case.layout(), "cuda")
    right = op.sparse_attention(*inputs, layout, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.sparse_attention(*inputs, layout, SCALE)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))

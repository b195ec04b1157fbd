"""Benchmark attention within buckets on a GPU: correctness against float64, then times beside SDPA.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/bucket_attention.py [WORD ...]

With words, only the sections that have one of them in their names run: ``check``, ``times``. Without a GPU ``check``
runs on a small shape (with ``TRITON_INTERPRET=1`` on the kernels).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from sections import Sections
from time_and_bytes import time_and_bytes

from hf_optim_kernels.bucket_attention import naive, op
from hf_optim_kernels.bucket_attention.op import Buckets
from hf_optim_kernels.common import benchmark

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16, HEADS, SIZE = torch.bfloat16, 16, 64
LENGTHS = [1 << power for power in range(10, 17)]
LSH = Buckets(64, 64, before=1, wrap=True, causal=True, no_self=True)
WAYS = {
    "lsh 64": LSH,
    "lsh 128": LSH._replace(width_q=128, width_k=128),
    "lsh 64 encoder": LSH._replace(after=1, causal=False),
    "clusters 256": Buckets(256, 256, causal=True, gathered=True),
}
section = Sections("bucket_attention.json")


def drawn(n, heads=HEADS, size=SIZE, dtype=BF16, seed=0):
    """Query, key, value, the gradient of the output, and random places."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    four = [torch.randn(1, heads, n, size, device=DEVICE, generator=random).to(dtype) for _ in range(4)]
    return *four, torch.rand(1, heads, n, device=DEVICE, generator=random).argsort(-1).int()


def ours(buckets):
    return lambda q, k, v, places: op.bucket_attention(q, k, v, places, places, buckets, SIZE**-0.5)[0]


def rounds(buckets, count):
    """As many rounds of hashing, merged by their log-sums."""

    def call(q, k, v, places):
        own = [places.roll(17 * number, -1) for number in range(count)]
        found = [op.bucket_attention(q, k, v, each, each, buckets, SIZE**-0.5) for each in own]
        weights = torch.stack([lse for _, lse in found]).softmax(0).to(q.dtype)
        return sum(out * weight[..., None] for (out, _), weight in zip(found, weights, strict=True))

    return call


def sdpa(causal):
    return lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def step_of(call):
    """Forward and backward, with the gradients of query, key and value."""

    def run(q, k, v, slope, places):
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        return torch.autograd.grad(call(*inputs, places), inputs, slope)

    return run


@section("check")
def check():
    """Relative errors of out, of the log-sums, and of gradients through both."""
    found = {}
    dtypes = {BF16: 0.008, torch.float16: 0.001, torch.float32: 4e-6}
    shapes = [(2, 64, 1024), (2, 128, 1024), (2, 80, 512)] if GPU else [(1, 16, 256)]
    for (name, buckets), (heads, size, n) in itertools.product(WAYS.items(), shapes):
        for dtype, bound in dtypes.items() if GPU else [(torch.float32, 4e-6)]:
            q, k, v, slope, places = drawn(n, heads, size, dtype)
            scale = size**-0.5
            inputs = [each.requires_grad_() for each in (q, k, v)]
            wide = [each.detach().double().requires_grad_() for each in inputs]
            out, lse = op.bucket_attention(*inputs, places, places, buckets, scale)
            seen, alone = naive.visible(places, places, buckets, n, n)
            scores = (wide[0] @ wide[1].mT * scale - alone * naive.ALONE).masked_fill(~seen, float("-inf"))
            right, sums = scores.softmax(-1) @ wide[2], scores.logsumexp(-1)
            some = sums.detach() > -naive.ALONE / 2
            loss, goal = (
                (one * slope.to(one.dtype)).sum() + torch.where(some, other, 0.0).sum()
                for one, other in ((out, lse), (right, sums))
            )
            pairs = [(out, right), (lse[some], sums[some])]
            pairs += zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(goal, wide), strict=True)
            errors = [benchmark.relative_error(one.detach(), other.detach()) for one, other in pairs]
            passed = max(errors[:2]) < bound and max(errors[2:]) < 2 * bound
            found[f"{name} {heads}x{size} n={n} {dtype}"] = {"errors": errors, "passed": passed}
            print(f"{name} {heads}x{size} n={n} {dtype}".ljust(50), *(f"{each:.1e}" for each in errors),
                  "ok" if passed else "FAILED", flush=True)  # fmt: skip
    return found


def timed(call, n, backward):
    """Microseconds of a call, and the bytes that it allocates at most; or why there are none."""
    run = step_of(call) if backward else lambda q, k, v, _, places: call(q, k, v, places)
    return time_and_bytes(run, lambda: [drawn(n, seed=seed) for seed in range(3 if n <= 16384 else 1)])


@section("times")
def times():
    """Forward, and forward with backward, by length, beside SDPA. Places are given: hashing and sorting are not timed."""
    if not GPU:
        return "no GPU"
    ways = {name: ours(buckets) for name, buckets in WAYS.items()}
    ways |= {"lsh 64, 4 rounds": rounds(LSH, 4), "sdpa causal": sdpa(True), "sdpa all": sdpa(False)}
    found = {}
    for backward in (False, True):
        print(f"{'step' if backward else 'forward'}, us".ljust(18), *(f"{n:>9}" for n in LENGTHS), flush=True)
        for name, call in ways.items():
            line = [timed(call, n, backward) for n in LENGTHS]
            found[f"{'step' if backward else 'forward'} {name}"] = {"lengths": LENGTHS, "times": line}
            print(name.ljust(18), *(f"{each.get('us', math.nan):9.0f}" for each in line), flush=True)
    for name in ways:
        megabytes = [each.get("bytes", 0) / 1e6 for each in found[f"step {name}"]["times"]]
        print(f"{name} step, MB".ljust(26), *(f"{each:8.0f}" for each in megabytes), flush=True)
    return found

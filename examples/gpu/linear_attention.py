"""Benchmark linear attention on a GPU: correctness against float64, then times beside SDPA and flash-linear-attention.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/linear_attention.py [WORD ...]

With words, only the sections that have one of them in their names run: ``check``, ``times``, ``decode``, ``peer``, and
``tiles``, which runs only if it is named. Without a GPU ``check`` runs on small shapes (with ``TRITON_INTERPRET=1`` on
the kernels).
"""

from __future__ import annotations

import functools
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from sections import Sections
from time_and_bytes import time_and_bytes

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common.support import can_run_triton
from hf_optim_kernels.linear_attention import op
from hf_optim_kernels.linear_attention.op import Settings, State

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16, HEADS, SIZE = torch.bfloat16, 16, 64
LENGTHS = [1 << power for power in range(10, 17)]
FEATURES = (64, 128, 256)
CAUSAL = Settings("positive", SIZE**-0.5)
ALL = CAUSAL._replace(causal=False)
TRIG = Settings("trig", 1.0, floor=0.05, eps=1e-3)
# The largest relative errors that pass, of out and of gradients: rounding of features, weights and states.
BOUNDS = {BF16: (0.012, 0.03), torch.float16: (0.003, 0.006), torch.float32: (2e-5, 1e-4)}
# Tokens of a chunk, rows of W at a time, warps, stages.
TRIED = {
    "forward": [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 32, 4, 2),
        (64, 64, 8, 2),
        (128, 64, 8, 2),
        (128, 32, 8, 2),
        (64, 128, 4, 1),
        (64, 128, 8, 1),
        (64, 128, 8, 2),
    ],
    "backward": [(64, 64, 8, 1), (64, 64, 4, 1), (64, 64, 8, 2), (128, 64, 8, 1)],
}
section = Sections("linear_attention.json")


def drawn(n, heads=HEADS, size=SIZE, groups=None, dtype=BF16, seed=0):
    """Query, key, value and the gradient of the output."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    shapes = [(1, h, n, size) for h in (heads, groups or heads, groups or heads, heads)]
    return [torch.randn(shape, device=DEVICE, generator=random).to(dtype) for shape in shapes]


def rows(m, size=SIZE, heads=1):
    """W: blocks of orthogonal rows with the lengths of normal ones."""
    random = torch.Generator().manual_seed(1)
    blocks = [torch.linalg.qr(torch.randn(heads, size, size, generator=random))[0] for _ in range(-(-m // size))]
    lengths = torch.randn(heads, m, size, generator=random).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks, 1)[:, :m] * lengths).to(DEVICE)


def step_of(call):
    """Forward and backward, with the gradients of query, key and value."""

    def run(q, k, v, slope):
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        return torch.autograd.grad(call(*inputs), inputs, slope)

    return run


def ours(m, settings=CAUSAL):
    weight = rows(m)
    return lambda q, k, v: op.linear_attention(q, k, v, weight, settings)[0]


def exact(q, k, v, weight, settings, gate):
    """Out in float64 from all pairs, for one head of keys at a time."""
    y = [x.double() * settings.scale**0.5 for x in (q, k)]
    if settings.eps >= 0:
        y = [a / (x.double().norm(dim=-1, keepdim=True) + settings.eps) for a, x in zip(y, (q, k), strict=True)]
    y = [a @ weight.double().mT for a in y], [a.square().sum(-1, keepdim=True) / 2 for a in y]
    if settings.kind == "trig":
        one, other = (torch.cat([a.sin(), a.cos()], -1) / math.sqrt(weight.shape[1]) for a in y[0])
    else:
        one, other = ((a - b).exp() for a, b in zip(*y, strict=True))
    pairs = one @ other.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if gate is not None:
        decay = gate.double().cumsum(-1)
        pairs = (
            pairs * (decay[..., None] - decay[:, :, None] + torch.log(-torch.expm1(gate.double()))[:, :, None]).exp()
        )
    if settings.causal:
        pairs = pairs.tril()
    bottom = pairs.sum(-1, keepdim=True)
    bottom = bottom.clamp(min=settings.floor) if settings.kind == "trig" else bottom
    return pairs / bottom @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)


CHECKED = [
    (CAUSAL, 2, 2, 64, 128, 2048, BF16), (CAUSAL, 4, 1, 128, 256, 1000, BF16), (CAUSAL, 2, 2, 80, 100, 1000, BF16),
    (ALL, 2, 2, 64, 256, 2048, BF16), (TRIG, 2, 2, 64, 64, 2048, BF16), (CAUSAL, 2, 2, 64, 64, 1024, torch.float16),
    (CAUSAL, 2, 2, 64, 64, 1024, torch.float32),
] if GPU else [(CAUSAL, 2, 1, 16, 16, 90, torch.float32), (TRIG, 2, 2, 16, 16, 70, torch.float32)]  # fmt: skip


@section("check")
def check():
    """Relative errors of out, of gradients, of steps, and whether two calls have equal bits."""
    found = {}
    for settings, heads, groups, size, m, n, dtype in CHECKED:
        *three, slope = drawn(n, heads, size, groups, dtype)
        weight = rows(m, size)
        settings = settings if settings.kind == "trig" else settings._replace(scale=size**-0.5)
        gate = F.logsigmoid(torch.randn(1, groups, n, device=DEVICE) + 2) if settings.kind == "trig" else None
        gates = [] if gate is None else [gate.requires_grad_()]
        inputs = [each.requires_grad_() for each in three]
        wide = [each.detach().double().requires_grad_() for each in (*three, *gates)]
        right = exact(*wide[:3], weight, settings, wide[3] if gates else None)
        out, state = op.linear_attention(*inputs, weight, settings, None, *gates, return_state=True)
        gradients = torch.autograd.grad(out, [*inputs, *gates], slope)
        goals = torch.autograd.grad(right, wide, slope.double())
        errors = [
            benchmark.relative_error(one.detach(), other.detach())
            for one, other in zip((out, *gradients), (right, *goals), strict=True)
        ]
        again = op.linear_attention(*inputs, weight, settings, None, *gates, return_state=True)[0]
        line = {"errors": errors, "equal bits": bool(torch.equal(out, again))}
        if settings.causal:
            cut = n - 4
            part = [each.detach()[:, :, :cut] for each in inputs], [each.detach()[:, :, :cut] for each in gates]
            _, state = op.linear_attention(*part[0], weight, settings, None, *part[1], return_state=True)
            with torch.no_grad():
                last = [
                    op.step(*(each[:, :, t : t + 1] for each in inputs), weight, settings, state,
                            *(each[:, :, t : t + 1].contiguous() for each in gates))
                    for t in range(cut, n)
                ]  # fmt: skip
            line["steps"] = benchmark.relative_error(torch.cat(last, 2), right.detach()[:, :, cut:])
        bound, gradient_bound = BOUNDS[dtype]
        passed = errors[0] < bound and max(errors[1:]) < gradient_bound and line.get("steps", 0.0) < bound
        name = f"{settings.kind} {'causal' if settings.causal else 'all'} {heads}/{groups}x{size} m={m} n={n} {dtype}"
        found[name] = {**line, "passed": passed and line["equal bits"]}
        print(name, " ".join(f"{each:.1e}" for each in errors), f"steps {line.get('steps', 0):.1e}",
              "ok" if found[name]["passed"] else "FAILED", flush=True)  # fmt: skip
    return found


def sdpa(causal):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def timed(call, n, backward):
    """Microseconds of a call, and the bytes that it allocates at most; or why there are none."""
    run = step_of(call) if backward else lambda q, k, v, _: call(q, k, v)
    return time_and_bytes(run, lambda: [drawn(n, seed=seed) for seed in range(3 if n <= 16384 else 1)])


def exponent(times, lengths):
    """The slope of the logarithm of time over that of length, by least squares."""
    x, y = ([math.log(each) for each in values] for values in (lengths, times))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)


@section("times")
def times():
    """Forward, and forward with backward, by length: ours by the number of features, and SDPA."""
    if not GPU:
        return "no GPU"
    ways = {f"{name} m={m}": ours(m, kind) for name, kind in (("causal", CAUSAL), ("all", ALL)) for m in FEATURES}
    ways |= {"causal sdpa": sdpa(True), "all sdpa": sdpa(False)}
    found = {}
    for backward in (False, True):
        kind = "step" if backward else "forward"
        print(f"{kind}, us".ljust(14), *(f"{n:>9}" for n in LENGTHS), "  from 4k: exponent", flush=True)
        for name, call in ways.items():
            line = [timed(call, n, backward) for n in LENGTHS]
            us = [each.get("us", math.nan) for each in line]
            grows = exponent(us[2:], LENGTHS[2:])
            found[f"{kind} {name}"] = {"lengths": LENGTHS, "times": line, "exponent": grows}
            print(name.ljust(14), *(f"{each:9.0f}" for each in us), f"{grows:9.2f}", flush=True)
        for name in ways:
            base = found[f"{kind} {name.split()[0]} sdpa"]["times"]
            less = [
                n for n, one, other in zip(LENGTHS, found[f"{kind} {name}"]["times"], base, strict=True)
                if one.get("us", math.inf) < other.get("us", math.nan)
            ]  # fmt: skip
            found[f"{kind} {name}"]["faster at"] = less
        crossing = {name: found[f"{kind} {name}"]["faster at"][:1] for name in ways if "sdpa" not in name}
        print("   first length that is faster than SDPA:", crossing, flush=True)
    for name in ways:
        megabytes = [each.get("bytes", 0) / 1e6 for each in found[f"step {name}"]["times"]]
        print(f"{name} step, MB".ljust(22), *(f"{each:8.0f}" for each in megabytes), flush=True)
    return found


@section("decode")
def decode():
    """One token after 4096, by batch rows: a step of the state, and SDPA over the keys."""
    if not GPU:
        return "no GPU"
    found = {}
    for batch, m in itertools.product((1, 16), FEATURES):
        q, k, v = (torch.randn(batch, HEADS, 1, SIZE, device=DEVICE).to(BF16) for _ in range(3))
        weight = rows(m)
        states = [State(*(each.clone() for each in op.empty_state(q, v, HEADS, weight, "positive"))) for _ in range(8)]
        keys = [torch.randn(2, batch, HEADS, 4096, SIZE, device=DEVICE).to(BF16) for _ in range(4)]
        with torch.no_grad():
            step = benchmark.graph_time([functools.partial(op.step, q, k, v, weight, CAUSAL, each) for each in states])
            whole = benchmark.graph_time([functools.partial(F.scaled_dot_product_attention, q, *each) for each in keys])
        found[f"{batch} rows, m={m}"] = {"step": step.us, "sdpa": whole.us}
        moved = 2 * 4 * batch * HEADS * m * (SIZE + 1)
        print(f"{batch:3} rows, m={m:3}: step {step.us:7.1f} us ({moved / step.us / 1e6:.2f} TB/s), "
              f"SDPA over 4096 keys {whole.us:7.1f} us", flush=True)  # fmt: skip
    return found


@section("peer")
def peer():
    """flash-linear-attention's chunks on features that are given: without the time of making them."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as problem:
        print("not installed:", problem)
        return f"not installed: {problem}"

    def call(q, k, v):
        found = chunk_linear_attn(q, k, v, normalize=True)
        return found[0] if isinstance(found, tuple) else found

    found = {}
    for m, n, backward in itertools.product((128, 256), LENGTHS[::2], (False, True)):
        random = torch.Generator(DEVICE).manual_seed(0)
        q, k = (torch.rand(1, n, HEADS, m, device=DEVICE, generator=random).to(BF16) for _ in range(2))
        v, slope = (torch.randn(1, n, HEADS, SIZE, device=DEVICE, generator=random).to(BF16) for _ in range(2))
        run = functools.partial(step_of(call), q, k, v, slope) if backward else functools.partial(call, q, k, v)
        try:
            us = benchmark.eager_time([run], 5).us
        except Exception as problem:
            us = f"{type(problem).__name__}: {str(problem)[:100]}"
        name = f"{'step' if backward else 'forward'} m={m} n={n}"
        found[name] = us
        print(f"   fla {name}: {us if isinstance(us, str) else round(us)} us", flush=True)
    return found


@section("tiles")
def tiles():
    """Other tiles at 16k tokens and 128 features; those in use are marked."""
    if not GPU or "tiles" not in sys.argv[1:]:
        return "not run"
    from hf_optim_kernels.linear_attention import launch

    found, n, m = {}, 16384, 128
    q, k, v, slope = drawn(n)
    weight = rows(m)
    used = {each: launch._tiles(each, q, v, weight, CAUSAL) for each in ("forward", "backward")}
    out, tops, logs, _ = launch.forward(q, k, v, weight, CAUSAL, None, None, None)
    for direction, tried in TRIED.items():
        for each in tried:
            given = launch.Tiles(*each)
            if direction == "forward":
                run = functools.partial(launch.forward, q, k, v, weight, CAUSAL, None, None, None, given=given)
            else:
                run = functools.partial(
                    launch.backward, slope, out, tops, logs, q, k, v, weight, CAUSAL, None, None, None, given
                )
            try:
                us = benchmark.graph_time([run], 9).us
            except Exception as problem:
                torch.cuda.synchronize()
                us = f"{type(problem).__name__}: {str(problem)[:80]}"
            found[f"{direction} {tuple(given)}"] = us
            shown = us if isinstance(us, str) else f"{us:.0f} us"
            print(f"   {direction} {tuple(given)}: {shown}{' (used)' if given == used[direction] else ''}", flush=True)
    return found


if __name__ == "__main__":
    print("kernels" if can_run_triton(torch.empty(0, device=DEVICE)) else "specification", "on", DEVICE)

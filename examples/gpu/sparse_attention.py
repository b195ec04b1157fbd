"""Benchmark block-sparse attention on a GPU: correctness against float64, then times beside SDPA and FlexAttention.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/sparse_attention.py [WORD ...]

With words, only the sections that have one of them in their names run: ``check``, ``bounds``,
``first call``, ``tiles``, ``times``, ``lengths``. Kernels of ``tiles`` are compiled by processes of their own first.
``sparse_attention_page.py`` writes the page and draws.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sparse_layouts
import torch
import torch.nn.functional as F
from sections import Sections
from sparse_attention_cases import (
    BF16,
    BLOCKS,
    DEVICE,
    LENGTHS,
    PATTERNS,
    SHAPES,
    Shape,
    drawn,
    layout_of,
    pattern_of,
    sets,
)
from sparse_attention_tiles import try_tiles

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.sparse_attention import items, op
from hf_optim_kernels.sparse_attention.tiles import piece


def ours(shape, block):
    layout = layout_of(shape, block)
    return lambda q, k, v: op.sparse_attention(q, k, v, layout, shape.size**-0.5)[0]


def sdpa(shape):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)


def flex(shape, natural=False):
    """FlexAttention of the same blocks of 128, compiled. A pattern with an order gets its tokens permuted by the call."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    pattern = pattern_of(shape)
    if natural:
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, q, k: pattern.predicate(q, k), None, None, shape.n, shape.n, DEVICE)
    else:
        mask = sparse_layouts.block_mask(pattern, layout_of(shape, 128))
    compiled = torch.compile(flex_attention, dynamic=False)
    if pattern.order is None or natural:
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    back = pattern.order.argsort()
    return lambda *given: compiled(*(each[:, :, pattern.order] for each in given), block_mask=mask)[:, :, back]


def step(call):
    """Forward and backward of a call, with the gradients of queries, keys and values."""

    def run(q, k, v, slope):
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        return torch.autograd.grad(call(*inputs), inputs, slope)

    return run


def timed(make, inputs, backward=False):
    """Microseconds of a call over the inputs in turn, or why there are none; and the seconds of its first call."""
    try:
        call = make()
        run = step(call) if backward else lambda q, k, v, _: call(q, k, v)
        start = time.perf_counter()
        run(*inputs[0])
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        calls = [functools.partial(run, *each) for each in inputs]
        try:
            found = benchmark.graph_time(calls, 15).us
        except Exception as problem:
            torch.cuda.synchronize()
            print("   not captured:", type(problem).__name__, str(problem)[:120], flush=True)
            found = benchmark.eager_time(calls).us
        return found, first
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:150]}", None


def exact(q, k, v, slope, scale, predicate):
    """out, lse and gradients in float64, one head at a time."""
    found = []
    at = torch.arange(q.shape[2], device=q.device)
    seen = predicate(at[:, None], at)
    for h in range(q.shape[1]):
        head = [each[:, h].double().requires_grad_() for each in (q, k, v)]
        scores = (head[0] @ head[1].mT * scale).masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ head[2]
        lse = scores.logsumexp(-1)
        found.append([out, lse, *torch.autograd.grad((out * slope[:, h].double()).sum() + lse.sum(), head)])
    return [torch.stack([each.detach() for each in column], 1) for column in zip(*found, strict=True)]


def error(one, other):
    return float((one.detach().double() - other).norm() / other.norm())


# Shapes that are compared with float64: heads, head size, tokens; the last does not fill its blocks.
CHECKED = [(2, 64, 2048), (2, 128, 1000)] if DEVICE == "cuda" else [(1, 16, 90)]
# The type and the block that are timed; tests/kernels has the others.
DTYPES = (BF16,) if DEVICE == "cuda" else (torch.float32,)


def check():
    """Relative errors of out, lse and gradients; whether two calls have equal bits."""
    found, worst = {}, {}
    for (heads, size, n), name, dtype in itertools.product(CHECKED, PATTERNS, DTYPES):
        shape = Shape(heads, size, n, name)
        if (n % 32 and name == "strided 32") or (dtype == torch.float32 and size > 64):
            continue
        (q, k, v, slope), pattern, scale = drawn(shape, dtype=dtype)[0], pattern_of(shape), size**-0.5
        right = exact(q, k, v, slope, scale, pattern.predicate)
        for block, split in itertools.product((64,), (None, 2)):
            layout = sparse_layouts.layout(pattern, block, heads)
            rows = []
            if split:  # lists of more than two blocks are cut
                made = items.make(layout, heads, heads, n, n, split)
                layout._hf_optim_plans = {(1, heads, heads, n, n): made}
            for _ in range(2):
                inputs = [each.detach().requires_grad_() for each in (q, k, v)]
                out, lse = op.sparse_attention(*inputs, layout, scale)
                rows.append([out, lse, *torch.autograd.grad((out, lse), inputs, (slope, torch.ones_like(lse)))])
            errors = [error(*pair) for pair in zip(rows[0], right, strict=True)]
            same = all(torch.equal(*pair) for pair in zip(*rows, strict=True))
            found[f"{shape} {dtype} {block} {split}"] = {"errors": errors, "same": same}
            key = str(dtype)
            worst[key] = [max(pair) for pair in zip(errors, worst.get(key, errors), strict=True)]
            if not same or not max(errors) < (1e-5 if dtype == torch.float32 else 2e-2):
                print("WRONG", shape, dtype, block, split, errors, same, flush=True)
    for key, values in worst.items():
        print(key, "out, lse, dq, dk, dv:", " ".join(f"{each:.1e}" for each in values), flush=True)
    return found | {"worst": worst}


# A Hopper multiprocessor: exponentials in a cycle, cycles in a microsecond; how many a device has.
EXPONENTIALS, CYCLES, PROCESSORS = 16, 1755, 132


def bounds(shape, block, bytes_us=4.2e6, flops_us=785e6):
    """Microseconds of the forward by what it multiplies, exponentiates and moves, and its programs a multiprocessor.

    Blocks are counted whole, and keys as read from memory once.
    """
    layout = layout_of(shape, block)
    pairs = len(layout.columns) * block**2 * shape.heads
    split = piece(shape.heads, len(layout.columns), layout.starts.shape[1] - 1, block, PROCESSORS)
    plan = items.make(layout, shape.heads, shape.heads, shape.n, shape.n, split)
    return {
        "multiply": 4 * pairs * shape.size / flops_us,
        "exponentials": pairs / (EXPONENTIALS * CYCLES * PROCESSORS),
        "bytes": 4 * 2 * shape.heads * shape.n * shape.size / bytes_us,
        "programs": shape.heads * plan.q_items.shape[1] / PROCESSORS,
        "longest": int((plan.q_items[..., 3] - plan.q_items[..., 1]).max()),
        "merged": plan.q_slots,
    }


def measure(shape, blocks=BLOCKS, with_flex=True, backward=True, dense=None):
    """A row: microseconds of each way, forward and forward with backward, and seconds of first calls."""
    inputs = sets(shape)
    ways = {f"ours {block}": functools.partial(ours, shape, block) for block in blocks}
    ways |= {"flex": functools.partial(flex, shape)} if with_flex else {}
    ways |= {"sdpa": functools.partial(sdpa, shape)} if dense is None else {}
    row = {"share": sparse_layouts.visible_share(layout_of(shape, 64), shape.n)}
    row["bounds"] = {block: bounds(shape, block) for block in blocks}
    for name, make in ways.items():
        forward, first = timed(make, inputs)
        row[name] = {"forward": forward, "first_s": first}
        if backward:
            row[name]["step"], row[name]["first_step_s"] = timed(make, inputs[:2], backward=True)
    if dense:
        row["sdpa"] = dense
    return row


def show(shape, row):
    parts = []
    for name, each in row.items():
        if isinstance(each, dict) and "forward" in each:
            values = [each.get("forward"), each.get("step")]
            parts.append(name + " " + " / ".join(f"{x:.0f}" if isinstance(x, float) else str(x)[:60] for x in values))
    fair = row["sdpa"]["forward"] * row["share"] * (2 if shape.causal else 1) if "sdpa" in row else 0
    least = {
        block: max(each[k] for k in ("multiply", "exponentials", "bytes")) for block, each in row["bounds"].items()
    }
    print(
        f"{shape.heads}x{shape.size} {shape.n:6d} {shape.pattern:18s} visible {row['share']:.3f}", "; ".join(parts),
        f"| least {', '.join(f'{us:.0f}' for us in least.values())}, share of SDPA {fair:.0f}", flush=True,
    )  # fmt: skip


def main():
    section = Sections("sparse_attention.json")
    wants = lambda name: not sys.argv[1:] or any(word in name for word in sys.argv[1:])  # noqa: E731

    section("check")(check)

    @section("bounds")
    def _():
        """What the forward cannot be faster than: needs no GPU."""
        found = {}
        for shape, block in itertools.product(SHAPES, BLOCKS):
            found[f"{tuple(shape)} {block}"] = row = bounds(shape, block)
            print(f"{shape.heads}x{shape.size} {shape.n:6d} {shape.pattern:18s} {block:3d}",
                  ", ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)  # fmt: skip
        return found

    @section("first call")
    def _():
        """Seconds of the first forward and the first step of a process, with nothing compiled before."""
        found = {}
        for size, block in ((64, 64), (64, 128), (128, 128)):
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"TRITON_CACHE_DIR": folder}
                script = [sys.executable, __file__, "--first", str(size), str(block)]
                out = subprocess.run(script, env=environment, capture_output=True, text=True)
                found[f"{size} {block}"] = out.stdout.split() or out.stderr[-300:]
                print(size, block, found[f"{size} {block}"], flush=True)
        return found

    @section("ceilings")
    def _():
        found = {"bytes_us": benchmark.copy_bandwidth(), "flops_us": benchmark.matmul_rate()}
        print(found, flush=True)
        return found

    if wants("tiles"):
        start, count = time.perf_counter(), min(16, os.cpu_count() or 1)
        script = [sys.executable, Path(__file__).with_name("sparse_attention_tiles.py")]
        others = [subprocess.Popen([*script, str(i), str(count)]) for i in range(count)]
        for other in others:
            other.wait()
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    section("tiles")(try_tiles)

    @section("times")
    def _():
        """Microseconds, forward and forward with backward, of the shapes that have goals."""
        found, dense = {}, {}
        for shape in SHAPES:
            row = measure(shape, dense=dense.get(shape[:3]))
            dense[shape[:3]] = row["sdpa"]
            if shape.pattern == "strided 32" and shape.n == 4096:
                row["flex natural"] = dict(
                    zip(("forward", "first_s"), timed(lambda: flex(shape, True), sets(shape)), strict=True)
                )
            found[str(tuple(shape))] = row
            show(shape, row)
        return found

    @section("lengths")
    def _():
        """Microseconds of the forward by length; dense attention up to 65,536 tokens."""
        found, dense = {}, {}
        for n, name in itertools.product(LENGTHS, list(PATTERNS)[:4]):
            shape = Shape(12, 64, n, name)
            known = dense.get(n) or ({"forward": float("nan")} if n > 65536 else None)
            row = measure(shape, with_flex=name == "window 256", backward=False, dense=known)
            dense[n] = row["sdpa"]
            found[f"{name} {n}"] = row
            show(shape, row)
            layout_of.cache_clear()
            torch.cuda.empty_cache()
        return found


def first(size, block):
    """Print the seconds of a process's first forward and first step."""
    shape = Shape(12, size, 4096, "big bird")
    inputs, call = drawn(shape)[0], ours(shape, block)
    layout_of(shape, block)
    torch.cuda.synchronize()
    for run in (lambda: call(*inputs[:3]), lambda: step(call)(*inputs)):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--first"]:
        first(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()

"""Benchmark the experts of a mixture on a GPU: correctness against float64, then times.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/experts.py [WORD ...]

With words, only the sections that have one of them in their names run. Kernels are compiled by processes of their own
first, as many as there are cores. ``tiles`` times each launch with several tiles.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.experts import launch, naive, routing
from hf_optim_kernels.experts.launch import Plan, Tiles
from hf_optim_kernels.experts.naive import Gate, Weights


class Shape(NamedTuple):
    """A mixture layer: hidden size, inner size, experts, choices of a token, and what is between its matrices."""

    d: int
    inner: int
    experts: int
    top_k: int
    gate: Gate = Gate()
    bias: bool = False
    transposed: bool = False


CLAMPED = Gate(naive.INTERLEAVED, naive.SILU, 1.702, 1.0, 7.0)
SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "olmoe": Shape(2048, 1024, 64, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, CLAMPED, True, True),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
}
TUNED = ("qwen3-30b-a3b", "mixtral")
TOKENS = (1, 8, 64, 512, 4096)
DECODE_UP = [Tiles(*t) for t in ((16, 256, 4, 3), (8, 256, 2, 3), (4, 512, 4, 3), (16, 256, 4, 4), (32, 256, 8, 3), (16, 128, 4, 5))]
DECODE_DOWN = [
    Tiles(n, k, w, s, split=p) for n, k, w, s, p in (
        (16, 256, 2, 3, 8), (32, 256, 4, 3, 8), (16, 256, 2, 4, 8), (8, 256, 1, 3, 8), (32, 128, 4, 4, 8), (32, 256, 4, 4, 4),
        (16, 128, 2, 5, 8), (64, 256, 8, 3, 8),
    )
]  # fmt: skip
DECODE_UP_TRANSPOSED = [Tiles(*t) for t in ((32, 64, 4, 3), (64, 64, 4, 4), (32, 128, 4, 3), (64, 32, 4, 4), (32, 64, 4, 5), (32, 32, 2, 5))]
DECODE_DOWN_TRANSPOSED = [
    Tiles(n, k, w, s, split=4) for n, k, w, s in ((64, 64, 4, 3), (128, 32, 4, 4), (64, 128, 4, 3), (64, 64, 4, 5), (64, 32, 2, 5), (128, 64, 4, 4))
]  # fmt: skip
_TMA, _RUN = {"described": True}, {"described": True, "persistent": True}
UP = {
    16: [Tiles(32, 256, 4, 3), Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 4), Tiles(64, 128, 4, 4, **_TMA), Tiles(32, 128, 4, 4, **_TMA)],
    32: [Tiles(32, 128, 4, 4), Tiles(64, 128, 4, 3, **_TMA), Tiles(64, 64, 4, 5, **_TMA)],
    64: [Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 4, **_TMA), Tiles(128, 64, 8, 4, **_TMA), Tiles(128, 64, 4, 3, **_TMA), Tiles(64, 128, 4, 3, **_TMA)],
    128: [Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3, **_TMA), Tiles(128, 64, 8, 4, **_TMA), Tiles(128, 64, 8, 4, halves=True, **_TMA),
          Tiles(128, 64, 8, 4, group=4, **_TMA), Tiles(64, 64, 4, 3, **_TMA), Tiles(64, 64, 8, 4, **_TMA)],
}  # fmt: skip
DOWN = {
    16: [Tiles(128, 128, 4, 4), Tiles(64, 128, 4, 4), Tiles(128, 128, 4, 4, **_TMA)],
    32: [Tiles(128, 128, 4, 3), Tiles(128, 128, 4, 3, **_TMA), Tiles(128, 64, 4, 5, **_TMA)],
    64: [Tiles(128, 64, 4, 4), Tiles(128, 64, 4, 4, **_TMA), Tiles(256, 64, 8, 4, **_TMA), Tiles(128, 64, 4, 4, **_RUN), Tiles(256, 64, 4, 3, **_RUN)],
    128: [Tiles(256, 64, 8, 4), Tiles(256, 64, 8, 3, **_TMA), Tiles(256, 64, 8, 4, **_TMA), Tiles(256, 64, 8, 3, **_RUN), Tiles(128, 64, 8, 4, **_RUN),
          Tiles(128, 64, 4, 4, **_RUN), Tiles(128, 64, 8, 4, **_TMA), Tiles(256, 64, 8, 3, group=4, **_RUN)],
}  # fmt: skip
# The first product with rows that were gathered before.
GATHERED = {128: [Tiles(128, 64, 8, 3, **_RUN), Tiles(128, 64, 8, 3, group=4, **_RUN), Tiles(64, 64, 8, 4, **_RUN)]}
# Tokens -> rows of blocks that are tried.
BLOCKS = {
    "qwen3-30b-a3b": {8: (16,), 64: (16,), 512: (64, 32), 4096: (128, 64)},
    "mixtral": {8: (16,), 64: (32, 64), 512: (128,), 4096: (128,)},
    "gpt-oss-20b": {8: (16,), 64: (16,), 512: (128, 64), 4096: (128,)},
}


@functools.lru_cache(maxsize=2)
def layers(name, count=2):
    """Random experts of a shape, ``count`` times."""
    shape = SHAPES[name]
    random = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=random) / size[-1] ** 0.5  # noqa: E731
    found = []
    for _ in range(count):
        rows = shape.inner * (1 if shape.gate.layout == naive.UNGATED else 2)
        up, down = draw(shape.experts, rows, shape.d), draw(shape.experts, shape.d, shape.inner)
        biases = (draw(shape.experts, rows), draw(shape.experts, shape.d)) if shape.bias else (None, None)
        if shape.transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        found.append(Weights(up, down, *biases, shape.transposed))
    return found


def batch(name, tokens, seed=0):
    """Random hidden states, choices and weights."""
    shape = SHAPES[name]
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, shape.d, device="cuda", generator=random).to(torch.bfloat16)
    scores, chosen = torch.rand(tokens, shape.experts, device="cuda", generator=random).topk(shape.top_k, dim=1)
    return hidden, chosen, (scores / scores.sum(1, keepdim=True)).to(torch.bfloat16)


def situations(name, tokens):
    """Layers with batches: as many that no call finds its weights in the L2 cache."""
    count = 8 if tokens == 1 else 4
    return [(layers(name)[i % 2], *batch(name, tokens, i)) for i in range(count)]


def floor(name, tokens, bandwidth, rate):
    """Microseconds to read the experts that are hit, or to multiply."""
    shape = SHAPES[name]
    hit = len(batch(name, tokens)[1].unique())
    matrices = 3 if shape.gate.layout else 2
    size = matrices * shape.d * shape.inner
    return max(hit * size * 2 / bandwidth, 2 * tokens * shape.top_k * size / rate)


def launches(name, tokens, block, which, situation):
    """A function of tiles that is one launch: 0 the first product, 1 the second, 2 the first of gathered rows."""
    shape, (given, hidden, chosen, weights) = SHAPES[name], situation
    if block == 0:
        usual = (DECODE_UP_TRANSPOSED if shape.transposed else DECODE_UP)[0]
        middle, semaphores = launch.decode_up(hidden, chosen, given, shape.gate, usual)
        if which == 0:
            return lambda t: launch.decode_up(hidden, chosen, given, shape.gate, t)
        return lambda t: launch.decode_down(middle, semaphores, chosen, weights, given, t, torch.bfloat16)
    found = routing.route(chosen, shape.experts, block)
    up, down = given.matrices
    if which == 1:
        middle = torch.randn(tokens * shape.top_k, shape.inner, device="cuda", dtype=torch.bfloat16)
        return lambda t: launch.rows_product(middle, down, given.down_bias, found, 0, True, block, None, t)
    x, top_k = (hidden, shape.top_k) if which == 0 else (hidden[found.order // shape.top_k], 0)
    return lambda t: launch.rows_product(x, up, given.up_bias, found, top_k, False, block, shape.gate, t)


def trials():
    """(shape, tokens, rows of a block, which product, tiles)."""
    for name in BLOCKS:
        decode = (DECODE_UP_TRANSPOSED, DECODE_DOWN_TRANSPOSED) if SHAPES[name].transposed else (DECODE_UP, DECODE_DOWN)
        for which in (0, 1):
            yield from ((name, 1, 0, which, t) for t in decode[which])
        for tokens, blocks in BLOCKS[name].items():
            for block, (which, tiles) in itertools.product(blocks, enumerate((UP, DOWN, GATHERED))):
                yield from ((name, tokens, block, which, t) for t in tiles.get(block, ()))


def warm(index, count):
    """Compile the kernels of every ``count``-th trial, and those of the plans."""
    todo = sorted({(n, b, w, t): None for n, _, b, w, t in trials()}, key=str)[index::count]
    for name, block, which, tiles in sorted(todo, key=lambda one: one[0]):
        try:
            launches(name, 2, block, which, (layers(name, 1)[0], *batch(name, 2)))(tiles)
        except Exception as problem:
            print("warm", name, block, which, tiles, type(problem).__name__, str(problem)[:200], flush=True)
    names = list(SHAPES)
    if index < len(names):
        layers.cache_clear()
        name = names[index]
        for tokens in TOKENS:
            given = layers(name, 1)[0]
            launch.mixture(*batch(name, tokens), given, SHAPES[name].gate)
    torch.cuda.synchronize()


def main():
    if not sys.argv[1:] or any("tiles" in word for word in sys.argv[1:]):
        start, count = time.perf_counter(), os.cpu_count() or 1
        others = [subprocess.Popen([sys.executable, __file__, "--warm", str(i), str(count)]) for i in range(count)]
        for other in others:
            other.wait()
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    section = Sections("experts.json")

    @section("check")
    def _():
        """Relative error of whole layers against float64, by shape and number of tokens."""
        found = {}
        for name in SHAPES:
            shape, given = SHAPES[name], layers(name, 1)[0]
            for tokens in (1, 3, 8, 130):
                hidden, chosen, weights = batch(name, tokens, tokens)
                if tokens == 8:
                    chosen[::2, 0] = shape.experts
                wide = naive.mixture(hidden.double(), chosen, weights.double(), given, shape.gate)
                own = launch.mixture(hidden, chosen, weights, given, shape.gate)
                again = launch.mixture(hidden, chosen, weights, given, shape.gate)
                error = float((own.double() - wide).norm() / wide.norm())
                found[f"{name} {tokens}"] = {"error": error, "same": bool(torch.equal(own, again))}
            print(name, {k: f"{v['error']:.1e} {v['same']}" for k, v in found.items() if k.startswith(name)}, flush=True)
            layers.cache_clear()
        return found

    @section("ceilings")
    def _():
        found = {"bytes_us": benchmark.copy_bandwidth(), "flops_us": benchmark.matmul_rate()}
        print(found, flush=True)
        return found

    @section("tiles")
    def _():
        """Microseconds of each launch by its tiles."""
        found = {}
        for key, group in itertools.groupby(trials(), key=lambda trial: trial[:4]):
            name, tokens, block, which = key
            made, rows = [launches(name, tokens, block, which, one) for one in situations(name, tokens)], {}
            for *_, tiles in group:
                try:
                    rows[_short(tiles)] = benchmark.graph_time([functools.partial(m, tiles) for m in made], 15).us
                except Exception as problem:
                    print(key, tiles, type(problem).__name__, str(problem)[:150], flush=True)
            found[str(key)] = rows
            best = sorted(rows.items(), key=lambda pair: pair[1])
            print(key, "; ".join(f"{t} {us:.1f}" for t, us in best[:4]), "| worst", f"{best[-1][1]:.1f}", flush=True)
        return found

    @section("decode or blocks")
    def _():
        """Microseconds of a few tokens by the kernels of decoding, and by grouped products."""
        found = {}
        for name, tokens in itertools.product(("qwen3-30b-a3b", "mixtral", "olmoe"), (1, 2, 4, 8)):
            shape, row = SHAPES[name], {}
            usual = launch.default_tiles(16, shape.inner, shape.d, True), launch.default_tiles(16, shape.d, shape.inner, False)
            for label, how in {"decode": launch.plan(1, shape.top_k, shape.experts, shape.inner, shape.d, False, True), "blocks": Plan(16, *usual)}.items():
                run = lambda given, *rest: launch.mixture(*rest, given, shape.gate, how)  # noqa: B023, E731
                row[label] = benchmark.graph_time([functools.partial(run, *one) for one in situations(name, tokens)]).us
            found[f"{name} {tokens}"] = row
            print(name, tokens, {k: round(v, 1) for k, v in row.items()}, flush=True)
        return found

    @section("parts")
    def _():
        """Microseconds of routing and of the sum over experts."""
        found = {}
        for name in TUNED:
            for tokens in TOKENS:
                shape = SHAPES[name]
                hidden, chosen, weights = batch(name, tokens)
                rows = hidden.new_zeros(tokens * shape.top_k, shape.d).normal_()
                block = launch.block_rows(tokens * shape.top_k, shape.experts)
                found[f"{name} {tokens}"] = row = {
                    "route": benchmark.graph_time([lambda: routing.route(chosen, shape.experts, block)] * 8).us,
                    "combine": benchmark.graph_time([lambda: launch.combine(rows, chosen, weights, shape.experts, torch.bfloat16)] * 8).us,
                }
                print(name, tokens, {k: round(v, 1) for k, v in row.items()}, flush=True)
        return found

    @section("blocks")
    def _():
        """Microseconds of a whole layer beside torch's grouped product with sorted tokens."""
        found = {}
        ceilings = section.result.get("ceilings") or {"bytes_us": 4.2e6, "flops_us": 785e6}
        for name in SHAPES:
            for tokens in TOKENS:
                shape, made = SHAPES[name], situations(name, tokens)
                run = lambda given, *rest: launch.mixture(*rest, given, shape.gate)  # noqa: B023, E731
                row = {"ours": benchmark.graph_time([functools.partial(run, *m) for m in made]).us}
                row["torch"] = benchmark.graph_time([grouped_mm(shape, *m) for m in made]).us
                row["floor"] = floor(name, tokens, ceilings["bytes_us"], ceilings["flops_us"])
                row["plan"] = str(launch.plan(tokens, shape.top_k, shape.experts, shape.inner, shape.d, shape.transposed, True))
                found[f"{name} {tokens}"] = row
                print(f"{name:18s} {tokens:5d} ours {row['ours']:8.1f} torch {row['torch']:8.1f} floor {row['floor']:8.1f}", flush=True)
            layers.cache_clear()
        return found


def _short(tiles):
    usual = Tiles(0, 0, 0, 0)
    extra = [f"{n}={getattr(tiles, n)}" for n in Tiles._fields[4:] if getattr(tiles, n) != getattr(usual, n)]
    return " ".join(map(str, (*tiles[:4], *extra)))


def grouped_mm(shape, given, hidden, chosen, weights):
    """torch's grouped product for sorted tokens with the activation between, without sorting and combining."""
    ordered, order = chosen.reshape(-1).sort()
    ends = torch.searchsorted(ordered, torch.arange(shape.experts, device="cuda"), right=True).to(torch.int32)
    rows = hidden[order // shape.top_k]
    up, down = (m.transpose(1, 2) for m in given.matrices)

    def call():
        inner = F.grouped_mm(rows, up, offs=ends)
        first, second = inner.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(first) * second, down, offs=ends)

    return call


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        warm(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()

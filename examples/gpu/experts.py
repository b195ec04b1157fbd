"""Benchmark the experts of a mixture on a GPU: correctness against float64, then times.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/experts.py [WORD ...]

With words, only the sections that have one of them in their names run. Kernels are compiled by processes of their own
first, as many as there are cores. ``tiles`` times each launch with several tiles.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common import launch as launching
from hf_optim_kernels.experts import launch, naive, op, routing, training
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
WAYS = ("stock", "stock, eager", "accelerated", "door, captured", "door", "door, choices in one launch")
TOKENS = (1, 8, 64, 512, 4096)
DECODE_UP = [
    Tiles(*t)
    for t in ((16, 256, 4, 3), (8, 256, 2, 3), (4, 512, 4, 3), (16, 256, 4, 4), (32, 256, 8, 3), (16, 128, 4, 5))
]
DECODE_DOWN = [
    Tiles(n, k, w, s, split=p) for n, k, w, s, p in (
        (16, 256, 2, 3, 8), (32, 256, 4, 3, 8), (16, 256, 2, 4, 8), (8, 256, 1, 3, 8), (32, 128, 4, 4, 8), (32, 256, 4, 4, 4),
        (16, 128, 2, 5, 8), (64, 256, 8, 3, 8),
    )
]  # fmt: skip
DECODE_UP_TRANSPOSED = [
    Tiles(*t) for t in ((32, 64, 4, 3), (64, 64, 4, 4), (32, 128, 4, 3), (64, 32, 4, 4), (32, 64, 4, 5), (32, 32, 2, 5))
]
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
OUTER_TILES = [
    Tiles(*t) for t in ((128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (256, 128, 8, 3), (64, 256, 4, 3))
]
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


def warm(what, index, count):
    """Compile the kernels of every ``count``-th trial (``tiles``), or those of whole layers (``blocks``)."""
    todo = sorted({(n, b, w, t): None for n, _, b, w, t in trials()}, key=str)[index::count] if what == "tiles" else []
    for name, block, which, tiles in sorted(todo, key=lambda one: one[0]):
        try:
            launches(name, 2, block, which, (layers(name, 1)[0], *batch(name, 2)))(tiles)
        except Exception as problem:
            print("warm", name, block, which, tiles, type(problem).__name__, str(problem)[:200], flush=True)
    for name, tokens in list(itertools.product(SHAPES, TOKENS))[index::count]:
        layers.cache_clear()
        launch.mixture(*batch(name, tokens), layers(name, 1)[0], SHAPES[name].gate)
    torch.cuda.synchronize()


def main():
    folder = Path(tempfile.mkdtemp())
    wants = lambda name: not sys.argv[1:] or any(word in name for word in sys.argv[1:])  # noqa: E731
    script = [sys.executable, __file__]
    ways = WAYS if wants("generate") else ()
    generating = {way: subprocess.Popen([*script, "--generate", way, str(folder)]) for way in ways}
    if wants("tiles") or wants("blocks"):
        start, count = time.perf_counter(), os.cpu_count() or 1
        which = "tiles" if wants("tiles") else "blocks"
        others = [subprocess.Popen([*script, "--warm", which, str(i), str(count)]) for i in range(count)]
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
            print(
                name, {k: f"{v['error']:.1e} {v['same']}" for k, v in found.items() if k.startswith(name)}, flush=True
            )
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
            usual = (
                launch.default_tiles(16, shape.inner, shape.d, True),
                launch.default_tiles(16, shape.d, shape.inner, False),
            )
            for label, how in {
                "decode": launch.plan(1, shape.top_k, shape.experts, shape.inner, shape.d, False, True),
                "blocks": Plan(16, *usual),
            }.items():
                run = lambda given, *rest: launch.mixture(*rest, given, shape.gate, how)  # noqa: E731
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
                    "combine": benchmark.graph_time(
                        [lambda: launch.combine(rows, chosen, weights, shape.experts, torch.bfloat16)] * 8
                    ).us,
                }
                print(name, tokens, {k: round(v, 1) for k, v in row.items()}, flush=True)
        return found

    @section("blocks")
    def _():
        """Microseconds of a whole layer, replayed graphs, beside transformers' functions and torch's grouped product."""
        found = {}
        ceilings = section.result.get("ceilings") or {"bytes_us": 4.2e6, "flops_us": 785e6}
        for name, tokens in itertools.product(SHAPES, TOKENS):
            shape, made = SHAPES[name], situations(name, tokens)
            run = lambda given, *rest: launch.mixture(*rest, given, shape.gate)  # noqa: E731
            ways = {"ours": [functools.partial(run, *one) for one in made]}
            ways["torch"] = [grouped_mm(shape, *one) for one in made]
            for key in ("grouped_mm", "batched_mm") if tokens * shape.top_k <= 512 else ("grouped_mm",):
                ways[key] = [transformers_call(shape, key, *one) for one in made]
            row = {key: _timed(calls) for key, calls in ways.items()}
            row["eager"] = _timed([transformers_call(shape, "eager", *one) for one in made[:2]], captured=False)
            row["floor"] = floor(name, tokens, ceilings["bytes_us"], ceilings["flops_us"])
            found[f"{name} {tokens}"] = row
            print(
                f"{name:17s} {tokens:5d} "
                + " ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
            if tokens == TOKENS[-1]:
                layers.cache_clear()
        return found

    @section("launches of whole layers")
    def _():
        """Microseconds of each launch of replayed layers of 4,096 tokens, and of the gaps between them."""
        found = {}
        for name in TUNED:
            shape, made = SHAPES[name], situations(name, 4096)
            run = lambda given, *rest: launch.mixture(*rest, given, shape.gate)  # noqa: E731
            calls = [functools.partial(run, *one) for one in made]
            found[name] = {"whole": benchmark.graph_time(calls).us, **_launches_of(calls)}
            print(name, found[name], flush=True)
            layers.cache_clear()
        return found

    @section("training check")
    def _():
        """Relative errors of all gradients of a layer against float64, and whether two runs have equal bits."""
        found = {}
        for name, tokens in itertools.product(("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"), (3, 300)):
            shape, given, (hidden, chosen, weights) = SHAPES[name], layers(name, 1)[0], batch(name, tokens)
            chosen[::3, 1] = shape.experts  # computed by none
            grad = torch.randn_like(hidden)
            parts = [hidden, weights, *(t for t in given[:4] if t is not None)]
            own, again = (_gradients(op.training_mixture, shape, parts, chosen, grad) for _ in range(2))
            wide = [part.double() for part in parts]
            right = _gradients(naive.mixture, shape, wide, chosen, grad.double())
            names = ("hidden", "weights", "up", "down", "up_bias", "down_bias")
            errors = {
                key: float((a.double() - b).norm() / b.norm()) for key, a, b in zip(names, own, right, strict=False)
            }
            same = all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
            found[f"{name} {tokens}"] = {**errors, "same": same}
            print(
                name,
                tokens,
                {k: v if k == "same" else f"{v:.1e}" for k, v in found[f"{name} {tokens}"].items()},
                flush=True,
            )
            del own, again, wide, right
            layers.cache_clear()
        return found

    @section("training")
    def _():
        """Microseconds of forward and backward of a layer: with the gradients of its matrices, and with frozen ones."""
        from hf_optim.toolkit.experts import expert_product, kernels

        kernels.TRAINS, found = True, {}
        for (name, tokens), frozen in itertools.product(itertools.product(TUNED, (512, 4096)), (False, True)):
            shape, (given, hidden, chosen, weights) = SHAPES[name], situations(name, tokens)[0]
            module = transformers_module(shape, given).requires_grad_(not frozen)
            hidden.requires_grad_(), weights.requires_grad_()
            ways = {"ours": lambda *a, m=module: expert_product(m, *a, True)}
            ways |= {key: transformers_call(shape, key, given, module=module) for key in ("grouped_mm", "eager")}
            grad, asked = torch.randn_like(hidden), [hidden, weights, *([] if frozen else module.parameters())]

            def step(way):
                torch.autograd.grad(way(hidden, chosen, weights), asked, grad)

            def replayed(way):
                return benchmark.graph_time([functools.partial(step, way)]).us

            row = {key: _timed([functools.partial(step, way)], captured=False) for key, way in ways.items()}
            for key in ("ours", "grouped_mm"):
                try:
                    row[f"{key}, replayed"] = replayed(ways[key])
                except Exception as problem:
                    row[f"{key}, replayed"] = f"{type(problem).__name__}: {str(problem)[:80]}"
            found[f"{name} {tokens}{' frozen' if frozen else ''}"] = row
            print(name, tokens, "frozen" if frozen else "", row, flush=True)
            layers.cache_clear()
        return found

    @section("launches of a route")
    def _():
        """Microseconds of a route by the tiles of a chunk, the most chunks and warps; the last is what is used."""
        found, usual = {}, (routing.TILES, routing.MOST_CHUNKS, routing.WARPS)
        for name, tokens in (("qwen3-30b-a3b", 4096), ("qwen3-30b-a3b", 512), ("mixtral", 4096)):
            shape, (_, _, chosen, _) = SHAPES[name], situations(name, tokens)[0]
            block, row = launch.block_rows(tokens * shape.top_k, shape.experts), {}
            right = naive.route(chosen, shape.experts, block)
            for trial in ((4, 128, 4), (8, 64, 4), (2, 256, 8), (4, 128, 8), (8, 64, 8), (1, 512, 4), usual):
                routing.TILES, routing.MOST_CHUNKS, routing.WARPS = trial
                launching._COMPILED.clear()
                run = functools.partial(routing.route, chosen, shape.experts, block)
                same = all(torch.equal(a, b) for a, b in zip(run(), right, strict=True))
                row[str(trial)] = benchmark.graph_time([run] * 8).us if same else "wrong"
            found[f"{name} {tokens}"] = row
            print(name, tokens, row, flush=True)
            layers.cache_clear()
        return found

    @section("outer tiles")
    def _():
        """Microseconds of the sums of outer products, by tiles."""
        found = {}
        for name, tokens in itertools.product(TUNED, (512, 4096)):
            shape, (given, hidden, chosen, _) = SHAPES[name], situations(name, tokens)[0]
            block = launch.block_rows(tokens * shape.top_k, shape.experts)
            route, out = routing.route(chosen, shape.experts, block), torch.empty_like(given.up)
            rows = torch.randn(tokens * shape.top_k, given.up.shape[1], device="cuda", dtype=torch.bfloat16)
            row = found[f"{name} {tokens}"] = {}
            for tiles in OUTER_TILES:
                run = functools.partial(
                    training.outer_product, rows, hidden, route, None, out, None, (0, shape.top_k), tiles
                )  # fmt: skip
                row[_short(tiles)] = _timed([run])
            print(name, tokens, row, flush=True)
            layers.cache_clear()
        return found

    @section("generate")
    def _():
        """Milliseconds a token of ``generate``, by processes that have compiled meanwhile."""
        found = {}
        for way, other in generating.items():
            while not (folder / f"{way}.ready").exists() and other.poll() is None:
                time.sleep(0.05)
        for way, other in generating.items():
            (folder / f"{way}.go").touch()
            other.wait()
            path = folder / f"{way}.json"
            found[way] = json.loads(path.read_text()) if path.exists() else {"failed": other.returncode}
            print(way, found[way], flush=True)
        return found


def _gradients(mixture, shape, parts, chosen, grad):
    """The gradients of hidden states, weights, matrices and biases, in this order."""
    hidden, weights, *matrices = (part.detach().requires_grad_() for part in parts)
    given = Weights(*matrices, *[None] * (4 - len(matrices)), shape.transposed)
    return torch.autograd.grad(mixture(hidden, chosen, weights, given, shape.gate), [hidden, weights, *matrices], grad)


def transformers_module(shape, given):
    """transformers' module of experts of a shape, with these matrices."""
    from torch import nn
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    cls, config = (GptOssExperts, GptOssConfig) if shape.bias else (MixtralExperts, MixtralConfig)
    settings = config(hidden_size=shape.d, intermediate_size=shape.inner, num_local_experts=shape.experts)
    with torch.device("meta"):
        module = cls(settings)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for key, value in zip(names, given[:4], strict=True):
        if value is not None:
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    module.num_experts = shape.experts
    return module


def transformers_call(shape, key, given, *rest, module=None):
    """A call of one of transformers' functions for experts."""
    module = module or transformers_module(shape, given)
    module.config._experts_implementation = key

    def call(*args):
        module.config._experts_implementation = key
        return module(*(args or rest))

    return call


def _timed(calls, captured=True):
    """Microseconds, or why there are none."""
    try:
        with torch.set_grad_enabled(not captured and torch.is_grad_enabled()):
            if captured:
                return benchmark.graph_time(calls).us
            for call in calls:
                call()
            torch.cuda.synchronize()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                for call in calls:
                    call()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6 / len(calls))
            return sorted(times)[2]
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:80]}"


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


def generate(way, folder):
    """Time ``generate`` of a 30B-A3B-shaped model of 12 layers; waits for its turn after it has compiled."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import hf_optim

    config = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=12, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
        norm_topk_prob=True, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if not way.startswith("stock"):
        hf_optim.accelerate(model)
    from hf_optim.generation import choices

    choices.ENABLED = "in one launch" in way
    ids = torch.arange(100, 228, device="cuda").view(1, -1)

    def run(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            if way.startswith("door"):
                mode = "captured" if "captured" in way else "auto"
                hf_optim.generate(model, input_ids=ids, max_new_tokens=count, do_sample=False, mode=mode)
            else:
                static = {"cache_implementation": "static", "disable_compile": "eager" in way}
                model.generate(ids, max_new_tokens=count, do_sample=False, **static)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    compiling = run(96), run(96)
    (folder / f"{way}.ready").touch()
    while not (folder / f"{way}.go").exists():
        time.sleep(0.05)
    short, long = (min(run(count) for _ in range(3)) for count in (32, 96))
    row = {"ms_token": (long - short) / 64 * 1e3, "seconds_96": long, "first_calls_s": compiling}
    row["kernels_us_token"] = _kernels_of(run)
    (folder / f"{way}.json").write_text(json.dumps(row))


def _launches_of(calls, replays=20):
    """Microseconds a call in each kernel of captured calls, and in the gaps before them, by profiling replays."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(replays):
                graph.replay()
            torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type.name == "CUDA" and e.time_range.end > e.time_range.start]
    events.sort(key=lambda e: e.time_range.start)
    rows, gaps, last = {}, {}, None
    for event in events:
        key, span = event.name[:60], event.time_range
        rows.setdefault(key, []).append(span.end - span.start)
        if last is not None and span.start - last < 50:  # of one replay
            gaps.setdefault(key, []).append(max(0.0, span.start - last))
        last = span.end
    count = replays * len(calls)
    per_call = lambda table: {key: round(sum(each) / count, 2) for key, each in table.items()}  # noqa: E731
    return {"kernels": per_call(rows), "gaps before": per_call(gaps)}


def _kernels_of(run):
    """Microseconds a token in each kernel of a generation, longest first, with its launches a token; and their sum."""
    from torch.profiler import ProfilerActivity, profile

    tables = []
    for count in (32, 96):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run(count)
        events = [each for each in found.key_averages() if each.device_type.name == "CUDA"]
        tables.append({each.key: (each.self_device_time_total, each.count) for each in events})
    rows = {
        key: [round((us - tables[0].get(key, (0, 0))[0]) / 64, 2), round((n - tables[0].get(key, (0, 0))[1]) / 64, 2)]
        for key, (us, n) in tables[1].items()
    }
    rows = dict(sorted(((key[:90], row) for key, row in rows.items() if row[0] > 0), key=lambda pair: -pair[1][0]))
    return {"sum": [round(sum(row[i] for row in rows.values()), 1) for i in range(2)], **dict(list(rows.items())[:40])}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        warm(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--generate"]:
        generate(sys.argv[2], Path(sys.argv[3]))
    else:
        main()

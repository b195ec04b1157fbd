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

import experts_training
import torch
from experts_cases import SHAPES, TOKENS, TUNED, batch, floor, layers, situations
from experts_generate import WAYS
from experts_tiles import launches, short_name, trials
from experts_ways import grouped_mm, timed, transformers_call
from profiled_launches import launches_of
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common import launch as launching
from hf_optim_kernels.experts import launch, naive, routing
from hf_optim_kernels.experts.launch import Plan


def main():
    folder = Path(tempfile.mkdtemp())
    wants = lambda name: not sys.argv[1:] or any(word in name for word in sys.argv[1:])  # noqa: E731
    here = Path(__file__)
    script = [sys.executable, here.with_name("experts_generate.py")]
    ways = WAYS if wants("generate") else ()
    generating = {way: subprocess.Popen([*script, way, folder]) for way in ways}
    if wants("tiles") or wants("blocks"):
        start, count = time.perf_counter(), os.cpu_count() or 1
        which = "tiles" if wants("tiles") else "blocks"
        script = [sys.executable, here.with_name("experts_tiles.py"), which]
        others = [subprocess.Popen([*script, str(i), str(count)]) for i in range(count)]
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
                    rows[short_name(tiles)] = benchmark.graph_time([functools.partial(m, tiles) for m in made], 15).us
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
            row = {key: timed(calls) for key, calls in ways.items()}
            row["eager"] = timed([transformers_call(shape, "eager", *one) for one in made[:2]], captured=False)
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
            found[name] = {"whole": benchmark.graph_time(calls).us, **launches_of(calls)}
            print(name, found[name], flush=True)
            layers.cache_clear()
        return found

    section("training check")(experts_training.check_gradients)
    section("training")(experts_training.time_steps)

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

    section("outer tiles")(experts_training.try_outer_tiles)

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


if __name__ == "__main__":
    main()

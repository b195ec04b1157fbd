"""Sparse feed-forward layers on a GPU: correctness, tiles, and times by the units of a block, beside bound and dense.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/sparse_ffn.py [WORD ...]

The layer has 4,096 inputs and outputs and 16,384 units, in bfloat16, with a controller of rank 4,096 / N. Times are
those of a replayed CUDA graph over copies of the weights that together are far larger than the L2 cache. With words,
only the sections that have one of them in their names run (``check``, ``tiles``, ``times``, ``rows``). ``TINY=1`` runs
all of it in small, also on a CPU with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sections import Sections
from torch.nn import functional as F

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.sparse_ffn import bench, launch, naive, op
from hf_optim_kernels.sparse_ffn.launch import Tiles
from hf_optim_kernels.sparse_ffn.naive import Layer, Rows
from hf_optim_plugins.sparsity import _sparse_ffn_codes, _sparse_ffn_modules

TINY = bool(os.environ.get("TINY"))
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda" if CUDA else "cpu"), torch.bfloat16
WIDTH, UNITS = (128, 512) if TINY else (4096, 16384)
BLOCKS = (4, 16) if TINY else (4, 8, 16, 32, 64)
BITS = (16, 8, 4)
GROUP = 64 if TINY else 128
TOUCHED = 0 if TINY else 400 << 20  # bytes read by the calls of a graph: several times the L2 cache
REPLAYS = 1 if TINY else 15
PROCESSES = 1 if TINY else 14
TUNED = (4, 16) if TINY else (16, 64, 4, 32, 8)
BUDGET = float(os.environ.get("BUDGET", "600"))  # seconds of the section of tiles


def draw(*size: int) -> torch.Tensor:
    return (torch.randn(*size, device=DEVICE) / size[-1] ** 0.5).to(DTYPE)


def rows_of(weight: torch.Tensor, bits: int) -> Rows:
    """Return a matrix, as codes unless ``bits`` is 16: with one scale for a row of int8, and for 128 of int4."""
    if bits == 16:
        return Rows(weight)
    return Rows(*_sparse_ffn_codes.encode_rows(weight, bits, None if bits == 8 else GROUP))


def layer_of(block: int, bits: int, up: torch.Tensor, down: torch.Tensor) -> Layer:
    rank = WIDTH // block
    return Layer(
        draw(rank, WIDTH), draw(UNITS, rank), None, rows_of(up, bits), None, rows_of(down, bits), None, block, "relu"
    )


def bytes_read(layer: Layer, tokens: int = 1) -> int:
    """Return the bytes that one token reads; of more tokens, if none chooses what another does, up to all units."""
    units = sum(benchmark.bytes_of([part for part in rows[:2] if part is not None]) for rows in (layer.up, layer.down))
    return units * min(tokens, layer.block) // layer.block + benchmark.bytes_of([layer.first, layer.second])


def copies(layer: Layer) -> Iterator[Layer]:
    """Yield the layer and copies of it, of which calls read more than the L2 cache holds."""
    yield layer
    for _ in range(-(-TOUCHED // bytes_read(layer)) if CUDA else 0):
        own = [Rows(*(None if t is None else t.clone() for t in rows)) for rows in (layer.up, layer.down)]
        yield layer._replace(first=layer.first.clone(), second=layer.second.clone(), up=own[0], down=own[1])


def graph_time(calls: list[Callable[[], object]]) -> float:
    return round(benchmark.graph_time(calls, REPLAYS).us, 2)


def _layer(ffn: Any) -> Layer:
    from hf_optim_kernels.sparse_ffn.layer import layer_of as of

    layer = of(ffn)
    assert layer is not None
    return layer


def _double(layer: Layer) -> Layer:
    """Return the layer with decoded weights in float64."""

    def wide(rows: Rows | None) -> Rows | None:
        if rows is None:
            return None
        scale = None if rows.scale is None else rows.scale.double()
        every = torch.arange(len(rows.data), device=rows.data.device)
        weight = naive.chosen_rows(rows._replace(scale=scale), every).double()
        return Rows(weight, None, None if rows.bias is None else rows.bias.double())

    vectors = {n: None if (t := getattr(layer, n)) is None else t.double() for n in ("logit_bias", "bias")}
    return layer._replace(
        first=layer.first.double(), second=layer.second.double(), up=wide(layer.up), gate=wide(layer.gate),
        down=wide(layer.down), **vectors,
    )  # fmt: skip


def _given(x: torch.Tensor, layer: Layer, units: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the output of the specification with given units."""
    inner, function = naive.products(x, layer.up, units), naive.ACTIVATIONS[layer.act]
    inner = function(inner) if layer.gate is None else function(naive.products(x, layer.gate, units)) * inner
    if layer.weighted:
        inner = inner * logits.softmax(-1).flatten(1).gather(1, units)
    rows = layer.down.data[units]
    return torch.einsum("tb,tbd->td", inner, rows) + (0 if layer.bias is None else layer.bias)


def all_units(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return the layer with all units computed, and those not chosen multiplied by zero."""
    logits = F.linear(F.linear(x, layer.first), layer.second).view(len(x), -1, layer.block)
    mask = torch.arange(layer.block, device=x.device) == logits.argmax(-1).unsqueeze(-1)
    inner = F.relu(F.linear(x, layer.up.data)) * mask.flatten(1).to(x.dtype)
    return F.linear(inner, layer.down.data.t())


section = Sections("sparse_ffn.json")


@section("check")
@torch.no_grad()
def check() -> list[dict[str, Any]]:
    """Kernels against the specification in float64 of the units that they chose, and modules. Raises if wrong."""
    found = []
    settings = {"act": "relu", "gated": False, "bias": True, "out_bias": True, "controller_bias": True,
                "temperature": 0.1, "hard_share": 0.3, "controller_output": False, "gather_rows": 8, "group": None}  # fmt: skip
    cases: list[dict[str, Any]] = [
        {"block": 4}, {"block": 64, "bits": 8}, {"block": 32, "bits": 4, "group": 32},
        {"block": 16, "gated": True, "act": "silu", "controller_output": True},
        {"block": 16, "gated": True, "act": "gelu_new", "bits": 8}, {"block": 6, "neurons": 96 * 6, "width": 80, "out": 50},
    ]  # fmt: skip
    for case in cases:
        base = {"width": 256, "neurons": 1024, "out": 192, "bits": 16}
        entry = {**settings, **base, **case}
        ffn = _sparse_ffn_modules.SparseFFN({**entry, "rank": 32}, {"device": DEVICE, "dtype": DTYPE}).eval()
        for parameter in ffn.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.02)
        x = torch.randn(5, entry["width"], device=DEVICE).to(DTYPE)
        layer = _layer(ffn)
        tiles = launch.default_tiles(layer)
        for early in (False, True) if CUDA else (False,):
            memory = launch.allocate(x, layer, tiles._replace(early=early))
            for step in (partial(launch.project, x), partial(launch.choose, x), launch.combine):
                step(layer, tiles._replace(early=early), memory)
            wide = _double(layer)
            logits = F.linear(F.linear(x.double(), wide.first), wide.second, wide.logit_bias)
            best = logits.view(5, -1, layer.block)
            picked = logits.gather(1, memory.units.long()).view(5, -1)
            short = float(((best.amax(-1) - picked) / best.std()).max())
            expected = _given(x.double(), wide, memory.units.long(), best)
            error = benchmark.relative_error(memory.out, expected)
            alone = launch.sparse_ffn(x[2:3].contiguous(), layer, tiles._replace(early=early))
            assert torch.equal(alone[0], memory.out[2]), "a token's result depends on the others"
            assert short < 0.05, f"{case}: a chosen logit is {short:.3f} standard deviations below the largest"
            assert error < 6e-3, f"{case}: wrong by {error:.1e}"
            found.append({**case, "early": early, "error": error, "short": short})
        assert torch.equal(ffn(x), launch.sparse_ffn(x, layer)) or not CUDA, "the module does not use the kernels"
        if CUDA and case in cases[:2]:
            compiled = torch.compile(ffn, fullgraph=True)
            assert torch.equal(compiled(x), ffn(x)), "compiled differs"
            graph, still = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                out = ffn(still)
            still.copy_(-x)
            graph.replay()
            assert torch.equal(out, ffn(-x)), "a replayed graph differs"
    print(f"{len(found)} cases, largest error {max(row['error'] for row in found):.1e}", flush=True)
    return found


def variants(block: int) -> dict[str, list[Tiles]]:
    """Return the tiles that are tried for each launch."""
    lanes = [b for b in (1, 2, 4, 8, 16) if b * block <= 128 or b == 1]
    rank = WIDTH // block
    first = [Tiles(r=r, r_k=k, r_warps=w) for r, k, w in
             ((1, 1024, 2), (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 256, 4))]  # fmt: skip
    second = [
        Tiles(b=b, b_r=r, b_k=k, b_warps=w)
        for b in lanes
        for r in ({min(rank, 64), min(rank, 128)} if block <= 16 else {min(rank, 128)})
        for k, w in ((512, 4), (1024, 4), (1024, 8), (256, 2))
    ]
    third = [
        Tiles(d=d, d_b=n, d_warps=w, split=s)
        for d, n, w in ((64, 32, 2), (128, 16, 4), (128, 32, 4), (256, 16, 4), (64, 64, 4))
        for s in (2, 4, 8, 16)
    ]
    return {"project": first, "choose": second, "combine": third}


def step_calls(name: str, x: torch.Tensor, tiles: Tiles, made: list[Layer]) -> list[Callable[[], object]]:
    """Return calls of one launch over copies of a layer, after those before it."""
    calls: list[Callable[[], object]] = []
    for layer in made:
        memory = launch.allocate(x, layer, tiles)
        launch.project(x, layer, tiles, memory)
        if name != "project":
            launch.choose(x, layer, tiles, memory)
        given = (layer, tiles, memory) if name == "combine" else (x, layer, tiles, memory)
        calls.append(partial(getattr(launch, name), *given))
    return calls


def tuned_bits(block: int) -> tuple[int, ...]:
    return BITS if block == 16 else (16,)


@section("compile")
@torch.no_grad()
def compile_all() -> int | None:
    """Compile what one process of several has to, by ``PART``: the Triton cache on disk is shared."""
    part = os.environ.get("PART")
    if part is None:
        return None
    x, jobs = torch.randn(1, WIDTH, device=DEVICE).to(DTYPE), []
    for block in BLOCKS:
        jobs += [(block, bits, n, t) for n, ts in variants(block).items() for t in ts for bits in tuned_bits(block)]
    mine, made = jobs[int(part) :: PROCESSES], {}
    for block, bits, name, tiles in mine:
        if (block, bits) not in made:
            made[block, bits] = layer_of(block, bits, draw(UNITS, WIDTH), draw(UNITS, WIDTH))
        step_calls(name, x, tiles, [made[block, bits]])[0]()
    torch.cuda.synchronize()
    return len(mine)


@section("tiles")
@torch.no_grad()
def tiles() -> list[dict[str, Any]]:
    """The time of each launch with each variant of tiles, for one token."""
    begun = time.perf_counter()
    if PROCESSES > 1 and not os.environ.get("COMPILED"):
        others = [
            subprocess.Popen(
                [sys.executable, __file__, "compile"], env={**os.environ, "PART": str(part), "OUT": "/tmp"},
                stdout=subprocess.DEVNULL,
            )
            for part in range(PROCESSES)
        ]  # fmt: skip
        for other in others:
            other.wait()
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    x, found = torch.randn(1, WIDTH, device=DEVICE).to(DTYPE), []
    for block in TUNED:
        for bits in tuned_bits(block):
            if time.perf_counter() - begun > BUDGET:
                return found
            made = list(copies(layer_of(block, bits, draw(UNITS, WIDTH), draw(UNITS, WIDTH))))
            for name, tried in variants(block).items():
                times = []
                for one in tried[:2] if TINY else tried:
                    us = graph_time(step_calls(name, x, one, made))
                    times.append((us, {k: v for k, v in one._asdict().items() if v != getattr(Tiles(), k)}))
                times.sort(key=lambda pair: pair[0])
                found.append({"block": block, "bits": bits, "launch": name, "best": times[:6], "worst": times[-1]})
                print(block, bits, name, times[:4], times[-1][0], flush=True)
            del made
    return found


@section("times")
@torch.no_grad()
def times() -> list[dict[str, Any]]:
    """The time of a layer for one token by N and bits, with and without early launches, beside bytes and dense."""
    x, found = torch.randn(1, WIDTH, device=DEVICE).to(DTYPE), []
    up, down = draw(UNITS, WIDTH), draw(UNITS, WIDTH)
    flat = [(up, down.t().contiguous())] + [(up.clone(), down.t().contiguous()) for _ in range(2 if CUDA else 0)]
    dense = graph_time([partial(bench.dense, x, *pair) for pair in flat * 2])
    dense_bytes, bandwidth = benchmark.bytes_of(flat[0]), benchmark.copy_bandwidth() if CUDA else 1.0
    print(f"dense {dense} us, {dense_bytes / dense / 1e6:.2f} TB/s; copy {bandwidth / 1e6:.2f} TB/s", flush=True)
    found.append({"dense_us": dense, "dense_bytes": dense_bytes, "copy_bytes_per_us": bandwidth})
    del flat
    for block in BLOCKS:
        for bits in BITS:
            made = list(copies(layer_of(block, bits, up, down)))
            size = bytes_read(made[0])
            row: dict[str, Any] = {"block": block, "bits": bits, "bytes": size, "copies": len(made)}
            for early in (False, True):
                how = launch.default_tiles(made[0])._replace(early=early)
                calls = [partial(launch.sparse_ffn, x, one, how) for one in made]
                row["early_us" if early else "us"] = graph_time(calls)
            own = row["early_us" if launch.default_tiles(made[0]).early else "us"]
            row |= {"ratio": round(dense / own, 2), "bound": round(dense_bytes / size, 2)}
            row["bandwidth_share"] = round(size / own / bandwidth, 3)
            found.append(row)
            print(row, flush=True)
            del made
    return found


@section("rows")
@torch.no_grad()
def rows() -> list[dict[str, Any]]:
    """The time by tokens of a call, beside all units with a mask, as the module computes more tokens."""
    found = []
    up, down = draw(UNITS, WIDTH), draw(UNITS, WIDTH)
    for block in BLOCKS:
        made = list(copies(layer_of(block, 16, up, down)))
        for tokens in (1, 2, 4, 8):
            x = torch.randn(tokens, WIDTH, device=DEVICE).to(DTYPE)
            masked = [partial(all_units, x, one) for one in made[:4]]
            row = {"block": block, "tokens": tokens, "masked_us": graph_time(masked)}
            row["us"] = graph_time([partial(op.sparse_ffn, x, one) for one in made])
            found.append(row)
            print(row, flush=True)
        del made
    return found

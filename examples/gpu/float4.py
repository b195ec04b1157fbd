"""4-bit floats on a GPU: NVFP4 and MXFP4 beside int4, after a check of every kernel and tile.

    python examples/gpu/float4.py                # all sections; words choose some: correct, time, experts
    OUT=. python examples/gpu/float4.py correct time

``time`` are the layers of Qwen2.5-7B, which no tiles were tuned on, with the tiles that a model gets: cold cache,
replayed graphs. Results are kept in ``float4.json`` in ``$OUT``. Other tiles are timed by
``python -m hf_optim_kernels.common.sweep --ops nvfp4 mxfp4``.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from sections import Sections
from torch import Tensor

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common.codes import Codes
from hf_optim_kernels.packed_experts import layer as experts_layer
from hf_optim_kernels.packed_experts import naive as experts_naive
from hf_optim_kernels.wna16 import bench, float4, launch, layer, naive
from hf_optim_kernels.wna16 import wide as wide_tiles

DEVICE = benchmark.device()
CUDA = DEVICE.type == "cuda"
SHAPES = ((3584, 18944), (3584, 3584), (37888, 3584), (4608, 3584)) if CUDA else ((96, 160),)
ROWS = (1, 8, 16, 64, 256, 4096) if CUDA else (1, 40)
FORMATS = {"nvfp4": float4.NVFP4, "mxfp4": float4.MXFP4}
GOAL = 1.1
section = Sections("float4.json")


def packed_of(found: Codes, format: int, dtype: torch.dtype = torch.bfloat16) -> layer.PackedWeight:
    """Return the packed weight of a layer."""
    return layer.PackedWeight.from_codes(found, 4, float4.GROUPS[format], dtype, None)


def int4(N: int, K: int, group: int) -> layer.PackedWeight:
    """Return a random packed weight of 4-bit integers."""
    found = bench.random_codes(N, K, 4, group if K % group == 0 else K, torch.bfloat16)
    return layer.PackedWeight.from_codes(found, 4, group if K % group == 0 else K, torch.bfloat16, None)


def inputs(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random inputs ``[M, K]``."""
    return torch.randn(M, K, device=DEVICE).to(dtype)


def error_of(y: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((y.double() - expected).norm() / expected.norm())


@section("correct")
def correct() -> dict[str, Any]:
    """Every number of rows, dtype and tile against float64; the bound is the rounding of the dtype."""
    found: dict[str, Any] = {}
    for (name, format), dtype in itertools.product(FORMATS.items(), (torch.bfloat16, torch.float16)):
        for N, K in ((1000, 1056), (192, 4096), (64, 96)):
            packed = packed_of(bench.random_floats(N, K, format), format, dtype)
            weight = packed.tensors()
            wide = naive.dequantize(weight, K, torch.float64)
            dense = launch.dense(weight, K, dtype) if CUDA else wide.to(dtype)
            worst = {"dense": error_of(dense, wide)}
            for M in (1, 3, 8, 17, 64, 130, 256, 300):
                x = inputs(M, K, dtype)
                expected = x.double() @ wide.T
                worst[f"{M} rows"] = error_of(packed(x), expected)
                if not CUDA or M > 256:
                    continue
                for block_m, block_n, split in itertools.product((8, 16, 32, 64), (64, 128), (1, 4)):
                    tiles = dict(zip(launch._TILE_NAMES, ("fused", block_m, block_n, split, 4, 3), strict=True))
                    key = f"{M} rows, tile {block_m} x {block_n}, {split} parts"
                    worst[key] = error_of(launch.fused(x, weight, tiles), expected)
                if M < 64 or not wide_tiles.supports(x, weight):
                    continue
                for block_m, split in itertools.product((64, 128), (1, 3)):
                    tiles = dict(zip(launch._TILE_NAMES, ("wide", block_m, 128, split, 8, 3), strict=True))
                    worst[f"{M} rows, wide {block_m}, {split} parts"] = error_of(
                        wide_tiles.product(x, weight, tiles), expected
                    )
            bound = 2**-8 if dtype == torch.bfloat16 else 2**-11
            wrong = {key: value for key, value in worst.items() if not value <= bound}
            label = f"{name} {N}x{K} {str(dtype)[6:]}"
            found[label] = {"largest error": max(worst.values()), "bound": bound, "wrong": wrong}
            print(f"{label}: largest error {max(worst.values()):.1e}, {len(wrong)} of {len(worst)} wrong", flush=True)
    return found


@section("time")
def time() -> dict[str, Any]:
    """Microseconds of a layer, and the ratio to int4 in groups of 128 and of 32."""
    found: dict[str, Any] = {}
    print(f"{'layer':>14} {'rows':>5} {'g128':>8} {'g32':>8} {'nvfp4':>8} {'mxfp4':>8}  over g128, over g32")
    for N, K in SHAPES:
        layers = {"int4 g128": int4(N, K, 128), "int4 g32": int4(N, K, 32)}
        layers |= {name: packed_of(bench.random_floats(N, K, format), format) for name, format in FORMATS.items()}
        for M in ROWS:
            x = inputs(M, K)
            taken = {name: benchmark.graph_time(benchmark.calls_of(one, x)).us for name, one in layers.items()}
            g128, g32, *floats = taken.values()
            ratios = [f"{value / g128:.2f} {value / g32:.2f}" for value in floats]
            missed = "" if max(floats) <= GOAL * g128 else "  missed"
            print(
                f"{f'{N}x{K}':>14} {M:>5} " + " ".join(f"{v:8.1f}" for v in taken.values()), *ratios, missed, flush=True
            )
            found[f"{N}x{K}, {M} rows"] = taken
    return found


@section("experts")
def experts() -> dict[str, Any]:
    """The products of gpt-oss-20b's experts in MXFP4, and in NVFP4: error against the specification, microseconds."""
    E, d, inner, top_k = (32, 2880, 2880, 4) if CUDA else (4, 64, 96, 2)
    found: dict[str, Any] = {}
    for name, format in FORMATS.items():
        made = {"up": bench.random_floats(2 * inner, d, format), "down": bench.random_floats(d, inner, format)}
        sides = {
            side: SimpleNamespace(
                kind="float4", bits=4, group_size=float4.GROUPS[format], shape=tuple(codes.codes.shape), inputs=None,
                dtype=torch.bfloat16, device=DEVICE, symmetric=True, ordered=False,
            )
            for side, codes in made.items()
        }  # fmt: skip
        packed = experts_layer.PackedExperts(
            SimpleNamespace(count=E, activation="silu", codes=lambda side, _, own=made: [own[side]], **sides)
        )
        for tokens in (1, 8, 64, 512, 4096) if CUDA else (1, 9):
            x = inputs(tokens, d)
            chosen = torch.stack([torch.randperm(E, device=DEVICE)[:top_k] for _ in range(tokens)])
            weights = torch.rand(tokens, top_k, device=DEVICE)
            with torch.no_grad():
                y = packed(x, chosen, weights, None)
                wanted = experts_naive.packed_experts(
                    x.float(), chosen, weights, packed.weight("up"), packed.weight("down")
                )
                call = lambda x=x, c=chosen, w=weights: packed(x, c, w, None)  # noqa: E731
                taken = benchmark.graph_time([call] * 4).us
            found[f"{name}, {tokens} tokens"] = {"error": error_of(y, wanted.double()), "microseconds": taken}
            print(f"{name}, {tokens} tokens: error {error_of(y, wanted.double()):.1e}, {taken:.1f} us", flush=True)
    return found

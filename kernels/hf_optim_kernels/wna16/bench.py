"""Contenders of ``hf-optim bench`` for ``hf_optim::wna16``; run alone, it prints a short table of one layer.

python -m hf_optim_kernels.wna16.bench [--shape 14336x4096] [--rows 1 16 64]
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.codes import Codes
from ..common.tuner import Tunable
from . import float4, layer, naive

GROUP = 128
MATH = "bfloat16"


def random_codes(N: int, K: int, bits: int, group_size: int, dtype: torch.dtype):
    """Return random codes ``[N, K]`` with scales per group, as ``hf_optim.compressed.weights.Codes`` has them."""
    device = benchmark.device()
    codes = torch.randint(0, 2**bits, (N, K), device=device, dtype=torch.uint8)
    scale = (torch.rand(N, K // group_size, device=device) * 0.01 + 0.001).to(dtype)
    return benchmark.codes_of(codes, scale)


def random_floats(N: int, K: int, format: int) -> Codes:
    """Return random 4-bit floats ``[N, K]`` with scales per group."""
    device = benchmark.device()
    patterns = torch.randint(0, 16, (N, K), device=device, dtype=torch.uint8)
    low, high, kind = (40, 80, float4.E4M3) if format == float4.NVFP4 else (118, 124, float4.E8M0)
    scale = torch.randint(low, high, (N, K // float4.GROUPS[format]), device=device, dtype=torch.uint8)
    shared = torch.full((N, 1), 37.0, device=device) if format == float4.NVFP4 else None
    return Codes(patterns, scale.view(kind), None, global_scale=shared)


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return 4-bit codes in groups of 128 (of ``K`` if it is not a multiple), and 8-bit codes with a scale per row."""
    group = GROUP if K % GROUP == 0 else K
    return [contender("w4a16", N, K, M, 4, group, dtype), contender("w8a16", N, K, M, 8, K, dtype)]


def contender(name: str, N: int, K: int, M: int, bits: int, group_size: int, dtype: torch.dtype) -> Contender:
    """Return the packed weight of a layer, as ``hf_optim.accelerate`` makes it, on ``M`` rows of random inputs."""
    found = random_codes(N, K, bits, group_size, dtype)
    packed_weight = layer.prepack(benchmark.weight_of(found, dtype, bits, group_size))
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    reference = _reference(x, found, bits, group_size)
    size = N * K * bits // 8 + benchmark.bytes_of((found.scale,))
    return Contender(name, benchmark.calls_of(packed_weight, x), size, 2 * M * N * K, reference, MATH)


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return 4-bit codes in groups of 128 (of ``K`` if it is not a multiple), 8-bit codes, and 4-bit floats."""
    from . import launch  # needs Triton, which timing on a CPU does not

    found = [_tunable(N, K, 4, GROUP if K % GROUP == 0 else K, dtype), _tunable(N, K, 8, K, dtype)]
    fitting = [format for format in launch.NAMES if K % float4.GROUPS[format] == 0]
    return found + [_tunable(N, K, 4, float4.GROUPS[format], dtype, format) for format in fitting]


def _tunable(N: int, K: int, bits: int, group_size: int, dtype: torch.dtype, format: int = 0) -> Tunable:
    from . import launch

    found = random_floats(N, K, format) if format else random_codes(N, K, bits, group_size, dtype)
    packed_weight = layer.PackedWeight.from_codes(found, bits, group_size, dtype, None)
    weights = [module.tensors() for module in benchmark.modules_of(packed_weight)]

    def reference(x: Tensor) -> Tensor:
        if not format:
            return _reference(x, found, bits, group_size)
        return x.double() @ naive.dequantize(weights[0], K, torch.float64).T

    return Tunable(
        op=launch.NAMES[format] if format else f"w{bits}a16",
        shape=(N, K),
        dtype=dtype,
        inputs=lambda rows: torch.randn(rows, K, device=benchmark.device()).to(dtype),
        calls=lambda x, config: [partial(launch.product, x, weight, config) for weight in weights],
        candidates=lambda rows: launch.candidates(rows, N, K, bits, format),
        reference=reference,
    )


def _reference(x: Tensor, found, bits: int, group_size: int) -> Tensor:
    N, K = found.codes.shape
    codes = found.codes.double().view(N, -1, group_size) - 2 ** (bits - 1)
    weight = (codes * found.scale.double()[..., None]).view(N, K)
    return x.double() @ weight.T


def main() -> None:
    parser = argparse.ArgumentParser(description="times the weight-only layer")
    parser.add_argument("--shape", default="14336x4096", help="OUTxIN")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    options = parser.parse_args()
    N, K = map(int, options.shape.split("x"))
    bandwidth = benchmark.copy_bandwidth()
    print(f"{benchmark.device()}, copy {bandwidth / 1e6:.2f} TB/s, N={N} K={K}")
    print("    M  name        graph   eager    host  of byte floor   error")
    for M in options.rows:
        for one in contenders(N, K, M):
            got = benchmark.measure(one)
            share = one.bytes / bandwidth / (got["graph_us"] or math.inf)
            print(
                f"{M:5d}  {one.name:<8} {got['graph_us']:8.1f} {got['eager_us']:7.1f} {got['host_us']:7.1f} "
                f"{share:14.0%} {got['error']:9.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()

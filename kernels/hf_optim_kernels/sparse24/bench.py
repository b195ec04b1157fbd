"""Contenders for a 2:4 layer: the kernels of this folder, the dense product, 4-bit codes without the pattern (by
``wna16``), and cuSPARSELt through PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable
from ..wna16 import bench as unpruned
from . import cusparselt, layer, mma_layout, naive, tiles

GROUP = 128


def sparse_weight(N: int, K: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a random weight [N, K] with the first and third or second and fourth of every four columns."""
    generator = torch.Generator(benchmark.device()).manual_seed(seed)
    weight = torch.randn(N, K // 4, 2, 2, device=benchmark.device(), generator=generator, dtype=torch.float32)
    odd = torch.rand(N, K // 4, 1, device=benchmark.device(), generator=generator) < 0.5
    weight[..., 0] *= odd
    weight[..., 1] *= ~odd
    # A product with False may leave -0.0.
    return (weight + 0.0).reshape(N, K).to(dtype)


def random_weight(N: int, K: int, bits: int, dtype: torch.dtype) -> tuple[layer.PackedWeight, Tensor]:
    """Return a random packed weight, 16-bit or codes (8 bits: a scale per row; 4: per ``GROUP``), and its values."""
    dense = sparse_weight(N, K, dtype)
    group = K if bits != 4 else min(GROUP, K)
    if bits == 16:
        weight = benchmark.weight_of(benchmark.codes_of(dense, None), dtype, 16, K, kind="dense", sparse24=True)
        return layer.prepack(weight), dense.double()
    zero_offset = 1 << (bits - 1)
    grouped = dense.float().view(N, -1, group)
    scale = (grouped.abs().amax(-1) / (zero_offset - 1)).to(dtype)
    codes = (grouped / scale.float()[..., None]).round().clamp(1 - zero_offset, zero_offset - 1).view(N, K)
    stored = benchmark.codes_of((codes + zero_offset).to(torch.uint8), scale)
    weight = benchmark.weight_of(stored, dtype, bits, group, sparse24=True)
    return layer.prepack(weight), codes.double() * scale.double().repeat_interleave(group, 1)


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the ways to run a 2:4 layer of shape [N, K] on M rows."""
    x = torch.randn(M, K, device=benchmark.device(), dtype=dtype)
    flops = 2 * M * N * K
    found = []
    for bits in (16, 8, 4):
        module, weight = random_weight(N, K, bits, dtype)
        reference = x.double() @ weight.T
        del weight
        name, size = f"2:4 {'bf16' if bits == 16 else f'int{bits}'}", stored_bytes(module)
        found.append(Contender(name, benchmark.calls_of(module, x), size, flops, reference))
    dense = sparse_weight(N, K, dtype)
    found.append(benchmark.dense_contender(x, dense))
    exact = found[-1].reference
    found.append(unpruned.contender("int4, not 2:4", N, K, M, 4, GROUP if K % GROUP == 0 else K, dtype))
    packed = cusparselt.share(dense, naive.pack(dense, dense != 0, 16)[0])
    if packed is not None:
        calls = [partial(cusparselt.product, x, copy, None, 0) for (copy,) in benchmark.copies_of((packed,))]
        found.append(Contender("cuSPARSELt", calls, benchmark.bytes_of((packed,)), flops, exact, peer=True))
    return found


def stored_bytes(module: layer.PackedWeight) -> int:
    """Return the bytes of a weight that a kernel of this folder reads: numbers, bits, scales."""
    if mma_layout.holds(module.bits):
        return benchmark.bytes_of(t for t in (module.values, module.bits, module.scale, module.zero) if t is not None)
    rows, count = module.bits.shape[0], 2 * module.bits.shape[1]
    others = (tensor for tensor in (module.bits, module.scale, module.zero) if tensor is not None)
    return rows * count * 2 * module.width // 8 + benchmark.bytes_of(others)


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return 16-bit weights, and codes of four bits in the order of sparse tensor cores where the shape allows it."""
    found = [_tunable(N, K, 16, dtype)]
    return found + ([_tunable(N, K, 4, dtype)] if N % mma_layout.ROWS == 0 and K % mma_layout.COLUMNS == 0 else [])


def _tunable(N: int, K: int, bits: int, dtype: torch.dtype) -> Tunable:
    module, weight = random_weight(N, K, bits, dtype)
    modules = benchmark.modules_of(module)
    return Tunable(
        op="sparse24" if bits == 16 else "sparse24-tiles",
        shape=(N, K, 16) if bits == 16 else (N, K),
        dtype=dtype,
        inputs=lambda rows: torch.randn(rows, K, device=benchmark.device(), dtype=dtype),
        calls=lambda x, config: [partial(run, each, x, config) for each in modules],
        candidates=lambda rows: (tiles.candidates if bits == 16 else tiles.tiled_candidates)(N, K, rows),
        reference=lambda x: x.double() @ weight.T,
    )


@torch.no_grad()
def run(module: layer.PackedWeight, x: Tensor, config: tiles.Config) -> Tensor:
    """Return ``module(x)`` with a given configuration."""
    from . import launch

    return launch.sparse24(x, module.tensors(), config)

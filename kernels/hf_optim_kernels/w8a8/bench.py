"""Contenders for a layer with 8-bit weights and inputs, the quantization of the input included."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable
from . import layer, naive


def random_weight(N: int, K: int, dtype: torch.dtype, float8: bool) -> layer.PackedWeight:
    """Return a random packed weight [N, K] whose inputs have a grid per row."""
    codes = torch.randint(1, 256, (N, K), device=benchmark.device(), dtype=torch.uint8)
    if float8:
        codes = torch.randn(N, K, device=benchmark.device()).to(naive.FLOAT8)
    scale = (torch.rand(N, 1, device=benchmark.device()) * 0.01 + 0.001).to(dtype)
    inputs = SimpleNamespace(type="float8" if float8 else "int8", dynamic=True, symmetric=True)
    kind = "float" if float8 else "int"
    found = benchmark.codes_of(codes, scale)
    return layer.PackedWeight.of(benchmark.weight_of(found, dtype, 8, K, kind=kind, inputs=inputs))


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the ways to run an 8-bit layer of shape [N, K] on M rows; float8 where the device has it."""
    x = torch.randn(M, K, device=benchmark.device(), dtype=dtype)
    found = [_ours(N, K, x, float8) for float8 in ((False, True) if _has_float8() else (False,))]
    weight = random_weight(N, K, dtype, False)
    values = naive.dequantize(weight.weight, weight.w_scale, None, torch.float32).to(dtype)
    found.append(benchmark.dense_contender(x, values))
    if M > 16 and K % 8 == 0 and N % 8 == 0:
        size, flops = benchmark.bytes_of((weight.weight, weight.w_scale)), 2 * M * N * K
        pairs = [partial(_int_mm, x, *copy) for copy in benchmark.copies_of((weight.weight, weight.w_scale))]
        found.append(Contender("torch._int_mm", pairs, size, flops, _reference(x, weight), math="int8", peer=True))
    return found


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return int8 codes with a grid per row of the input, and float8 where the device has it."""
    return [_tunable(N, K, dtype, float8) for float8 in ((False, True) if _has_float8() else (False,))]


def _tunable(N: int, K: int, dtype: torch.dtype, float8: bool) -> Tunable:
    from . import launch, tiles

    packed = random_weight(N, K, dtype, float8)
    weights, grid = [module.tensors() for module in benchmark.modules_of(packed)], packed.grid()
    return Tunable(
        op=tiles.op_name(float8),
        shape=(N, K),
        dtype=dtype,
        inputs=lambda rows: torch.randn(rows, K, device=benchmark.device(), dtype=dtype),
        calls=lambda x, config: [partial(launch.linear, x, weight, grid, config) for weight in weights],
        candidates=lambda rows: [tiles.default(rows, N, K, float8), *tiles.candidates(rows, N, K, float8)],
        reference=lambda x: _reference(x, packed),
    )


def _ours(N: int, K: int, x: Tensor, float8: bool) -> Contender:
    weight = random_weight(N, K, x.dtype, float8)
    name, size = ("float8" if float8 else "int8"), benchmark.bytes_of((weight.weight, weight.w_scale))
    reference = _reference(x, weight)
    return Contender(f"w8a8 {name}", benchmark.calls_of(weight, x), size, 2 * len(x) * N * K, reference, math="int8")


def _reference(x: Tensor, packed: layer.PackedWeight) -> Tensor:
    codes, scale, zero = naive.quantize(x, packed.float8)
    return naive.multiply(codes, scale.double(), zero, packed.weight.double(), packed.w_scale, None, torch.float64)


def _int_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    codes, rows, _ = naive.quantize(x, False)
    return (torch._int_mm(codes, weight.T).float() * rows[:, None] * scale).to(x.dtype)


def _has_float8() -> bool:
    return benchmark.device().type == "cpu" or torch.cuda.get_device_capability() >= layer.LEAST_CAPABILITY["float8"]

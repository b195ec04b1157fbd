"""Contenders for a layer with 8-bit weights and inputs, the quantization of the input included."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..common.benchmark import Contender, bytes_of, codes_of, copies_of, device, modules_of, weight_of
from . import layer, naive


def packed_weight(N: int, K: int, dtype: torch.dtype, float8: bool) -> layer.PackedWeight:
    """A random packed weight [N, K] with a grid for each row of the input."""
    codes = torch.randint(1, 256, (N, K), device=device(), dtype=torch.uint8)
    if float8:
        codes = torch.randn(N, K, device=device()).to(naive.FLOAT8)
    scale = (torch.rand(N, 1, device=device()) * 0.01 + 0.001).to(dtype)
    inputs = SimpleNamespace(type="float8" if float8 else "int8", dynamic=True, symmetric=True)
    kind = "float" if float8 else "int"
    return layer.PackedWeight.of(weight_of(codes_of(codes, scale), dtype, 8, K, kind=kind, inputs=inputs))


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """The ways to run an 8-bit layer of shape [N, K] on M rows; float8 where the device has it."""
    x = torch.randn(M, K, device=device(), dtype=dtype)
    flops = 2 * M * N * K
    found = [_ours(N, K, x, flops, False)]
    if _has_float8():
        found.append(_ours(N, K, x, flops, True))
    held = packed_weight(N, K, dtype, False)
    values = naive.dequantize(held.weight, held.w_scale, None, torch.float32).to(dtype)
    calls = [partial(nn.functional.linear, x, *copy) for copy in copies_of((values,))]
    reference = x.double() @ values.double().T
    found.append(Contender("dense", calls, bytes_of((values,)), flops, reference, dense=True))
    if M > 16 and K % 8 == 0 and N % 8 == 0:
        size = bytes_of((held.weight, held.w_scale))
        pairs = [partial(_int_mm, x, *copy) for copy in copies_of((held.weight, held.w_scale))]
        found.append(Contender("torch._int_mm", pairs, size, flops, _reference(x, held), math="int8", peer=True))
    return found


def _ours(N: int, K: int, x: Tensor, flops: int, float8: bool) -> Contender:
    held = packed_weight(N, K, x.dtype, float8)
    calls = [partial(_call, each, x) for each in modules_of(held)]
    name, size = ("float8" if float8 else "int8"), bytes_of((held.weight, held.w_scale))
    return Contender(f"w8a8 {name}", calls, size, flops, _reference(x, held), math="int8")


def _reference(x: Tensor, held: layer.PackedWeight) -> Tensor:
    codes, scale, zero = naive.quantize(x, held.float8)
    return naive.multiply(codes, scale.double(), zero, held.weight.double(), held.w_scale, None, torch.float64)


def _int_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    codes, rows, _ = naive.quantize(x, False)
    return (torch._int_mm(codes, weight.T).float() * rows[:, None] * scale).to(x.dtype)


def _has_float8() -> bool:
    return device().type == "cpu" or torch.cuda.get_device_capability() >= layer.LEAST_CAPABILITY["float8"]


@torch.no_grad()
def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)

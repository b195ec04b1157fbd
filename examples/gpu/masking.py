"""Check that the masking kernel is exact on a GPU, and compare its time with PyTorch's operators.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/masking.py [WORD ...]

With words, only the sections that have one of them in their names run.
"""

from __future__ import annotations

import torch
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.masked_step import launch as fused
from hf_optim_kernels.masked_step import naive

DEVICE = torch.device("cuda")
section = Sections("masking.json")


def llama_shapes(layers=12, hidden=768, inner=2048):
    return [s for _ in range(layers) for s in [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]]


SETS = {"llama-85M, 84 tensors": llama_shapes(), "2000 tensors of 128x256": [(128, 256)] * 2000}


@section("exact")
def _():
    """Compare the kernel with the specification, bitwise, with NaN in the data."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, shapes in {**SETS, "odd": [(1,), (7, 3), (4097,), (129, 130), (4096, 3)]}.items():
            g = torch.Generator(DEVICE).manual_seed(0)
            tensors = [torch.randn(s, device=DEVICE, generator=g).to(dtype) for s in shapes]
            tensors[-1].view(-1)[0] = float("nan")
            masks = [torch.rand(s, device=DEVICE, generator=g) < 0.5 for s in shapes]
            expected = [t.clone() for t in tensors]
            naive.zero_(expected, masks)
            fused.Zeroing(masks)(tensors)
            bits = torch.int16 if dtype.itemsize == 2 else torch.int32
            same = all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip(tensors, expected, strict=True))
            results[f"{dtype} {name}"] = same
            assert same
    return results


@section("kernel")
def _():
    """Return the microseconds of the device (CUDA graph), of an eager call, and of the host."""
    rows = {}
    for name, shapes in SETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
            masks = [torch.rand(s, device=DEVICE) < 0.5 for s in shapes]
            count = sum(t.numel() for t in tensors)
            zero = fused.Zeroing(masks)
            contenders = {
                "torch._foreach_mul_": lambda: torch._foreach_mul_(tensors, masks),
                "masked_fill_ each": lambda: [t.masked_fill_(m, 0) for t, m in zip(tensors, masks, strict=True)],
                "ours": lambda: zero(tensors),
            }
            for contender, call in contenders.items():
                graph = benchmark.graph_time([call]).us
                row = rows[f"{name} {dtype} {contender}"] = {
                    "graph_us": round(graph, 1),
                    "eager_us": round(benchmark.eager_time([call]).us, 1),
                    "host_us": round(benchmark.host_time(call).us, 1),
                    "TB/s (mask + read + write)": round(count * (1 + 2 * dtype.itemsize) / graph / 1e6, 2),
                }
                print(name, dtype, contender, row, flush=True)
    return rows

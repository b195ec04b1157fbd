"""Masking on a GPU: that the kernel is exact, and its time beside PyTorch's own ways.

OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/masking.py [WORD ...]     (sections with a word in their names)
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
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, shapes in {**SETS, "odd": [(1,), (7, 3), (4097,), (129, 130), (4096, 3)]}.items():
            g = torch.Generator(DEVICE).manual_seed(0)
            tensors = [torch.randn(s, device=DEVICE, generator=g).to(dtype) for s in shapes]
            tensors[-1].view(-1)[0] = float("nan")
            masks = [torch.rand(s, device=DEVICE, generator=g) < 0.5 for s in shapes]
            expected = [t.clone() for t in tensors]
            naive.zero_(expected, masks)
            fused.Zeroing(masks)(tensors)
            kind = torch.int16 if dtype.itemsize == 2 else torch.int32
            same = all(torch.equal(a.view(kind), b.view(kind)) for a, b in zip(tensors, expected, strict=False))
            found[f"{dtype} {name}"] = same
            assert same
    return found


@section("kernel")
def _():
    """Microseconds on the device (graph), eager, and of the host alone."""
    rows = {}
    for name, shapes in SETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
            masks = [torch.rand(s, device=DEVICE) < 0.5 for s in shapes]
            count = sum(t.numel() for t in tensors)
            zero = fused.Zeroing(masks)
            ways = {
                "torch._foreach_mul_": lambda: torch._foreach_mul_(tensors, masks),
                "masked_fill_ each": lambda: [t.masked_fill_(m, 0) for t, m in zip(tensors, masks, strict=True)],
                "ours": lambda: zero(tensors),
            }
            for way, call in ways.items():
                graph = benchmark.graph_time([call]).us
                rows[f"{name} {dtype} {way}"] = {
                    "graph_us": round(graph, 1),
                    "eager_us": round(benchmark.eager_time([call]).us, 1),
                    "host_us": round(benchmark.host_time(call).us, 1),
                    "TB/s (mask + read + write)": round(count * (1 + 2 * dtype.itemsize) / graph / 1e6, 2),
                }
                print(name, dtype, way, rows[f"{name} {dtype} {way}"], flush=True)
    return rows

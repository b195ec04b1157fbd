"""A down projection on int8 codes behind a rotation at run time: in one pass over its input, and in two.

    OUT=. python examples/gpu/rotated_inputs.py      # results in rotated_inputs.json in $OUT

The layer is Llama-3-8B's, 14336 inputs in blocks of 2048. ``plain`` is the layer without a rotation, ``two passes`` the
transform and then the layer, ``one pass`` the kernel that rotates and rounds, and then the product. Graphs, cold cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sections import Sections

from hf_optim.compressed.weights import Codes, InputQuantization, QuantizedWeight
from hf_optim_kernels.common import benchmark
from hf_optim_kernels.hadamard import layer as hadamard
from hf_optim_kernels.w8a8 import layer

DEVICE = benchmark.device()
CUDA = DEVICE.type == "cuda"
OUT, IN, BLOCK = (4096, 14336, 2048) if CUDA else (48, 96, 32)
ROWS = (1, 8, 64, 256, 2048) if CUDA else (1, 5)
section = Sections("rotated_inputs.json")


def packed_weight() -> layer.PackedWeight:
    """Return a random layer with inputs in int8, a scale per token."""
    codes = torch.randint(0, 256, (OUT, IN), dtype=torch.uint8, device=DEVICE)
    found = Codes(codes, torch.full((OUT, 1), 0.01, dtype=torch.bfloat16, device=DEVICE), None)
    weight = QuantizedWeight(
        name="down", shape=(OUT, IN), dtype=torch.bfloat16, device=DEVICE, kind="int", bits=8, group_size=IN,
        symmetric=True, ordered=False, inputs=InputQuantization("int8", True, True), sparse24=False, bias=None,
        codes=lambda: found,
    )  # fmt: skip
    return layer.PackedWeight.of(weight)


def two_passes(one: layer.PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """Return the layer of the transformed input."""
    rotated = hadamard.compute(x, BLOCK)
    assert rotated is not None
    return one(rotated)


def one_pass(one: layer.PackedWeight, x: torch.Tensor) -> torch.Tensor | None:
    """Return the same from the kernel that rotates and rounds, for few rows, too; None if none runs here."""
    found = hadamard.compute_int8(x, BLOCK)
    return None if found is None else one.quantized_forward(*found)


@section("time")
def time() -> dict[str, Any]:
    """Microseconds by rows, and whether both ways give the same bits."""
    modules = benchmark.modules_of(packed_weight())
    found: dict[str, Any] = {}
    for rows in ROWS:
        x = torch.randn(rows, IN, device=DEVICE).to(torch.bfloat16)
        fused = one_pass(modules[0], x)
        if fused is None:
            print("no kernel runs here")
            return {}
        difference = (fused.double() - two_passes(modules[0], x).double()).norm() / fused.double().norm()
        calls = {
            "plain": [partial(one, x) for one in modules],
            "two passes": [partial(two_passes, one, x) for one in modules],
            "one pass": [partial(one_pass, one, x) for one in modules],
        }
        taken = {name: benchmark.graph_time(each).us for name, each in calls.items()}
        found[f"{rows} rows"] = taken | {"difference": float(difference)}
        print(rows, "rows:", ", ".join(f"{name} {value:.1f}" for name, value in taken.items()), f"{difference:.1e}")
    return found

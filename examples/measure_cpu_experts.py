"""Times of packed experts on a CPU, beside transformers' grouped product of the same experts decoded.

    python examples/measure_cpu_experts.py [--output FILE] [--shape D INNER EXPERTS TOP_K]

Each time is the best of several turns, in which both sides run one after the other. With one thread (OMP_NUM_THREADS=1)
it is CPU time, which other processes of a busy host change less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from hf_optim.compressed.weights import Codes
from hf_optim_kernels.packed_experts import layer

TURNS = 7
FORMATS = {
    "w4a16 bfloat16": (4, 128, torch.bfloat16),
    "w8a16 bfloat16": (8, 0, torch.bfloat16),
    "w4a16 float32": (4, 128, torch.float32),
}


def gate(pairs):
    first, second = pairs.chunk(2, -1)
    return F.silu(first) * second


def experts(d, inner, count, bits, group, dtype):
    """Packed experts with random codes, and the same decoded, as stock transformers keeps them."""
    random = torch.Generator().manual_seed(0)
    stored, dense, described = {}, {}, {}
    for side, (rows, columns) in {"up": (2 * inner, d), "down": (d, inner)}.items():
        size = group or columns
        stored[side], matrices = [], torch.empty(count, rows, columns, dtype=dtype)
        for number in range(count):
            codes = torch.randint(0, 2**bits, (rows, columns), generator=random, dtype=torch.uint8)
            scale = (torch.rand(rows, columns // size, generator=random) / 2**bits).to(dtype)
            stored[side].append(Codes(codes, scale, None))
            values = (codes.view(rows, -1, size).float() - 2 ** (bits - 1)) * scale.float()[..., None]
            matrices[number] = values.view(rows, columns).to(dtype)
        dense[side] = matrices
        described[side] = SimpleNamespace(
            kind="int", bits=bits, group_size=size, symmetric=True, ordered=False, inputs=None, dtype=dtype,
            shape=(rows, columns), device=torch.device("cpu"),
        )  # fmt: skip
    packed = layer.prepack(
        SimpleNamespace(**described, count=count, activation="silu", codes=lambda side, number: [stored[side][number]])
    )
    stock = SimpleNamespace(
        has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True, has_post_expert_norm=False,
        training=False, _is_expert_parallel=False, num_experts=count, gate_up_proj=dense["up"],
        down_proj=dense["down"], _apply_gate=gate, act_fn=F.silu,
    )  # fmt: skip
    return packed, stock


@torch.no_grad()
def times(packed, stock, tokens, d, count, top_k):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, d, generator=random).to(packed.dtype)
    chosen = torch.rand(tokens, count, generator=random).argsort(1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=random)
    ways = {
        "packed": lambda: packed(hidden, chosen, weights, gate),
        "stock": lambda: grouped_mm_experts_forward(stock, hidden, chosen, weights),
    }
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, call in ways.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    error = float((ways["packed"]().float() - ways["stock"]().float()).norm() / ways["stock"]().float().norm())
    return {**{f"{name}_ms": round(value * 1e3, 3) for name, value in best.items()}, "difference": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shape", type=int, nargs=4, default=[1024, 2816, 8, 2])
    options = parser.parse_args()
    d, inner, count, top_k = options.shape
    capability = torch.backends.cpu.get_cpu_capability()
    result = {"shape": options.shape, "cpu": f"{platform.machine()}, {capability}", "torch": torch.__version__}
    result["threads"] = torch.get_num_threads()
    result["clock"] = "CPU time" if result["threads"] == 1 else "wall time"
    result["load"] = [round(each, 1) for each in os.getloadavg()]
    for name, (bits, group, dtype) in FORMATS.items():
        packed, stock = experts(d, inner, count, bits, group, dtype)
        size = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers()) / 2**20
        dense = sum(each.numel() * each.element_size() for each in (stock.gate_up_proj, stock.down_proj)) / 2**20
        result[name] = {"mib": round(size, 1), "dense_mib": round(dense, 1), "label": packed.label}
        for tokens in (1, 8, 64, 128, 512, 2048):
            found = result[name][str(tokens)] = times(packed, stock, tokens, d, count, top_k)
            print(f"{name:16s} {tokens:4d}  packed {found['packed_ms']:9.2f} ms  stock {found['stock_ms']:9.2f} ms  "
                  f"{found['difference']:.1e}", flush=True)  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

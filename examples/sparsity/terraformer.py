"""Terraformer by its parts: the time of one token, and the memory of training by depth.

    python examples/sparsity/terraformer.py --output model_cards/sparsity
    python examples/sparsity/terraformer.py --output trial --parts decoding --width 128 --repeats 1   # a trial

Decoding: one thread, float32, batch 1, random weights, at a width where weights are more than the caches of a CPU hold.
Memory: peak of a process of its own for each depth, for a narrow model and long rows, so that activations rule.
Losses beside a dense twin are in ``sparse_projections.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sparse_projections import VARIANTS, converted, llama

from hf_optim.toolkit.compat import CACHE

STEP = {"technique": "terraformer", "block": 64, "modules": 16, "gated": True, "activation": "silu", "chunk": 64}
OFF = {"sparse_ffn": False, "sparse_qkv": False, "lsh": False, "reversible": False, "recurrence": 0}
PARTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "sparse FFN": {**STEP, **OFF, "sparse_ffn": True},
    "sparse FFN and QKV": {**STEP, **OFF, "sparse_ffn": True, "sparse_qkv": True},
    "all parts": STEP,
}


# Tensors above 64 KiB are mapped by themselves, so that memory that is free does not count as used.
MAPPED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def bytes_read(model: Any) -> int:
    """Return the bytes of the weights of blocks that one token reads: of a sparse layer, one unit of each block."""
    total = 0
    for name, parameter in model.named_parameters():
        if ".layers." not in name:
            continue
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        block = getattr(owner, "entry", {}).get("block", 1)
        share = block if name.rpartition(".")[2] in ("up", "gate", "down") else 1
        total += parameter.numel() * parameter.element_size() // share
    return total


def measure_decoding(width: int, layers: int, repeats: int, tokens: int = 8) -> dict[str, Any]:
    """Return the seconds of one token by what is made sparse, behind a prompt of 64 tokens."""
    rows: dict[str, Any] = {}
    ids = torch.randint(3, 1024, (1, 64), generator=torch.Generator().manual_seed(0))
    dense = llama(width, layers, width // 64, 4 * width, 1024, 1024, 0)
    for name, step in PARTS.items():
        model = converted(dense, step, 0).eval()
        with torch.no_grad():
            times = []
            for _ in range(repeats):
                cache = model(ids, use_cache=True)[CACHE]
                model(ids[:, :1], use_cache=True, **{CACHE: cache})
                begin = time.thread_time()
                for _ in range(tokens):
                    model(ids[:, :1], use_cache=True, **{CACHE: cache})
                times.append((time.thread_time() - begin) / tokens)
        rows[name] = {"seconds": median(times), "least": min(times), "bytes_of_blocks": bytes_read(model)}
        print(name, json.dumps(rows[name]), flush=True)
        if step is not None:
            del model
    for row in rows.values():
        row["times_as_fast"] = rows["dense"]["seconds"] / row["seconds"]
        row["bytes_less"] = rows["dense"]["bytes_of_blocks"] / row["bytes_of_blocks"]
    return {"width": width, "layers": layers, "units": 4 * width, "heads": width // 64, "rows": rows}


def high_water() -> float:
    """Return the highest memory of this process since it was reset, in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell the peak of a process")


def peak_of(layers: int, part: str) -> float:
    """Return by how much the memory of this process grows at most in a forward and a backward, in MiB."""
    step = {**VARIANTS["terraformer"], "reversible": part == "reversible"} if part != "dense" else None
    model = converted(llama(64, layers, 8, 128, 512, 1024, 0), step, 0).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(3, 512, (4, 16))
    model(ids, labels=ids, use_cache=False).loss.backward()  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = high_water()
    ids = torch.randint(3, 512, (4, 512))
    model(ids, labels=ids, use_cache=False).loss.backward()
    return high_water() - before


def measure_memory(depths: list[int]) -> dict[str, Any]:
    """Return the growth of the peak in MiB by depth, each in a process of its own."""
    found: dict[str, Any] = {"depths": depths}
    for part in ("dense", "stored", "reversible"):
        found[part] = []
        for layers in depths:
            command = [sys.executable, __file__, "--peak", str(layers), part]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=MAPPED)
            found[part].append(float(done.stdout.split()[-1]))
        print(part, found[part], flush=True)
    found["growth"] = {part: found[part][-1] / max(found[part][0], 1e-9) for part in ("dense", "stored", "reversible")}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/sparsity"))
    parser.add_argument("--parts", nargs="+", default=["memory", "decoding"])
    parser.add_argument("--width", type=int, default=2048, help="of the models that decode")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak:
        print(peak_of(int(args.peak[0]), args.peak[1]))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "terraformer.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measures = {
        "memory": lambda: measure_memory(args.depths),
        "decoding": lambda: measure_decoding(args.width, args.layers, args.repeats),
    }
    for part in args.parts:
        results[part] = measures[part]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

"""Time encoders with sparse attention on a GPU beside dense ones and transformers' own sparse classes, by length.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/sparse_encoders.py [WORD ...]

An encoder of BERT-base width with 4 layers, random weights, bfloat16, batch 1: with SDPA, converted by each pattern,
and as stock Longformer (window 512) and BigBird (blocks of 64). Each is first compared with the same model under the
mask of its pattern, computed densely. Milliseconds of a forward, eager and as a replayed CUDA graph, and peak memory.
With words, only the sections that have one of them in their names run: ``check``, ``times``, ``called``. ``TINY=1`` runs all of it
in small.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from typing import Any

import torch
from sections import Sections
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim

TINY = bool(os.environ.get("TINY"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LENGTHS = (256, 512) if TINY else (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
CHECKED = 512 if TINY else 4096
CALLED = (256, 512) if TINY else (1024, 4096, 16384)
DENSE_UP_TO, REPEATS = 65536, 3 if TINY else 9
WIDTH = {"hidden_size": 64, "num_attention_heads": 4} if TINY else {"hidden_size": 768, "num_attention_heads": 12}
SHAPE = {
    **WIDTH, "intermediate_size": 4 * WIDTH["hidden_size"], "num_hidden_layers": 4, "vocab_size": 1024,
    "max_position_embeddings": LENGTHS[-1] + 8,
}  # fmt: skip
DENSE = "dense (SDPA)"
# transformers looks at the values of a mask to leave it out, which nothing that is captured can do: then SDPA gets one,
# and is not the fast one. The dense model is timed with a function that never has a mask.
AttentionInterface.register("sdpa_without_mask", AttentionInterface()["sdpa"])
AttentionMaskInterface.register("sdpa_without_mask", lambda **_: None)
# A window of 256 tokens a side, or about as many keys, and what each pattern adds to it.
RECIPES: dict[str, dict[str, Any]] = {
    "local": {"window": 257},
    "blockwise": {"block": 512},
    "dilated": {"window": 256, "dilation": [2]},
    "strided": {"stride": 128, "window": 128},
    "sparse_transformer": {"stride": 128, "vertices": 8},
    "longformer": {"window": 512},
    "big_bird": {"block": 64, "random": 3},
    "etc": {"radius": 256},
    "axial": {"columns": 256},
    "compressed": {"stride": 16, "local": 256},
}


def build(name: str) -> Any:
    """Return an encoder by name, in evaluation mode on the device."""
    torch.manual_seed(0)
    if name == "stock Longformer":
        made = LongformerModel(LongformerConfig(**SHAPE, attention_window=64 if TINY else 512))
    elif name == "stock BigBird":
        made = BigBirdModel(BigBirdConfig(**SHAPE, block_size=16 if TINY else 64, num_random_blocks=3))
    else:
        made = BertModel(BertConfig(**SHAPE), add_pooling_layer=False)
    model = made.to(DEVICE, DTYPE).eval()
    if name == DENSE:
        model.set_attn_implementation("sdpa_without_mask")
    if name in RECIPES:
        model = hf_optim.optimize(model, [{"technique": name, **RECIPES[name]}])
    return model


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(5, 1000, (1, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@torch.no_grad()
def check() -> dict[str, float]:
    """Relative distance of the last hidden states from those of the same model with dense products under a mask."""
    found = {}
    ids = ids_of(CHECKED)
    for name in RECIPES:
        model = build(name)
        hidden = model(ids)[0].float()
        code: Any = sys.modules[type(model).__module__]  # of the model, as a checkpoint brings it
        code.lists_for, lists_for = lambda *args, **more: None, getattr(code, "lists_for", None)
        right = model(ids)[0].float()
        code.lists_for = lists_for
        found[name] = float((hidden - right).norm() / right.norm())
        print(f"{name:20s} {found[name]:.1e}", "" if found[name] < 2e-2 else "WRONG", flush=True)
        del model
    return found


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def eager_ms(model: Any, ids: torch.Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        model(ids)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.no_grad()
def graph_ms(model: Any, ids: torch.Tensor) -> float | str:
    """Milliseconds of a replayed CUDA graph of a forward, or why there is none."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            model(ids)
        begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(REPEATS)] for _ in range(2))
        graph.replay()
        for begin, end in zip(begins, ends, strict=True):
            begin.record()
            graph.replay()
            end.record()
        wait()
        return statistics.median(a.elapsed_time(b) for a, b in zip(begins, ends, strict=True))
    except Exception as problem:
        wait()
        return f"{type(problem).__name__}: {str(problem)[:120]}"


@torch.no_grad()
def times() -> dict[str, dict[int, dict[str, Any]]]:
    """Milliseconds and peak MiB of a forward by model and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in (DENSE, *RECIPES, "stock Longformer", "stock BigBird"):
        model, rows = build(name), {}
        for length in LENGTHS:
            if length > DENSE_UP_TO and name not in RECIPES:
                continue
            ids, row = ids_of(length), {}
            try:
                start = time.perf_counter()
                model(ids)
                wait()
                row["first_ms"] = (time.perf_counter() - start) * 1e3
                model(ids)
                if DEVICE == "cuda":
                    wait()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    model(ids)
                    row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row["eager_ms"] = eager_ms(model, ids)
                row["graph_ms"] = graph_ms(model, ids) if DEVICE == "cuda" and not name.startswith("stock") else None
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
            rows[length] = row
        found[name] = rows
        shown = (
            f"{n // 1024}k {r['eager_ms']:.2f}/{r['graph_ms'] if not isinstance(r['graph_ms'], float) else round(r['graph_ms'], 2)}"
            f" {r.get('peak_mib', 0):.0f}M" if "failed" not in r else f"{n // 1024}k {r['failed'][:60]}"
            for n, r in rows.items()
        )  # fmt: skip
        print(f"{name:20s}", "; ".join(shown), flush=True)
        del model
        gc.collect()
    return found


@torch.no_grad()
def called() -> dict[str, dict[int, dict[str, Any]]]:
    """Milliseconds of calls of a model, and of ``hf_optim.captured`` of it, with the distance of their results."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in (DENSE, *RECIPES):
        model, found[name] = build(name), {}
        forward = hf_optim.captured(model)
        for length in CALLED:
            ids, row = ids_of(length), {}
            try:
                right = model(ids)[0].float()
                for _ in range(3):
                    replayed = forward(ids)[0].float()
                row = {"difference": float((replayed - right).norm() / right.norm()), "failure": forward.failure}
                row |= {"eager_ms": eager_ms(model, ids), "captured_ms": eager_ms(forward, ids)}
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
            found[name][length] = row
            print(f"{name:20s} {length:6,}", row, flush=True)
        del model, forward
        gc.collect()
    return found


def main() -> None:
    section = Sections("sparse_encoders.json")
    section("check")(check)
    section("times")(times)
    section("called")(called)


if __name__ == "__main__":
    main()

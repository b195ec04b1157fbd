"""Time encoders with sparse attention on a GPU beside dense ones and transformers' own sparse classes, by length.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/sparse_encoders.py [WORD ...]

An encoder of BERT-base width with 4 layers, random weights, bfloat16, batch 1: with SDPA, converted by each pattern,
with FlexAttention under three masks (``flex_encoders.py``), and as stock Longformer (window 512) and BigBird (blocks of
64). Each is first compared with the same model under the mask of its pattern, computed densely. Milliseconds of a
forward, eager and as a replayed CUDA graph, and peak memory. With words, only the sections that have one of them in
their names run: ``check``, ``times``, ``called``; of those, models that a word ``name=MODEL`` is in, if there is one. What is measured is written at once. ``TINY=1`` runs it in small,
without FlexAttention.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flex_encoders
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
DENSE_UP_TO, REPEATS, LONGEST_MS = 65536, 3 if TINY else 9, 1000.0
WIDTH = {"hidden_size": 64, "num_attention_heads": 4} if TINY else {"hidden_size": 768, "num_attention_heads": 12}
SHAPE = {
    **WIDTH, "intermediate_size": 4 * WIDTH["hidden_size"], "num_hidden_layers": 4, "vocab_size": 1024,
    "max_position_embeddings": LENGTHS[-1] + 8,
}  # fmt: skip
DENSE, FLEX = "dense (SDPA)", ", FlexAttention"
CHOSEN = [word.removeprefix("name=") for word in sys.argv[1:] if word.startswith("name=")]
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


def chosen(*names: str) -> list[str]:
    """Return the models to measure."""
    return [name for name in names if not CHOSEN or any(word in name for word in CHOSEN)]


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
    if name.endswith(FLEX):
        flex_encoders.use(model, name.removesuffix(FLEX))
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
    for name in chosen(*RECIPES):
        model = build(name)
        hidden = model(ids)[0].float()
        code: Any = sys.modules[type(model).__module__]  # of the model, as a checkpoint brings it
        # Without lists of blocks, all is one product under a mask; of ``compressed`` for all queries at once.
        former = {word: getattr(code, word) for word in ("lists_for", "QUERIES") if hasattr(code, word)}
        vars(code).update(lists_for=lambda *args, **more: None, QUERIES=CHECKED)
        right = model(ids)[0].float()
        vars(code).update(former)
        found[name] = float((hidden - right).norm() / right.norm())
        if name in flex_encoders.LIKE_A_TECHNIQUE and DEVICE == "cuda":
            flex = build(name + FLEX)(ids)[0].float()
            found[name + FLEX] = float((flex - right).norm() / right.norm())
        del model
    for name, each in found.items():
        print(f"{name:30s} {each:.1e}", "" if each < 2e-2 else "WRONG", flush=True)
    return found


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def eager_ms(model: Any, ids: torch.Tensor) -> float:
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < LONGEST_MS:
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
        times: list[float] = []
        for begin, end in zip(begins, ends, strict=True):
            begin.record()
            graph.replay()
            end.record()
            wait()
            times.append(begin.elapsed_time(end))
            if sum(times) > LONGEST_MS:
                break
        return statistics.median(times)
    except Exception as problem:
        wait()
        return f"{type(problem).__name__}: {str(problem)[:120]}"


@torch.no_grad()
def times(keep: Callable[[str, Any], None]) -> dict[str, dict[int, dict[str, Any]]]:
    """Milliseconds and peak MiB of a forward by model and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    flex = [each + FLEX for each in flex_encoders.MASKS] if DEVICE == "cuda" else []
    for name in chosen(DENSE, *RECIPES, "stock Longformer", "stock BigBird", *flex):
        model, rows = build(name), {}
        for length in flex_encoders.LENGTHS if name in flex else LENGTHS:
            linear = name in RECIPES or name.removesuffix(FLEX) in flex_encoders.LINEAR
            if length > DENSE_UP_TO and not linear:
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
        keep("times", found)
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
def called(keep: Callable[[str, Any], None]) -> dict[str, dict[int, dict[str, Any]]]:
    """Milliseconds of calls of a model, and of ``hf_optim.captured`` of it, with the distance of their results."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in chosen(DENSE, *RECIPES):
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
            keep("called", found)
            print(f"{name:20s} {length:6,}", row, flush=True)
        del model, forward
        gc.collect()
    return found


def main() -> None:
    section = Sections("sparse_encoders.json")
    section("check")(check)
    section("called")(lambda: called(section.keep))
    section("times")(lambda: times(section.keep))


if __name__ == "__main__":
    main()

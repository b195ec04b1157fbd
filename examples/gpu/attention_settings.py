"""Time attention to a key/value cache, in 16 bits and quantized, in other settings than its launches use.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/attention_settings.py

Each setting is compared with float64 first. ``attention-settings.json`` in ``$OUT`` (or here) has every row. Kernels
are compiled by processes of their own first, as many as there are cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kv_cache import FORMATS, SHAPES, D, G, H, error, filled, reference_attention, tensors

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.decode_attention import launch as dense
from hf_optim_kernels.decode_attention import op as dense_op
from hf_optim_kernels.kv_cache import launch, naive, op
from hf_optim_kernels.kv_cache.format import Store

QUANTIZED = ("int8", "int4", "int4 symmetric", "float8")
# Positions of a block, warps, stages, programs of a multiprocessor.
BLOCKS = ((128, 4, 3, 1), (128, 4, 4, 1), (128, 8, 4, 1), (128, 4, 3, 2), (64, 4, 3, 2), (64, 4, 3, 3))
STAGES = (3, 4)
PIECES = {"1 x 32k": (95, 127), "16 x 8k": (8, 15, 17, 19, 26), "16 x 32k": (17, 19, 26, 29, 36, 40, 45, 50)}


@contextlib.contextmanager
def settings(module: Any, **values: Any) -> Iterator[None]:
    """Set names of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def dense_case(chosen: tuple[int, int, int, int], early: bool) -> Any:
    return settings(dense, FASTEST=chosen, EARLY=early)


def code_case(stages: int, early: bool = True, split: int | None = None) -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(settings(dense, EARLY=early))
    stack.enter_context(settings(launch, STAGES=stages))
    if split is not None:
        stack.enter_context(settings(launch, pieces=lambda *given: split))
    return stack


def check_dense(chosen: tuple[int, int, int, int], early: bool) -> float:
    query, key, value = tensors(1, 5000)
    with dense_case(chosen, early):
        found = [dense_op.decode_attention(query, key, value, None, None, None, 0.1, 0.0) for _ in range(5)]
    assert all(torch.equal(each, found[0]) for each in found), "equal inputs, other bits"
    return error(found[0], reference_attention(query, key, value, None, None, 0.1, 0.0))


def check_codes(name: str, stages: int) -> float:
    fmt = FORMATS[name]
    query, key, value = tensors(2, 6001)
    store, state = filled(fmt, key, value)
    with code_case(stages):
        call = lambda: op.kv_attend(query, state, 0, 6001, None, None, 0.1, 0.0, [int(x) for x in fmt], *store)  # noqa: E731
        found = [call() for _ in range(5)]
    assert all(torch.equal(each, found[0]) for each in found), "equal inputs, other bits"
    k, v = naive.read(Store(*store[:6], *(t.double() for t in store[6:])), fmt, 6001, int(state[1]))
    return error(found[0], reference_attention(query, k, v, None, None, 0.1, 0.0))


def jobs() -> list[Any]:
    found: list[Any] = [lambda c=c, e=e: check_dense(c, e) for c in BLOCKS for e in (True, False)]
    return found + [lambda n=n, c=c: check_codes(n, c) for n in QUANTIZED for c in STAGES]


def measure(rows: list[dict[str, Any]], calls: list[Any], size: int, **about: Any) -> None:
    try:
        for _ in range(2):  # after a wait, the first measurement is some percent slower
            about["us"] = round(benchmark.graph_time(calls, 15).us, 2)
        about["tb_s"] = round(size / about["us"] / 1e6, 2)
    except Exception as problem:
        about["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
    rows.append(about)
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--warm"]:
        for job in jobs()[int(sys.argv[2]) :: int(sys.argv[3])]:
            with contextlib.suppress(Exception):
                job()
        return
    begin, count = time.time(), min(14, os.cpu_count() or 1)
    workers = [subprocess.Popen([sys.executable, __file__, "--warm", str(i), str(count)]) for i in range(count)]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for job, about in zip(
        jobs(), [("16 bits", *c, e) for c in BLOCKS for e in (True, False)] + [(n, c) for n in QUANTIZED for c in STAGES],
        strict=True,
    ):  # fmt: skip
        rows.append({"check": about, "error": job()})
        print(about, f"{rows[-1]['error']:.2e}", flush=True)
    copy = benchmark.copy_bandwidth() / 1e6
    print(f"copy {copy:.2f} TB/s", flush=True)
    for shape, (B, N) in {**SHAPES, "1 x 30000 of 32k": (1, 32768)}.items():
        query, key, value = tensors(B, N)
        copies = max(1, -(-200_000_000 // (2 * key.numel() * 2)))
        caches = [(key, value)] + [(key.clone(), value.clone()) for _ in range(copies - 1)]
        ranges, size = None, 4 * key.numel()
        if "30000" in shape:
            ranges = torch.tensor([[[0, 30000, 30000]]], dtype=torch.int32, device="cuda")
            size = 4 * B * G * 30000 * D
        for chosen in BLOCKS:
            for early in (True, False):
                with dense_case(chosen, early):
                    call = lambda k, v: dense_op.decode_attention(query, k, v, None, ranges, None, 0.1, 0.0)  # noqa: E731
                    calls = [lambda k=k, v=v: call(k, v) for k, v in caches]
                    measure(rows, calls, size, shape=shape, format="16 bits", block=chosen, early=early)
        if ranges is None:
            sdpa = lambda k, v: F.scaled_dot_product_attention(query, k, v, scale=0.1, enable_gqa=True)  # noqa: E731
            measure(rows, [lambda k=k, v=v: sdpa(k, v) for k, v in caches], size, shape=shape, format="sdpa")
        del caches
        for name in QUANTIZED if ranges is None else ():
            fmt = FORMATS[name]
            store, state = filled(fmt, key, value)
            size = sum(t.numel() * t.element_size() for t in store)
            copies = max(1, -(-200_000_000 // size))
            stores = [store] + [Store(*(t.clone() for t in store)) for _ in range(copies - 1)]
            fields = [int(x) for x in fmt]
            calls = [lambda s=s: op.kv_attend(query, state, 0, N, None, None, 0.1, 0.0, fields, *s) for s in stores]
            tried = [(3, True, None), (4, True, None), (3, False, None)]
            tried += [(3, True, split) for split in PIECES[shape]]
            for stages, early, split in tried:
                with code_case(stages, early, split):
                    measure(rows, calls, size, shape=shape, format=name, stages=stages, early=early, pieces=split)
            with code_case(3), settings(launch, combine=lambda *given: None):
                measure(rows, calls, size, shape=shape, format=name, sum_of_pieces=False)
            del store, stores, calls
            torch.cuda.empty_cache()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": (H, G, D), "copy_tb_s": copy}
    path = Path(os.environ.get("OUT", "."), "attention-settings.json")
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

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

from hf_optim_kernels.common import benchmark, tuning
from hf_optim_kernels.decode_attention import launch as dense
from hf_optim_kernels.decode_attention import op as dense_op
from hf_optim_kernels.kv_cache import launch, naive, op
from hf_optim_kernels.kv_cache.format import Store

QUANTIZED = ("int8", "int4", "int4 symmetric", "float8")
# Positions of a block, warps, stages, programs of a multiprocessor.
BLOCKS = ((128, 4, 3, 1), (128, 8, 3, 1), (64, 4, 3, 2))
# Whether attention begins before the launch before has ended, and blocks that a program fetches before it waits.
EARLY = ((True, 2), (True, 0), (False, 0))
# Programs of a multiprocessor, tiles under way, and registers of a thread, by bits.
CODES = {
    8: ((11, 3, 0), (10, 3, 0), (12, 2, 0), (12, 2, 168)),
    4: ((9, 3, 0), (10, 3, 0), (10, 2, 0), (11, 2, 184), (12, 2, 168), (9, 4, 0)),
}
PIECES = (36, 40, 45, 50)
TIMED = {name: SHAPES[name] for name in ("1 x 32k", "16 x 32k")}


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


def dense_case(chosen: tuple[int, int, int, int], early: tuple[bool, int]) -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(settings(dense, AHEAD=early[0]))
    stack.enter_context(tuning.forced(dense.OP, dense.Setting(*chosen, early[1])._asdict()))
    return stack


def code_case(fmt: Any, setting: tuple[int, int, int], split: int | None = None) -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(tuning.forced(launch.name_of(fmt), launch.Setting(*setting)._asdict()))
    if split is not None:
        stack.enter_context(settings(launch, pieces=lambda *given: split))
    return stack


def check_dense(chosen: tuple[int, int, int, int], early: tuple[bool, int]) -> float:
    query, key, value = tensors(1, 5000)
    with dense_case(chosen, early):
        found = [dense_op.decode_attention(query, key, value, None, None, None, 0.1, 0.0) for _ in range(5)]
    assert all(torch.equal(each, found[0]) for each in found), "equal inputs, other bits"
    return error(found[0], reference_attention(query, key, value, None, None, 0.1, 0.0))


def check_codes(name: str, setting: tuple[int, int, int]) -> float:
    fmt = FORMATS[name]
    query, key, value = tensors(2, 6001)
    store, state = filled(fmt, key, value)
    with code_case(fmt, setting):
        call = lambda: op.kv_attend(query, state, 0, 6001, None, None, 0.1, 0.0, [int(x) for x in fmt], *store)  # noqa: E731
        found = [call() for _ in range(5)]
    assert all(torch.equal(each, found[0]) for each in found), "equal inputs, other bits"
    k, v = naive.read(Store(*store[:6], *(t.double() for t in store[6:])), fmt, 6001, int(state[1]))
    return error(found[0], reference_attention(query, k, v, None, None, 0.1, 0.0))


def jobs() -> list[Any]:
    found: list[Any] = [lambda c=c, e=e: check_dense(c, e) for c in BLOCKS for e in EARLY]
    return found + [lambda n=n, c=c: check_codes(n, c) for n in QUANTIZED for c in CODES[FORMATS[n].bits]]


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
    named = [("16 bits", *c, *e) for c in BLOCKS for e in EARLY]
    named += [(name, *setting) for name in QUANTIZED for setting in CODES[FORMATS[name].bits]]
    for job, about in zip(jobs(), named, strict=True):
        rows.append({"check": about, "error": job()})
        print(about, f"{rows[-1]['error']:.2e}", flush=True)
    copy = benchmark.copy_bandwidth() / 1e6
    print(f"copy {copy:.2f} TB/s", flush=True)
    for shape, (B, N) in TIMED.items():
        query, key, value = tensors(B, N)
        size = 4 * key.numel()
        caches = [(key, value)]
        caches += [(key.clone(), value.clone()) for _ in range(max(1, -(-200_000_000 // size)) - 1)]
        sdpa = lambda k, v: F.scaled_dot_product_attention(query, k, v, scale=0.1, enable_gqa=True)  # noqa: E731
        measure(rows, [lambda k=k, v=v: sdpa(k, v) for k, v in caches], size, shape=shape, format="sdpa")
        for chosen in BLOCKS:
            for early in EARLY:
                with dense_case(chosen, early):
                    call = lambda k, v: dense_op.decode_attention(query, k, v, None, None, None, 0.1, 0.0)  # noqa: E731
                    calls = [lambda k=k, v=v: call(k, v) for k, v in caches]
                    measure(rows, calls, size, shape=shape, format="16 bits", block=chosen, early=early)
        del caches
        for name in QUANTIZED:
            fmt = FORMATS[name]
            store, state = filled(fmt, key, value)
            size = sum(t.numel() * t.element_size() for t in store)
            copies = max(1, -(-200_000_000 // size))
            stores = [store] + [Store(*(t.clone() for t in store)) for _ in range(copies - 1)]
            fields = [int(x) for x in fmt]
            calls = [lambda s=s: op.kv_attend(query, state, 0, N, None, None, 0.1, 0.0, fields, *s) for s in stores]
            tried = [(setting, None) for setting in CODES[fmt.bits]]
            if B > 1:
                tried += [(CODES[fmt.bits][at], split) for at in (0, -2) for split in PIECES]
            for setting, split in tried:
                with code_case(fmt, setting, split):
                    measure(rows, calls, size, shape=shape, format=name, setting=setting, pieces=split)
            del store, stores, calls
            torch.cuda.empty_cache()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": (H, G, D), "copy_tb_s": copy}
    path = Path(os.environ.get("OUT", "."), "attention-settings.json")
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

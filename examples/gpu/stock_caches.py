"""Time stock ``generate`` with transformers' quantized caches on a GPU, beside ours at the same length.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/stock_caches.py [WORD ...]

Caches of libraries that are neither installed nor in a folder of ``PYTHONPATH`` have the reason in place of figures.
quanto compiles an extension at its first use; where there is no nvcc, operations of torch unpack its codes, and the row says so.
``caches.json`` in ``$OUT`` (or here) is written after every cache. Words choose caches whose names have one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

OUT = Path(os.environ.get("OUT", "."))


def without_extension() -> None:
    """Let quanto unpack codes by operations of torch on a GPU: its extension needs nvcc to be compiled."""
    from types import SimpleNamespace

    import torch
    from optimum.quanto.library.extensions.cuda import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> bits * place) & (2**bits - 1) for place in range(8 // bits)])

    ext._lib = SimpleNamespace(unpack=unpack)


def caches(words: list[str], rows: int = 1, length: int = 8000, layers: int = 8) -> dict[str, Any]:
    """Return milliseconds a token of stock ``generate`` with transformers' caches, and of ours, at the same length."""
    import torch
    import transformers
    from kv_cache import model_of_8b_width

    import hf_optim
    from hf_optim.toolkit.compat import CACHE
    from hf_optim.toolkit.quantization import KeyValueScheme, set_scheme

    model = model_of_8b_width(layers)
    ids = torch.randint(5, 31_000, (rows, length), device="cuda")

    def stock(**arguments: Any) -> Any:
        return lambda count: model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **arguments)

    def quantized(backend: str, **options: Any) -> Any:
        def run(count: int) -> Any:
            cache = transformers.QuantizedCache(backend, model.config, residual_length=128, **options)
            return model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **{CACHE: cache})

        return run

    def ours(bits: int | None) -> Any:
        def run(count: int) -> Any:
            set_scheme(model.config, None if bits is None else KeyValueScheme(bits))
            try:
                return hf_optim.generate(model, input_ids=ids, max_new_tokens=count, mode="captured")
            finally:
                set_scheme(model.config, None)

        return run

    def quanto(count: int) -> Any:
        if not shutil.which("nvcc"):
            without_extension()
        return quantized("quanto", nbits=4)(count)

    built = "compiled" if shutil.which("nvcc") else "not compiled"
    ways = {
        "hf_optim, 16 bits": ours(None),
        "hf_optim, 8 bits": ours(8),
        "hf_optim, 4 bits": ours(4),
        "stock, dynamic cache": stock(),
        "stock, hqq 4 bits": quantized("hqq", nbits=4, axis_key=1, axis_value=1),
        f"stock, quanto 4 bits, {built}": quanto,  # the last: it may compile first
    }
    found: dict[str, Any] = {"rows": rows, "length": length, "layers": layers, "device": torch.cuda.get_device_name()}
    for name, run in ways.items():
        if words and not any(word in name for word in words):
            continue
        try:
            times = {}
            run(2)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for count in (4, 36):
                torch.cuda.synchronize()
                start = time.perf_counter()
                run(count)
                torch.cuda.synchronize()
                times[count] = time.perf_counter() - start
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            found[name] = {"ms_token": (times[36] - times[4]) / 32 * 1e3, "peak_gib": peak}
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {str(problem)[:200]}"}
        print(f"{name:24s} {found[name]}", flush=True)
        (OUT / "caches.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    caches(sys.argv[1:])

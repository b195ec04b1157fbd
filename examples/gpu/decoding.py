"""Check, then time, everything that decoding a model needs on a GPU, beside what others offer.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/decoding.py [PART ...] [--limit SECONDS]

Parts, each in its own process, which ends at its share of the limit:

- ``generate``: captured and compiled steps beside stock transformers (``generate.py``);
- ``kv_cache``: the quantized key/value cache, its attention and memory (``kv_cache.py``);
- ``caches``: transformers' own quantized caches in stock ``generate``, for the libraries that are installed;
- ``layers``: products on layers that no table knows, beside the dense product (``hf_optim_kernels.common.held_out``);
- ``peers``: products beside gemlite, bitsandbytes and torchao, those that are installed (``hf-optim bench --peers``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("OUT", "."))
ROWS = ("1", "16", "64", "256", "4096")
SHARES = {"generate": 0.35, "kv_cache": 0.25, "caches": 0.1, "layers": 0.15, "peers": 0.15}


def command(part: str, seconds: float) -> list[str]:
    """Return the command of a part that takes about so many seconds."""
    python = sys.executable
    return {
        "generate": [python, f"{HERE}/generate.py", "--output", f"{OUT}/generate.json", "--limit", f"{seconds:.0f}"],
        "kv_cache": [python, f"{HERE}/kv_cache.py"],
        "caches": [python, __file__, "--caches"],
        "layers": [python, "-m", "hf_optim_kernels.common.held_out", "--budget", f"{0.8 * seconds:.0f}"],
        "peers": [python, "-m", "hf_optim.cli", "bench", "--op", "wna16", "w8a8", "sparse24", "llm_int8", "--peers",
                  "--shape", "14336x4096", "--rows", *ROWS, "--time-limit", f"{seconds:.0f}", "--output", f"{OUT}/peers"],
    }[part]  # fmt: skip


def caches(rows: int = 1, length: int = 8000, layers: int = 8) -> dict[str, Any]:
    """Return milliseconds a token of stock ``generate`` with transformers' caches, and of ours, at the same length."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_optim
    from hf_optim.toolkit.compat import CACHE
    from hf_optim.toolkit.quantization import KeyValueScheme, set_scheme

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=65536,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
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

    ways = {
        "hf_optim, 16 bits": ours(None),
        "hf_optim, 8 bits": ours(8),
        "hf_optim, 4 bits": ours(4),
        "stock, dynamic cache": stock(),
        "stock, hqq 4 bits": quantized("hqq", nbits=4, axis_key=1, axis_value=1),
        "stock, quanto 4 bits": quantized("quanto", nbits=4),  # the last: compiles its extension first
    }
    found: dict[str, Any] = {"rows": rows, "length": length, "layers": layers, "device": torch.cuda.get_device_name()}
    for name, run in ways.items():
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


def main() -> int:
    """Run the parts one after the other; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Check and time what decoding needs on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SHARES)} (all)")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for everything (1200)")
    parser.add_argument("--caches", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.caches:
        caches()
        return 0
    if unknown := set(args.parts) - set(SHARES):
        parser.error(f"no part {', '.join(sorted(unknown))}; parts are {', '.join(SHARES)}")
    parts = args.parts or list(SHARES)
    whole = sum(SHARES[part] for part in parts)
    failed = []
    for part in parts:
        seconds = args.limit * SHARES[part] / whole
        print(f"== {part}", flush=True)
        try:
            if subprocess.run(command(part, seconds), timeout=1.2 * seconds).returncode:
                failed.append(part)
        except subprocess.TimeoutExpired:
            failed.append(part)
    print(f"failed or not finished: {', '.join(failed)}" if failed else "all parts finished", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

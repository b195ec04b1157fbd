"""What a decoding step under an attention pattern takes: time, and bytes of the cache, by the length of the context.

    python examples/attention/decoding.py --output model_cards/attention/decoding [--device cuda]

A Llama with random weights takes single steps after contexts of 1k to 32k tokens (128k on a GPU), under several
patterns and with transformers' own attention and cache. The caches are filled with random keys, on which the time of a
step does not depend. Before anything is timed, rows that are decoded token by token are compared with the forward of
the whole row. On a CPU, the time is that of the process on one thread, so that other work disturbs it little. Writes
``decoding.json``, a page and a plot, into ``$OUT`` unless a folder is given.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import decoding_page
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.toolkit.attention import (
    Attachment,
    Band,
    Chunks,
    Columns,
    GlobalTokens,
    HeadPatterns,
    Pattern,
    PatternLayer,
    PatternModel,
)
from hf_optim.toolkit.compat import CACHE

TERMS = {
    "window of 1,024": (Band(1023),),
    "window of 1,024 and 4 first tokens": (Band(1023), GlobalTokens(first=4, see=False)),
    "blocks of 128 and 8 columns of each (fixed)": (Chunks(128), Columns(128, 8)),
    "window of 128 and every 128th (strided)": (Band(127), Band(None, 0, 128)),
    "all tokens, as a pattern": (Band(None),),
}
STOCK = "all tokens, transformers"
SHAPES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
LENGTHS = {"cpu": [2**k for k in range(10, 16)], "cuda": [2**k for k in range(10, 18)]}
WARM, STEPS, ROUNDS = 2, 5, 4


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern that the settings name."""
    return [Pattern(TERMS[settings["name"]], causal)]


ATTACHMENT = Attachment("example_decoding", build)


class PatternLlama(PatternModel, LlamaForCausalLM):
    """Llama whose caches hold what its pattern sees."""


def models(device: str, layers: int) -> dict[str, Any]:
    """Return a model for each case; all share the weights of the first."""
    ATTACHMENT.register()
    torch.manual_seed(0)
    shape = {**SHAPES[device], "num_hidden_layers": layers, "vocab_size": 1024, "max_position_embeddings": 2**18}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: dict[str, Any] = {STOCK: LlamaForCausalLM(LlamaConfig(**shape)).to(device, dtype).eval()}
    for name in TERMS:
        config = LlamaConfig(**shape)
        with torch.device("meta"):
            model = PatternLlama(config)
        model.to_empty(device=device)
        model.load_state_dict(found[STOCK].state_dict(), assign=True)
        model.model.rotary_emb = copy.deepcopy(found[STOCK].model.rotary_emb)
        config.attention_pattern = {"name": name}
        model.set_attn_implementation(ATTACHMENT.name)
        found[name] = model.eval()
    return found


@torch.no_grad()
def largest_difference(model: Any, length: int = 1300, parts: int = 40) -> float:
    """Return the largest difference of logits: a row whose last tokens are decoded one by one, and the whole row."""
    ids = torch.randint(1, 1000, (1, length), device=model.device)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :-parts], use_cache=True)
    logits = [out.logits]
    for token in ids[0, -parts:]:
        out = model(token.view(1, 1), use_cache=True, **{CACHE: out[CACHE]})
        logits.append(out.logits)
    return float((torch.cat(logits, 1).float() - whole.float()).abs().max() / whole.float().abs().max())


def filled(model: Any, name: str, length: int) -> DynamicCache:
    """Return a cache with ``length`` tokens of random keys and values."""
    config = model.config
    cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        if name in TERMS:
            cache.layers[index] = PatternLayer()
        cache.update(keys, values, index)
        if name in TERMS:
            patterns = build({"name": name}, index, config.num_attention_heads, True)
            cache.layers[index].settle(HeadPatterns.of(patterns, config.num_attention_heads), None)
    return cache


def held(cache: DynamicCache) -> tuple[int, int]:
    """Return the tokens that the first layer holds, and the bytes of all layers."""
    size = sum(
        layer.nbytes() if isinstance(layer, PatternLayer) else 2 * layer.keys.numel() * layer.keys.element_size()
        for layer in cache.layers
    )
    return cache.layers[0].keys.shape[2], size


@torch.no_grad()
def step_times(model: Any, cache: DynamicCache, steps: int) -> list[float]:
    """Return the milliseconds of single steps: of this process on a CPU, of the clock on a GPU."""
    token, found = torch.ones(1, 1, dtype=torch.long, device=model.device), []
    on_gpu = model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    wait = torch.cuda.synchronize if on_gpu else int
    for _ in range(steps):
        wait()
        start = clock()
        model(token, use_cache=True, **{CACHE: cache})
        wait()
        found.append(1e3 * (clock() - start))
    return found


def measured(cases: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Return the rows of one length: the cases take turns, so that other work on the machine meets all of them."""
    caches = {name: filled(model, name, length) for name, model in cases.items()}
    rows = {}
    for name, model in cases.items():
        tokens, size = held(caches[name])
        rows[name] = {"case": name, "length": length, "tokens_held": tokens, "bytes": size}
        if name in TERMS:
            width = torch.finfo(model.dtype).bits // 8
            rows[name]["bytes_told"] = hf_optim.cache_size(model.config, 1, length, dtype_bytes=width).total
        step_times(model, caches[name], WARM)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, model in cases.items():
            times[name] += step_times(model, caches[name], STEPS)
    for name, row in rows.items():
        row |= {"ms": statistics.median(times[name]), "ms_least": min(times[name])}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of context")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    results: dict[str, Any] = {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "shape": {**SHAPES[args.device], "layers": args.layers},
        "dtype": "float32" if args.device == "cpu" else "bfloat16", "load_before": os.getloadavg()[0],
        "timed": ROUNDS * STEPS, "rows": [],
    }  # fmt: skip
    cases = models(args.device, args.layers)
    results["differences"] = {name: largest_difference(cases[name]) for name in TERMS}
    worst = max(results["differences"].values())
    if worst > (1e-4 if args.device == "cpu" else 5e-2):
        raise SystemExit(f"decoding differs from the forward of the whole row by {worst:.1e}")
    print(f"decoded token by token, logits differ by at most {worst:.1e} of the largest")
    for length in args.lengths or LENGTHS[args.device]:
        for row in measured(cases, length):
            results["rows"].append(row)
            print(f"{length:7,}  {row['case']:44s} {row['ms']:8.2f} ms {row['bytes'] / 2**20:9.2f} MiB", flush=True)
    results["load_after"] = os.getloadavg()[0]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "decoding.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    decoding_page.write(args.output)


if __name__ == "__main__":
    main()

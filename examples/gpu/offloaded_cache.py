"""Keys and values in host memory on a GPU, as they are and in 4 bits, beside transformers' offloaded cache.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/offloaded_cache.py [WORD ...]

``check`` compares what attention is given, at every layer and step, with the same cache on the device; ``times`` has a step of 8 blocks of an
8B shape (random weights, bfloat16) over a long context. ``TINY=1`` runs the caches on the device alone, on a CPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from sections import Sections
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_optim
from hf_optim.generation.attention import on_kernel
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.offloading.links import CudaLink, measure_link

TINY = bool(os.environ.get("TINY"))
DEVICE = "cpu" if TINY else "cuda"
CONTEXT = 200 if TINY else int(os.environ.get("CONTEXT", "32768"))
INT4 = hf_optim.KeyValueScheme(4, "channel", 128, 128)
section = Sections("offloaded-cache-h200.json")
torch.set_grad_enabled(False)


def model_of(layers: int, width: int, units: int, heads: int, key_heads: int, positions: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=units, num_attention_heads=heads, num_key_value_heads=key_heads,
        num_hidden_layers=layers, vocab_size=4096, max_position_embeddings=positions, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def small(layers: int) -> Any:
    return model_of(layers, 128 if TINY else 1024, 256 if TINY else 2816, 16, 4, 4096)


def beside(layer: Any, twin: Any, wrong: list[str]) -> None:
    """Have a layer give its tokens to a twin on the device as well, and compare what both give back."""
    update = layer.update

    def both(key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found, expected = update(key, value, *args, **kwargs), twin.update(key, value, *args, **kwargs)
        wrong.extend(
            f"layer {layer.index}, {layer.get_seq_length()} tokens"
            for a, b in zip(found, expected, strict=True)
            if not torch.equal(a, b)
        )
        return found

    layer.update = both


@section("check")
def check() -> dict[str, Any]:
    """Keys and values of caches in host memory beside those on the device. Raises if a bit differs."""
    found: dict[str, Any] = {}
    for layers in (1, 2, 4, 5):
        model = small(layers)
        ids = torch.randint(1, 4000, (2, 700), device=DEVICE)
        given = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0}
        for name, scheme in (("bfloat16", None), ("int4", INT4)):
            twins = hf_optim.key_value_cache(model, scheme) if scheme else DynamicCache(config=model.config)
            if TINY:
                continue
            cache, wrong = hf_optim.offloaded_cache(model, scheme=scheme), []
            for layer, twin in zip(cache.layers, twins.layers, strict=True):
                beside(layer, twin, wrong)
            model.generate(input_ids=ids, **given, **{CACHE: cache})
            found[f"{layers} layers, {name}"] = len(wrong)
            assert not wrong, f"{layers} layers, {name}: {len(wrong)} differ, first {wrong[0]}"
    print(found, flush=True)
    return found


def steps(model: Any, cache: Any, count: int) -> tuple[list[int], float, int]:
    """Read a prompt; return greedy tokens, the median seconds of a step, and the most bytes of the device meanwhile."""
    ids = (torch.arange(CONTEXT, device=DEVICE)[None] * 37) % 3989
    for part in ids[:, :-1].split(4096, 1):
        model(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    token, times, found = ids[:, -1:], [], []
    if not TINY:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(count):
        started = time.perf_counter()
        token = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        found.append(int(token))
        times.append(time.perf_counter() - started)
    return found, sorted(times[2:])[len(times[2:]) // 2], 0 if TINY else torch.cuda.max_memory_allocated()


@section("times")
def times() -> dict[str, Any]:
    """Milliseconds of a step with each cache, beside the bytes over the measured link."""
    model = small(2) if TINY else model_of(8, 4096, 14336, 32, 8, 65536)
    rate = 1.0 if TINY else measure_link(CudaLink(torch.device("cuda", 0)))[0]
    made: dict[str, Callable[[], Any]] = {
        "on the device": lambda: DynamicCache(config=model.config),
        "int4 on the device": lambda: hf_optim.key_value_cache(model, INT4),
    }
    if not TINY:
        made |= {
            "in host memory": lambda: hf_optim.offloaded_cache(model),
            "int4 in host memory": lambda: hf_optim.offloaded_cache(model, scheme=INT4),
            "transformers, offloaded": lambda: DynamicCache(config=model.config, offloading=True),
        }
    result: dict[str, Any] = {"context": CONTEXT, "link_gb_s": rate / 1e9}
    for name, make in made.items():
        cache = make()
        try:
            with on_kernel(model):
                tokens, seconds, peak = steps(model, cache, 10)
        except Exception as error:
            result[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(name, result[name], flush=True)
            continue
        row = {"ms": 1000 * seconds, "tokens": tokens, "peak_device_bytes": peak}
        if "host" in name:
            size = sum(layer.held_bytes for layer in cache.layers)
            row |= {"bytes": size, "bound_ms": 1000 * size / rate, "over_bound": seconds * rate / size}
        result[name] = row
        print(name, row, flush=True)
        del cache
        if not TINY:
            torch.cuda.empty_cache()
    return result

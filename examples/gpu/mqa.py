"""Decoding after a long context with 32, 8 and 1 key/value heads, on the decoding kernels: prepared for a GPU.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/mqa.py [WORD ...]

A stack of a few layers of Llama-3-8B's width (32 query heads of 128, random weights, bfloat16) is converted by ``mqa``.
First correctness: a converted stack against its original with the shared heads repeated, in float32, and
``hf_optim.generate`` against transformers' loop. Then the time of a token after 32,768 others, in
``hf_optim.generate`` and in transformers' loop, its attention alone, and the memory of the cache. With words, only the
sections that have one of them in their names run. ``TINY=1`` runs all of it in small.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from functools import partial
from typing import Any

import torch
from sections import Sections
from transformers import LlamaConfig, LlamaForCausalLM

import hf_optim

TINY = bool(os.environ.get("TINY"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KV_HEADS = (32, 8, 1)
LAYERS, CONTEXT, NEW, CALLS = (2, 48, 4, 2) if TINY else (4, 32768, 64, 5)
WIDTH = 256 if TINY else 4096


def stack(dtype: torch.dtype) -> Any:
    """Return a multi-head stack with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=WIDTH * 7 // 2, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=32, head_dim=WIDTH // 32,
        max_position_embeddings=CONTEXT + NEW + 8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(dtype).eval()


def converted(base: Any, kv_heads: int) -> Any:
    """Return a copy of the stack with shared heads."""
    return hf_optim.optimize(copy.deepcopy(base), [{"technique": "mqa", "kv_heads": kv_heads}])


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 1024, (1, length), generator=generator).to(DEVICE)


def call(model: Any, ids: torch.Tensor, new: int, ours: bool) -> tuple[float, torch.Tensor]:
    """Return the seconds of a call for ``new`` tokens, and the tokens."""
    inputs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    mode = "captured" if DEVICE == "cuda" else "eager"
    found = hf_optim.generate(model, ids, mode=mode, **inputs) if ours else model.generate(ids, **inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


section = Sections("mqa.json")


@section("correctness")
@torch.no_grad()
def correctness() -> dict[str, Any]:
    """Outputs against the stack with repeated heads, and tokens against transformers' loop. Raises if they differ."""
    base, found = stack(torch.float32), {}
    ids = tokens(min(96, CONTEXT))
    for kv_heads in KV_HEADS[1:]:
        made, repeated = converted(base, kv_heads), copy.deepcopy(base)
        for layer, other in zip(repeated.model.layers, made.model.layers, strict=True):
            for name in ("k_proj", "v_proj"):
                weight = getattr(other.self_attn, name).weight.unflatten(0, (kv_heads, -1))
                whole = weight.repeat_interleave(32 // kv_heads, dim=0).flatten(0, 1)
                getattr(layer.self_attn, name).weight.copy_(whole)
        expected = repeated(ids).logits
        gap = float((made(ids).logits - expected).abs().max() / expected.abs().max())
        assert gap < 1e-4, f"{kv_heads} heads differ from repeated ones by {gap:.1e}"
        same = call(made, ids, 8, ours=True)[1].tolist() == call(made, ids, 8, ours=False)[1].tolist()
        assert same, f"hf_optim.generate with {kv_heads} key/value heads gives other tokens than transformers"
        found[str(kv_heads)] = {"relative_difference": gap, "same_tokens": same}
    return found


@section("decoding")
def decoding() -> list[dict[str, Any]]:
    """Milliseconds a token: a call for many tokens less one for a single token; and the bytes of the cache."""
    base, rows = stack(torch.bfloat16), []
    ids = tokens(CONTEXT)
    for kv_heads in KV_HEADS:
        model = converted(base, kv_heads)
        row: dict[str, Any] = {"kv_heads": kv_heads, "context": CONTEXT, "layers": LAYERS}
        row["cache_bytes"] = 2 * LAYERS * kv_heads * (WIDTH // 32) * 2 * (CONTEXT + NEW)
        for ours in (True, False):
            call(model, ids, NEW, ours)  # compiles and captures
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            short = statistics.median(call(model, ids, 1, ours)[0] for _ in range(CALLS))
            whole = statistics.median(call(model, ids, NEW, ours)[0] for _ in range(CALLS))
            name = "hf_optim" if ours else "transformers"
            row[f"{name}_ms_per_token"] = round((whole - short) / (NEW - 1) * 1e3, 3)
            if DEVICE == "cuda":
                row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        rows.append(row)
        print(row, flush=True)
        del model
    return rows


@section("attention")
def attention() -> list[dict[str, Any]]:
    """Microseconds of the attention of one token: our kernel, and PyTorch's with ``enable_gqa``. On a GPU only."""
    if DEVICE != "cuda":
        return []
    from hf_optim_kernels.common import benchmark
    from hf_optim_kernels.decode_attention import op

    attend = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for kv_heads in KV_HEADS:
        # Two caches in turn, so that none stays in L2.
        pairs = [
            [torch.randn(1, kv_heads, CONTEXT, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(2)
        ]
        query = torch.randn(1, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, 1, CONTEXT, dtype=torch.bool, device=DEVICE)
        ranges = op.mask_ranges(mask)
        arguments = (mask, ranges, None, 128**-0.5, 0.0)
        key, value = (part.double().repeat_interleave(32 // kv_heads, 1) for part in pairs[0])
        expected = attend(query.double(), key, value)[:, :, 0]
        found = op.decode_attention(query, *pairs[0], *arguments)[:, 0].double()
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-2, f"decode_attention with {kv_heads} key/value heads is wrong by {error:.1e}"
        ours = benchmark.graph_time([partial(op.decode_attention, query, *pair, *arguments) for pair in pairs * 2]).us
        theirs = benchmark.graph_time([partial(attend, query, *pair, enable_gqa=True) for pair in pairs * 2]).us
        size = sum(part.numel() * part.element_size() for part in pairs[0])
        row = {"kv_heads": kv_heads, "error": error, "decode_attention_us": round(ours, 1)}
        rows.append({**row, "sdpa_enable_gqa_us": round(theirs, 1), "tb_per_s": round(size / ours / 1e6, 2)})
        print(rows[-1], flush=True)
    return rows

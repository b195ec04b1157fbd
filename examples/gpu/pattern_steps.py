"""Steps under attention patterns captured as CUDA graphs: checked against transformers' loop, then timed on a GPU.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/pattern_steps.py [WORD ...]

First small models in float32, converted by each technique for decoders, generate from a padded batch: tokens of
``hf_optim.generate`` against those of transformers' loop, and the largest difference of their logits. Then a Llama of
four layers, 4096 wide with 8 key/value heads of 32 (random weights, bfloat16), takes steps after contexts of 4k and 32k
tokens, captured and in transformers' loop; and the bytes that its caches hold. With words, only the sections that have
one of them in their names run. ``TINY=1`` runs all of it in small.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
import warnings
from typing import Any

import torch
from sections import Sections
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_optim

TINY = bool(os.environ.get("TINY"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODE = "captured" if DEVICE == "cuda" else "eager"
CONTEXTS, NEW, CALLS = ((96, 160), 4, 2) if TINY else ((4096, 32768), 64, 5)
WIDTH = 256 if TINY else 4096
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "blockwise": {"block": 32, "shifts": [0, 1, 0, 0]},
        "strided": {"stride": 16, "window": 16},
        "dilated": {"window": 16, "dilation": [1, 2, 3, 4]},
        "etc": {"radius": 24, "global_first": 3},
        "longformer": {"window": 48, "global_first": 2, "global_positions": [7, 310]},
        "sparse_transformer": {"pattern": "fixed", "stride": 32, "vertices": 2, "steps": "heads"},
        "axial": {"columns": 24},
    },
    "gpt2": {
        "local": {"window": 40, "full_layers": [1]},
        "sparse_transformer": {"pattern": "strided", "stride": 24, "steps": "merged"},
    },
}
CASES: dict[str, Any] = {
    "full attention": None,
    "longformer: 1,024 and 4 first": {"technique": "longformer", "window": 2046, "global_first": 4},
    "blockwise of 1,024": {"technique": "blockwise", "block": 1024},
    "fixed: 128 and 8 columns": {
        "technique": "sparse_transformer", "pattern": "fixed", "stride": 128, "vertices": 8, "steps": "merged",
    },
    "strided: 128 and every 128th": {"technique": "strided", "stride": 128, "window": 128},
}  # fmt: skip

section = Sections("pattern_steps.json")


def small(family: str) -> Any:
    """Return a small model with random weights."""
    torch.manual_seed(0)
    if family == "gpt2":
        made: Any = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=1024, n_embd=128, n_layer=3, n_head=4))
    else:
        config = LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024,
        )  # fmt: skip
        made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made.to(DEVICE).eval()


@section("correctness")
@torch.no_grad()
def correctness() -> dict[str, Any]:
    """Tokens and logits of captured steps beside those of transformers' loop. Raises if they differ."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 500, (3, 230 if TINY else 300), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :37], mask[2, :120] = 0, 0
    given: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 20 if TINY else 160, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for family, steps in FAMILIES.items():
        for name, fields in steps.items():
            model = hf_optim.optimize(small(family), [{"technique": name, **fields}])
            with warnings.catch_warnings():
                warnings.simplefilter("error", hf_optim.GenerationWarning)
                ours = hf_optim.generate(model, ids, mode=MODE, **given)
            stock: Any = model.generate(ids, **given)  # type: ignore[operator]
            gap = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours.logits, stock.logits, strict=True)
            )
            same = float((ours.sequences == stock.sequences).float().mean())
            found[f"{name} in {family}"] = {"relative_difference": gap, "same_tokens": same}
            print(f"{name:20s} {family:6s} logits {gap:.1e}  same tokens {same:.3f}", flush=True)
            assert same == 1, f"captured steps under {name} choose other tokens"
            assert gap < 1e-3, f"logits of captured steps under {name} differ"
    return found


def call(model: Any, ids: torch.Tensor, new: int, ours: bool) -> tuple[float, Any]:
    """Return the seconds of a call for ``new`` tokens, and what it returned."""
    inputs: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "min_new_tokens": new,
        "return_dict_in_generate": True,
    }  # fmt: skip
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    found = hf_optim.generate(model, ids, mode=MODE, **inputs) if ours else model.generate(ids, **inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


def allocated() -> int:
    """Return the bytes of tensors on the GPU."""
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


@section("steps")
@torch.no_grad()
def steps() -> list[dict[str, Any]]:
    """Milliseconds a token: a call for many tokens less one for a single token; and the bytes of the caches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=WIDTH * 7 // 2, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2 * CONTEXTS[-1],
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        base: Any = LlamaForCausalLM(config)
    base = base.to(torch.bfloat16).eval()
    rows = []
    for name, step in CASES.items():
        model = copy.deepcopy(base)
        if step is not None:
            model = hf_optim.optimize(model, [step])
        for context in CONTEXTS:
            ids = torch.randint(1, 1024, (1, context), generator=torch.Generator().manual_seed(1)).to(DEVICE)
            row: dict[str, Any] = {"case": name, "context": context}
            for ours, of in ((True, "captured"), (False, "stock")):
                new, calls = (NEW, CALLS) if ours else (max(2, NEW // 4), 3)
                before = allocated()
                call(model, ids, new, ours)  # compiles and captures
                if ours:  # buffers of the session; the graph's pool of intermediate results among them
                    row["session_mib"] = round((allocated() - before) / 2**20, 1)
                short = statistics.median(call(model, ids, 1, ours)[0] for _ in range(calls))
                whole = statistics.median(call(model, ids, new, ours)[0] for _ in range(calls))
                row[f"{of}_ms"] = round((whole - short) / (new - 1) * 1e3, 3)
            row["cache_mib"] = round(hf_optim.cache_size(model.config, 1, context, dtype_bytes=2).total / 2**20, 1)
            rows.append(row)
            print(row, flush=True)
        del model
    return rows

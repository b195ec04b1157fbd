"""Time ``generate`` of a mixture of Qwen3-30B-A3B's shape in a process of its own, for ``experts.py generate``.

    python experts_generate.py WAY FOLDER

It writes ``WAY.ready`` to the folder when it has compiled, waits for ``WAY.go`` and writes ``WAY.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from profiled_launches import kernels_a_token

WAYS = ("stock", "stock, eager", "accelerated", "door, captured", "door", "door, choices in one launch")


def generate(way, folder):
    """Time ``generate`` of a 30B-A3B-shaped model of 12 layers; waits for its turn after it has compiled."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import hf_optim

    config = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=12, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
        norm_topk_prob=True, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if not way.startswith("stock"):
        hf_optim.accelerate(model)
    from hf_optim.generation import choices

    choices.ENABLED = "in one launch" in way
    ids = torch.arange(100, 228, device="cuda").view(1, -1)

    def run(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            if way.startswith("door"):
                mode = "captured" if "captured" in way else "auto"
                hf_optim.generate(model, input_ids=ids, max_new_tokens=count, do_sample=False, mode=mode)
            else:
                static = {"cache_implementation": "static", "disable_compile": "eager" in way}
                model.generate(ids, max_new_tokens=count, do_sample=False, **static)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    compiling = run(96), run(96)
    (folder / f"{way}.ready").touch()
    while not (folder / f"{way}.go").exists():
        time.sleep(0.05)
    short, long = (min(run(count) for _ in range(3)) for count in (32, 96))
    row = {"ms_token": (long - short) / 64 * 1e3, "seconds_96": long, "first_calls_s": compiling}
    row["kernels_us_token"] = kernels_a_token(run)
    (folder / f"{way}.json").write_text(json.dumps(row))


if __name__ == "__main__":
    generate(sys.argv[1], Path(sys.argv[2]))

"""H100: does the time of a structurally pruned 8B-shaped stack fall as its operations do? bf16, prefill and decode.

PYTHONPATH=.:plugins:kernels python examples/gpu/structured.py     -> table on stdout, $OUT/structured.json
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import traceback
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim import run_of

OUT = Path(os.environ.get("OUT", "."))
BLOCKS, TOKENS = 4, 4096
RESULT: dict[str, object] = {"device": torch.cuda.get_device_name(), "blocks": BLOCKS, "tokens": TOKENS, "cases": []}
CASES = (
    {"neurons": 0.25},
    {"neurons": 0.5},
    {"neurons": 0, "heads": 0.5},
    {"neurons": 0.5, "heads": 0.5},
    {"neurons": 0, "layers": 0.5},
    {"neurons": 0.25, "heads": 0.5, "layers": 0.25},
)


def build() -> LlamaForCausalLM:
    """Blocks of Llama-3-8B's shape; a vocabulary of 128, so that the blocks are what is timed."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=4096, intermediate_size=14336, num_hidden_layers=BLOCKS, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def operations(model: LlamaForCausalLM, tokens: int, context: int) -> float:
    """Multiply-adds of one forward of ``tokens`` tokens that see ``context`` tokens each (causal mean)."""
    c = model.config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = 2 * heads * c.hidden_size + 2 * kv * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    return tokens * (c.num_hidden_layers * (linear + 2 * context * heads) + c.vocab_size * c.hidden_size)


def weight_bytes(model: LlamaForCausalLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.model.layers.parameters())


@torch.inference_mode()
def seconds(call, repeats: int = 30) -> float:
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def prefill(model: LlamaForCausalLM) -> float:
    ids = torch.randint(3, 120, (1, TOKENS), device="cuda")
    return seconds(lambda: model(input_ids=ids, use_cache=False))


@torch.inference_mode()
def decode(model: LlamaForCausalLM) -> float:
    """One token of the block stack in a CUDA graph, without a cache: the weights' bytes, not the host, are timed."""
    ids = torch.randint(3, 120, (1, 1), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input_ids=ids, use_cache=False)
    return seconds(graph.replay, 100)


def correctness() -> None:
    """On the GPU: zeroed neurons and heads go, and the outputs stay."""
    from hf_optim.toolkit.topology import find_prunable_groups, trace

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
                    num_key_value_heads=4)
    ).double().cuda().eval()  # fmt: skip
    with torch.no_grad():
        for one in find_prunable_groups(trace(model)):
            for name, (dim, entries) in one.entries.items():
                model.get_parameter(name).index_fill_(dim, entries[len(one) // 2 :].flatten().cuda(), 0.0)
    ids = torch.randint(3, 60, (2, 32), device="cuda")
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for score in ("magnitude", "activation", "taylor"):
            small = copy.deepcopy(model)
            small = hf_optim.optimize(
                small, {"technique": "structured", "neurons": 0.5, "heads": 0.5, "score": score},
                calibration=[{"input_ids": ids.cpu()}],
            )  # fmt: skip
            gap = float((small(input_ids=ids).logits - before).abs().max())
            RESULT[f"gap_{score}"] = gap
            print(f"correctness {score}: largest difference {gap:.2e} (float64)", "ok" if gap < 1e-12 else "WRONG")


def timing() -> None:
    dense = build()
    base = {"prefill": prefill(dense), "decode": decode(dense)}
    work, size = operations(dense, TOKENS, TOKENS / 2), weight_bytes(dense)
    print(f"dense: prefill {1e3 * base['prefill']:.2f} ms, decode {1e6 * base['decode']:.1f} us, {size / 1e9:.2f} GB")
    print("| case | params | FLOP ratio | prefill speed-up | of it | bytes ratio | decode speed-up | of it |")
    print("|---|---|---|---|---|---|---|---|")
    del dense
    for case in CASES:
        try:
            again = build()
            before = {"prefill": prefill(again), "decode": decode(again)}
            model = hf_optim.optimize(again, {"technique": "structured", "score": "magnitude", **case})
            after = {"prefill": prefill(model), "decode": decode(model)}
            flops, share = work / operations(model, TOKENS, TOKENS / 2), size / weight_bytes(model)
            gain = {key: before[key] / after[key] for key in after}
            row = {
                "case": case, "parameters": model.num_parameters(), "flop_ratio": flops, "bytes_ratio": share,
                "before": before, "after": after, "gain": gain, "record": run_of(model).record.steps["0"],
            }  # fmt: skip
            RESULT["cases"].append(row)  # type: ignore[attr-defined]
            print(
                f"| {case} | {model.num_parameters() / 1e6:.0f} M | {flops:.3f} | {gain['prefill']:.3f} | "
                f"{gain['prefill'] / flops:.2f} | {share:.3f} | {gain['decode']:.3f} | {gain['decode'] / share:.2f} |"
            )
            del model, again
            torch.cuda.empty_cache()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    for section in (correctness, timing):
        try:
            section()
        except Exception:
            traceback.print_exc()
    (OUT / "structured.json").write_text(json.dumps(RESULT, indent=1, default=str))

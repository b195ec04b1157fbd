"""Compare the speed-up of structural pruning with the reduction in operations and bytes, in the shape of an 8B model.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/structured.py

Times prefill and decoding of bfloat16 blocks on a GPU. Prints a table and writes ``$OUT/structured.json``.
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
from hf_optim.toolkit.topology import find_prunable_groups, trace

OUT = Path(os.environ.get("OUT", "."))
BLOCKS, TOKENS = 4, 4096
DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
RESULT: dict[str, object] = {"device": DEVICE, "blocks": BLOCKS, "tokens": TOKENS, "cases": []}
CASES = (
    {"neurons": 0.25},
    {"neurons": 0.5},
    {"neurons": 0, "heads": 0.5},
    {"neurons": 0.5, "heads": 0.5},
    {"neurons": 0, "layers": 0.5},
    {"neurons": 0.25, "heads": 0.5, "layers": 0.25},
)


def build_model() -> LlamaForCausalLM:
    """Build blocks of Llama-3-8B's shape, with a vocabulary of 128 so that the blocks dominate the time."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=4096, intermediate_size=14336, num_hidden_layers=BLOCKS, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def count_operations(model: LlamaForCausalLM, tokens: int, context: float) -> float:
    """Count the multiply-adds of one forward of ``tokens`` tokens that attend to ``context`` tokens each, on average."""
    c = model.config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = 2 * heads * c.hidden_size + 2 * kv * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    return tokens * (c.num_hidden_layers * (linear + 2 * context * heads) + c.vocab_size * c.hidden_size)


def weight_bytes(model: LlamaForCausalLM) -> int:
    return sum(p.numel() * p.element_size() for p in model.model.layers.parameters())


@torch.inference_mode()
def median_seconds(call, repeats: int = 30) -> float:
    """Return the median seconds of a call on the device."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def prefill_seconds(model: LlamaForCausalLM) -> float:
    """Time one forward over ``TOKENS`` tokens."""
    ids = torch.randint(3, 120, (1, TOKENS), device="cuda")
    return median_seconds(lambda: model(input_ids=ids, use_cache=False))


@torch.inference_mode()
def decode_seconds(model: LlamaForCausalLM) -> float:
    """Time one token in a CUDA graph, without a cache, so that reading the weights dominates, not the host."""
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
    return median_seconds(graph.replay, 100)


def check_correctness() -> None:
    """Check that pruning removes zeroed neurons and heads without changing the outputs."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
                    num_key_value_heads=4)
    ).double().cuda().eval()  # fmt: skip
    with torch.no_grad():
        for groups in find_prunable_groups(trace(model)):
            for name, (dim, entries) in groups.entries.items():
                model.get_parameter(name).index_fill_(dim, entries[len(groups) // 2 :].flatten().cuda(), 0.0)
    ids = torch.randint(3, 60, (2, 32), device="cuda")
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for score in ("magnitude", "activation", "taylor"):
            pruned = hf_optim.optimize(
                copy.deepcopy(model), {"technique": "structured", "neurons": 0.5, "heads": 0.5, "score": score},
                calibration=[{"input_ids": ids.cpu()}],
            )  # fmt: skip
            difference = float((pruned(input_ids=ids).logits - before).abs().max())
            RESULT[f"gap_{score}"] = difference
            verdict = "ok" if difference < 1e-12 else "WRONG"
            print(f"correctness {score}: largest difference {difference:.2e} (float64)", verdict)


def compare_times() -> None:
    """Time each case directly after the dense model, and print speed-ups next to the reductions."""
    dense = build_model()
    base = {"prefill": prefill_seconds(dense), "decode": decode_seconds(dense)}
    work, size = count_operations(dense, TOKENS, TOKENS / 2), weight_bytes(dense)
    print(f"dense: prefill {1e3 * base['prefill']:.2f} ms, decode {1e6 * base['decode']:.1f} us, {size / 1e9:.2f} GB")
    print(
        "| case | params | FLOP ratio | prefill speed-up | of FLOP ratio | bytes ratio | decode speed-up | of bytes ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    del dense
    for case in CASES:
        try:
            model = build_model()
            before = {"prefill": prefill_seconds(model), "decode": decode_seconds(model)}
            model = hf_optim.optimize(model, {"technique": "structured", "score": "magnitude", **case})
            after = {"prefill": prefill_seconds(model), "decode": decode_seconds(model)}
            flop_ratio = work / count_operations(model, TOKENS, TOKENS / 2)
            bytes_ratio = size / weight_bytes(model)
            gain = {key: before[key] / after[key] for key in after}
            row = {
                "case": case, "parameters": model.num_parameters(), "flop_ratio": flop_ratio,
                "bytes_ratio": bytes_ratio, "before": before, "after": after, "gain": gain,
                "record": run_of(model).record.steps["0"],
            }  # fmt: skip
            RESULT["cases"].append(row)  # type: ignore[attr-defined]
            print(
                f"| {case} | {model.num_parameters() / 1e6:.0f} M | {flop_ratio:.3f} | {gain['prefill']:.3f} | "
                f"{gain['prefill'] / flop_ratio:.2f} | {bytes_ratio:.3f} | {gain['decode']:.3f} | "
                f"{gain['decode'] / bytes_ratio:.2f} |"
            )
            del model
            torch.cuda.empty_cache()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    for section in (check_correctness, compare_times):
        try:
            section()
        except Exception:
            traceback.print_exc()
    (OUT / "structured.json").write_text(json.dumps(RESULT, indent=1, default=str))

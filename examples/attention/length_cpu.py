"""Time and memory of attention against the length on a CPU: patterns over blocks beside PyTorch's dense attention.

    python examples/attention/length_cpu.py --output model_cards/attention

``layers``: the forward of a model of 4 layers with random weights, BERT-like (width 768, 12 heads, both sides) or
Llama-like (width 768, 12 heads of queries, 4 of keys and values, causal), one row. ``attention``: the attention alone,
12 heads of 64, with the gradients if ``--training``. Each figure is the processor time, which other programs on the
machine change little, the best of the repetitions after one call that makes the lists of blocks. Peak memory is that
of a process of its own, above what it held before the first forward of a model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import length_cpu_page
import torch
from processor_time import shortest_time
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import hf_optim
from hf_optim.toolkit.attention import HeadPatterns
from hf_optim.toolkit.attention.attend import attend
from hf_optim_plugins.attention import (
    _blockwise_pattern,
    _dilated_pattern,
    _sparse_transformer_pattern,
    _strided_pattern,
)

HEADS, SIZE = 12, 64


def steps(length: int) -> dict[str, dict[str, Any]]:
    """Return the patterns that are timed at a length; strides are near its root, as Child et al. advise."""
    stride = round(length**0.5)
    return {
        "window 256": {"technique": "dilated", "window": 256, "dilation": [1]},
        "blockwise 512": {"technique": "blockwise", "block": 512},
        "dilated 128 x 4": {"technique": "dilated", "window": 128, "dilation": [4]},
        "strided sqrt(n)": {"technique": "strided", "stride": stride, "window": stride},
        "fixed sqrt(n), c = 8": {"technique": "sparse_transformer", "stride": stride, "vertices": 8},
    }


def patterns(step: dict[str, Any], causal: bool) -> HeadPatterns:
    """Return the patterns of a step."""
    page = {
        "dilated": _dilated_pattern,
        "blockwise": _blockwise_pattern,
        "strided": _strided_pattern,
        "sparse_transformer": _sparse_transformer_pattern,
    }[step["technique"]]
    settings = {"by": "head", "pattern": "fixed", "steps": "merged", **step}
    return HeadPatterns.of(page.build(settings, 0, HEADS, causal), HEADS)


def attention(name: str, length: int, causal: bool, training: bool) -> Callable[[], Any]:
    """Return a call of the attention alone."""
    q, k, v = (torch.randn(1, length, HEADS, SIZE).transpose(1, 2).requires_grad_(training) for _ in range(3))
    heads = None if name == "sdpa" else patterns(steps(length)[name], causal)

    def call() -> None:
        with torch.set_grad_enabled(training):
            if heads is None:
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            else:
                out = attend(q, k, v, heads, SIZE**-0.5)
            if training:
                torch.autograd.grad(out, (q, k, v), out.detach())

    return call


def layers(name: str, length: int, causal: bool, training: bool) -> Callable[[], Any]:
    """Return a forward of a model of four layers."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    common |= {"max_position_embeddings": length}
    model: Any
    if causal:
        model = LlamaModel(LlamaConfig(**common, num_key_value_heads=4, intermediate_size=2048))
    else:
        model = BertModel(BertConfig(**common, intermediate_size=3072), add_pooling_layer=False)
    model.eval()
    if name != "sdpa":
        model = hf_optim.optimize(model, [steps(length)[name]])
    ids = torch.randint(3, 60, (1, length))
    extra = {"use_cache": False} if causal else {}

    def call() -> None:
        with torch.no_grad():
            model(ids, **extra)

    return call


def peak(script: str, *words: str) -> float:
    """Return the peak memory of one call in a process of its own, in MiB above what it held before: the least of 3."""
    command = [sys.executable, script, "--peak", *words]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(3)
    )


def resident(field: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--longest-dense", type=int, default=16384)
    parser.add_argument("--longest-model", type=int, default=8192)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, length, causal = args.peak
        torch.set_num_threads(1)
        call = layers(name, int(length), causal == "True", False)
        before = resident("VmRSS")
        call()
        print(resident("VmHWM") - before)
        return
    results: dict[str, Any] = {"lengths": args.lengths, "rows": []}
    kinds: dict[str, tuple[Callable[..., Any], bool]] = {"attention": (attention, False), "layers": (layers, False)}
    if args.training:
        kinds["training"] = (attention, True)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for kind, (make, training) in kinds.items():
            for causal in (False, True):
                for length in args.lengths:
                    if kind != "attention" and length > args.longest_model:
                        continue
                    for name in ("sdpa", *steps(length)):
                        if name == "sdpa" and length > args.longest_dense:
                            continue
                        row = {"kind": kind, "threads": threads, "causal": causal, "length": length, "name": name}
                        row["ms"] = round(shortest_time(make(name, length, causal, training), args.seconds), 2)
                        if kind == "layers" and threads == 1 and length == args.longest_model and not causal:
                            row["peak_mib"] = round(peak(__file__, name, str(length), str(causal)), 1)
                        results["rows"].append(row)
                        print(json.dumps(row), flush=True)
    results["ms"] = {length_cpu_page.key(row): row["ms"] for row in results["rows"]}  # for claims
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "length_cpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    length_cpu_page.write(args.output)


if __name__ == "__main__":
    main()

"""Sparse projections and Terraformer beside dense twins: loss at equal steps, weights, and times on a CPU.

    python examples/sparsity/sparse_projections.py --shared ../shared --output model_cards/sparsity
    python examples/sparsity/sparse_projections.py --shared ../shared --output trial --steps 5 --width 64   # a trial

Models of 4 layers are trained from scratch on TinyStories, all on the same tokens in the same order. Times are those of
one thread, of models with random weights at another width, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.toolkit.compat import CACHE

SPARSE = {"technique": "sparse_qkv", "modules": 8}
TERRAFORMER = {"technique": "terraformer", "block": 16, "modules": 8, "chunk": 32, "buckets": [8]}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "sparse": SPARSE,
    "terraformer": TERRAFORMER,
    "sparse, large start": {**SPARSE, "small_start": False},
    "terraformer, large start": {**TERRAFORMER, "small_start": False},
}


def text_of(tokenizer: Any, path: Path) -> Tensor:
    """Return stories, each after a bos token, joined."""
    tokens: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]]
    return torch.tensor(tokens)


def llama(width: int, layers: int, heads: int, units: int, vocabulary: int, context: int, seed: int) -> Any:
    """Return a decoder of as many key heads as query heads, with random weights."""
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=units, vocab_size=vocabulary, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def converted(model: Any, step: dict[str, Any] | None, seed: int) -> Any:
    """Return the model of a recipe of one step."""
    return model if step is None else hf_optim.optimize(model, [{**step, "seed": seed}])


@torch.no_grad()
def loss_on(model: Any, rows: Tensor) -> float:
    """Return the mean loss of a token of ``[n, N]``."""
    model.eval()
    losses = [float(model(part, labels=part, use_cache=False).loss) for part in rows.split(8)]
    return sum(losses) / len(losses)


def trained(
    model: Any, text: Tensor, held: Tensor, steps: int, rows: int, context: int, rate: float, seed: int, every: int
) -> list[tuple[int, float]]:
    """Train a model, in place; return the held-out loss every so many steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    curve = []
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        model.train()
        begins = torch.randint(len(text) - context, (rows,), generator=generator)
        batch = torch.stack([text[begin : begin + context] for begin in begins.tolist()])
        warm = min(1.0, step / max(1, steps // 20))
        optimizer.param_groups[0]["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, loss_on(model, held)))
    return curve


def times_of(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of one thread of each call; they are timed in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            if round_number:
                found[name].append(time.thread_time() - begin)
    return {name: median(each) for name, each in found.items()}


def decoding(model: Any, tokens: int) -> Callable[[], None]:
    """Return a function that decodes so many tokens behind a prompt of 8; the prompt is read before."""
    ids = torch.randint(3, model.config.vocab_size, (1, 8))

    @torch.no_grad()
    def call() -> None:
        cache = model(ids, use_cache=True)[CACHE]
        for _ in range(tokens):
            model(ids[:, :1], use_cache=True, **{CACHE: cache})

    return call


def measure_times(width: int, layers: int, repeats: int) -> dict[str, Any]:
    """Return times of a training step, a prefill and decoding of a dense model and of a sparse one of 16 modules."""
    models = {}
    for name, step in (("dense", None), ("sparse", {**SPARSE, "modules": 16})):
        models[name] = converted(llama(width, layers, 16, 2 * width, 1024, 1024, 0), step, 0)
    ids = torch.randint(3, 1024, (1, 256))

    def step(model: Any) -> Callable[[], None]:
        def call() -> None:
            model.train()
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad()

        return call

    def prefill(model: Any) -> Callable[[], None]:
        @torch.no_grad()
        def call() -> None:
            model.eval()
            model(ids, use_cache=False)

        return call

    found: dict[str, Any] = {"width": width, "layers": layers, "modules": 16, "tokens": ids.shape[1]}
    for what, make in (("training", step), ("prefill", prefill)):
        found[what] = times_of({name: make(model) for name, model in models.items()}, repeats)
    for model in models.values():
        model.eval()
    found["decode"] = {
        name: value / 16 for name, value in times_of({n: decoding(m, 16) for n, m in models.items()}, repeats).items()
    }
    own = {name: sum(p.numel() for n, p in m.named_parameters() if ".self_attn." in n) for name, m in models.items()}
    found["weights_of_attention"] = own
    found["ratios"] = {what: found[what]["sparse"] / found[what]["dense"] for what in ("training", "prefill", "decode")}
    return found


def measure_loss(name: str, seed: int, shared: Path, steps: int, rate: float, threads: int) -> dict[str, Any]:
    """Return the held-out loss of a variant that is trained from scratch, and its weights."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    data = shared / "data" / "tinystories"
    text, held = (text_of(tokenizer, data / each) for each in ("train.jsonl", "eval.jsonl"))
    held = held[: len(held) // 128 * 128].view(-1, 128)[:128]
    model = converted(llama(128, 4, 8, 352, 512, 128, seed), VARIANTS[name], seed)
    row: dict[str, Any] = {"variant": name, "seed": seed, "weights": model.num_parameters()}
    row["weights_of_attention"] = sum(p.numel() for n, p in model.named_parameters() if ".self_attn." in n)
    row["curve"] = trained(model, text, held, steps, 8, 128, rate, seed, max(1, steps // 4))
    row["loss"] = row["curve"][-1][1]
    print(json.dumps(row), flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/tinystories and models/stories260k")
    parser.add_argument("--output", type=Path, default=Path("model_cards/sparsity"))
    parser.add_argument("--parts", nargs="+", choices=["loss", "times"], default=["loss", "times"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--width", type=int, default=1024, help="of the models that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "sparse_projections.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "loss" in args.parts:
        runs = [(name, seed) for name in args.variants for seed in args.seeds]
        more = args.shared, args.steps, args.rate, args.threads
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            rows = [each.result() for each in [pool.submit(measure_loss, *run, *more) for run in runs]]
        means = {n: sum(r["loss"] for r in rows if r["variant"] == n) / len(args.seeds) for n in args.variants}
        results |= {"steps": args.steps, "tokens_of_a_step": 1024, "rate": args.rate, "rows": rows, "loss": means}
        for what in ("weights", "weights_of_attention"):
            results[what] = {row["variant"]: row[what] for row in rows}
    if "times" in args.parts:
        results["times"] = measure_times(args.width, 4, args.repeats)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results.get("times")), path)


if __name__ == "__main__":
    main()

"""Attention spans that babyllama-1m finds under a penalty, and the bytes of its cache at the loss that it keeps.

    python examples/adaptive/spans.py --shared ../shared --output model_cards/adaptive
    python examples/adaptive/spans.py --shared ../shared --output spans --steps 20 --coefficients 0 1e-3   # a trial

The model is converted, and trained on stories for equally many steps with each coefficient of the penalty, the dense
control among them: perplexity on held-out stories before and after, with the learned ramps and with fixed windows, the
spans by layer and head, and the bytes of the keys and values that a row of 256 tokens leaves in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_optim

CONTEXT, BATCH, RATE = 256, 4, 1e-4
RAMP, SPAN_RATE = 16, 0.02
COEFFICIENTS = (0.0, 1e-5, 1e-4, 3e-4, 1e-3)


def windows(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return stories, each after a bos token, joined and cut into windows ``[n, 256]`` of tokens."""
    stories = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    tokens: list[int] = []
    for story in stories:
        tokens += [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]
        if len(tokens) >= count * CONTEXT:
            break
    whole = len(tokens) // CONTEXT
    return torch.tensor(tokens[: whole * CONTEXT]).view(whole, CONTEXT)[:count]


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Return the perplexity of tokens 2 to n of each window."""
    total = 0.0
    for part in tokens.split(8):
        logits = model(part, use_cache=False).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
    return round(math.exp(total / (tokens.numel() - len(tokens))), 4)


@torch.no_grad()
def cache_bytes(model: Any, tokens: Tensor) -> int:
    """Return the bytes of keys and values that a row of tokens leaves in the cache."""
    made = model(tokens[:1], use_cache=True)
    layers = (getattr(made, "cache", None) or made.past_key_values).layers
    return sum(
        layer.held_bytes()
        if hasattr(layer, "held_bytes")
        else sum(p.numel() * p.element_size() for p in (layer.keys, layer.values))
        for layer in layers
    )


def trained(model: Any, tokens: Tensor, steps: int, seed: int, spans: bool) -> Any:
    """Train a model on windows of tokens, in an order that depends on the seed alone."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, seed=seed,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        kind = hf_optim.OptimTrainer if spans else Trainer
        kind(model=model, args=args, train_dataset=data).train()
    return model.eval()


def study(shared: Path, steps: int, texts: int, coefficients: tuple[float, ...], seeds: tuple[int, ...]) -> Any:
    """Return what each coefficient of the penalty gives, and the dense control (``coefficient`` None)."""
    home = shared / "models" / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held = windows(tokenizer, shared / "data" / "tinystories" / "eval.jsonl", texts)
    train = windows(tokenizer, shared / "data" / "tinystories" / "train.jsonl", BATCH * steps)
    rows = []
    for seed in seeds:
        for coefficient in (None, *coefficients):
            model = AutoModelForCausalLM.from_pretrained(home).eval()
            row: dict[str, Any] = {"seed": seed, "coefficient": coefficient, "before": perplexity(model, held)}
            if coefficient is not None:
                step = {"technique": "adaptive_span", "ramp": RAMP, "coefficient": coefficient, "span_lr": SPAN_RATE}
                model = hf_optim.optimize(model, [step])
            model = trained(model, train, steps, seed, coefficient is not None)
            row |= {"after": perplexity(model, held), "cache_bytes": cache_bytes(model, held)}
            if coefficient is not None:
                figures = hf_optim.run_of(model).record.steps["0"]
                row |= {name: figures[name] for name in ("mean_span", "longest_spans", "share_of_attention")}
                row["spans"] = model.fix_spans()
                row["fixed"] = perplexity(model, held)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {
        "held_out_tokens": held.numel(), "steps": steps, "batch": BATCH, "context": CONTEXT, "ramp": RAMP,
        "span_rate": SPAN_RATE, "rows": rows,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared", required=True, type=Path, help="folder with models/babyllama-1m and data/tinystories"
    )
    parser.add_argument("--output", type=Path, default=Path("model_cards/adaptive"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--texts", type=int, default=48, help="held-out windows of 256 tokens")
    parser.add_argument("--coefficients", type=float, nargs="+", default=COEFFICIENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    found = study(args.shared, args.steps, args.texts, tuple(args.coefficients), tuple(args.seeds))
    path = args.output / "spans.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

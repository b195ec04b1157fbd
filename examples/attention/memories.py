"""Long text at fixed memory: babyllama-1m with a memory of earlier segments, beside the dense model cut to segments.

    python examples/attention/memories.py --shared ../shared --output model_cards/attention
    python examples/attention/memories.py --shared ../shared --output trial --steps 5 --texts 4   # a trial

Each variant may hold a number of keys (its segment, its memory and compressed memory). The dense model with as many
reads the text in pieces that long, and knows nothing of the piece before. All are measured on the same tokens of long
held-out text, converted and after a short training on the same tokens. The first token of every 64 is not counted: a
dense model that is cut there cannot predict it.
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

LENGTH, COUNTED = 1024, 64
XL = {"technique": "transformer_xl"}
SLOTS = {"technique": "compressive_transformer", "segment": 64, "ratio": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense, pieces of 64": {"keys": 64},
    "dense, pieces of 128": {"keys": 128},
    "dense, pieces of 256": {"keys": 256},
    "transformer_xl, 64 + 64": {"keys": 128, "step": {**XL, "segment": 64, "memory": 64}},
    "transformer_xl, 64 + 192": {"keys": 256, "step": {**XL, "segment": 64, "memory": 192}},
    "compressive_transformer, 64 + 32 + 32 slots": {"keys": 128, "step": {**SLOTS, "memory": 32, "compressed": 32}},
    "compressive_transformer, 64 + 48 + 16 slots": {"keys": 128, "step": {**SLOTS, "memory": 48, "compressed": 16}},
}


def rows_of(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return stories, each after a bos token, joined and cut into rows ``[count, 1024]``."""
    tokens: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]]
        if len(tokens) >= count * LENGTH:
            break
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)[:count]


def pieces(rows: Tensor, variant: dict[str, Any]) -> Tensor:
    """Return what a variant reads at once: whole rows with a memory, pieces of them without."""
    return rows if "step" in variant else rows.reshape(-1, variant["keys"])


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Return the perplexity of the tokens of ``[n, N]`` that are counted."""
    total, count = 0.0, 0
    for part in rows.split(max(1, 2048 // rows.shape[1])):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        counted = (torch.arange(1, part.shape[1]) % COUNTED != 0).repeat(len(part))
        total, count = total + float(losses[counted].double().sum()), count + int(counted.sum())
    return round(math.exp(total / count), 4)


def converted(home: Path, variant: dict[str, Any]) -> Any:
    """Return the model of a variant."""
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    return hf_optim.optimize(model, [variant["step"]]) if "step" in variant else model


def trained(model: Any, rows: Tensor, steps: int, length: int, rate: float) -> Any:
    """Train a model on one row of 1,024 tokens a step, or on its pieces, with the Trainer of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=LENGTH // length, learning_rate=rate,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, report_to=[], use_cpu=True, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0, train_sampling_strategy="sequential",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows.reshape(-1, length)]
        Trainer(model=model, args=args, train_dataset=data).train()
    return model.eval()


def measure(home: Path, name: str, held: Tensor, train: Tensor, steps: int, rate: float) -> dict[str, Any]:
    """Return the perplexity of a variant before and after training."""
    variant = VARIANTS[name]
    model = converted(home, variant)
    row: dict[str, Any] = {"variant": name, "keys": variant["keys"], "step": variant.get("step")}
    row["before"] = perplexity(model, pieces(held, variant))
    if steps:
        model = trained(model, train, steps, pieces(train, variant).shape[1], rate)
        row["after"] = perplexity(model, pieces(held, variant))
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="folder with data/tinystories, models/babyllama-1m")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--rate", type=float, default=1e-4, help="of training")
    parser.add_argument("--texts", type=int, default=24, help="held-out rows of 1,024 tokens")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    home, data = args.shared / "models" / "babyllama-1m", args.shared / "data" / "tinystories"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held, train = (
        rows_of(tokenizer, data / "eval.jsonl", args.texts),
        rows_of(tokenizer, data / "train.jsonl", args.steps),
    )
    results: dict[str, Any] = {"held_out_tokens": held.numel(), "length": LENGTH, "steps": args.steps, "rows": {}}
    for name in args.variants:
        results["rows"][name] = measure(home, name, held, train, args.steps, args.rate)
        print(json.dumps(results["rows"][name]), flush=True)
    path = args.output / "memories.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

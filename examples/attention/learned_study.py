"""Learned, recurrent and linear attention in one study: quality and cost after one training, and what each recalls.

    python examples/attention/learned_study.py --model ../shared/models/babyllama-1m \\
        --data ../shared/data/tinystories --output model_cards/attention

``language``: a pretrained language model is converted by each technique and trained on the same tokens, as the dense
model is, for each seed (order of the data, drawn features, new weights): held-out perplexity right after the conversion
and after the training; beside it a model of random weights with the same training; processor time of a step, bytes of
the cache after a row, and parameters. ``recall``: models of two layers learn from nothing

- to copy 24 random symbols that they have read once, from 25 tokens back;
- to name, for each of four classes, the symbol of that class that stood among 64 tokens.

``--parts`` runs some of them, ``--variants`` those whose names begin so, and keeps the others of an earlier run. All
take about 25 minutes on one CPU core. ``linformer`` and ``set_transformer``, for encoders, are in ``projections.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learned_study_page
import torch
from patterns import sequences
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_optim
from hf_optim.evaluation.evaluate import perplexity
from hf_optim.toolkit import compat

BATCH, RATE = 8, 3e-4
TIED = {"technique": "universal_transformer", "position_signal": "none", "step_signal": "learned"}
# By technique: fields for rows of 256 tokens, and for the short rows of the tasks.
VARIANTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "dense": ([], []),
    "performer": ([{"technique": "performer", "features": 128}],) * 2,
    "rfa": ([{"technique": "rfa", "features": 64}],) * 2,
    "rfa, gate": ([{"technique": "rfa", "features": 64, "gate": True}],) * 2,
    "reformer": (
        [{"technique": "reformer", "chunk": 16, "buckets": [16], "rounds": 4}],
        [{"technique": "reformer", "chunk": 8, "buckets": [8], "rounds": 4}],
    ),
    "routing_transformer": (
        [{"technique": "routing_transformer", "clusters": 8, "window": 32, "init": "first_batch"}],
        [{"technique": "routing_transformer", "clusters": 4, "window": 16, "init": "first_batch"}],
    ),
    "sinkhorn": ([{"technique": "sinkhorn", "block": 32}], [{"technique": "sinkhorn", "block": 8}]),
    "transformer_xl": (
        [{"technique": "transformer_xl", "segment": 64, "memory": 64}],
        [{"technique": "transformer_xl", "segment": 16, "memory": 16}],
    ),
    "compressive_transformer": (
        [{"technique": "compressive_transformer", "segment": 64, "memory": 32, "compressed": 32}],
        [{"technique": "compressive_transformer", "segment": 16, "memory": 8, "compressed": 8}],
    ),
    "universal_transformer": ([{**TIED, "groups": 4}], [TIED]),
    "act": ([{**TIED, "groups": 4}, {"technique": "act", "bias": -2.0}], [TIED, {"technique": "act", "bias": -2.0}]),
    "adaptive_span": (
        [{"technique": "adaptive_span", "max_span": 256, "ramp": 32, "coefficient": 1e-3, "span_lr": 0.03}],
        [{"technique": "adaptive_span", "max_span": 64, "ramp": 16, "coefficient": 1e-3, "span_lr": 0.03}],
    ),
}
SYMBOLS, COPIED = 64, 24
CLASSES, EACH, NOISE, READ = 4, 8, 24, 64  # classes and their symbols; other symbols; tokens that are read


def seeded(steps: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return steps whose techniques draw by a seed, with this one."""
    drawn = {"performer", "rfa", "reformer", "routing_transformer", "sinkhorn", "transformer_xl"}
    return [{**step, "seed": seed} if step["technique"] in drawn else step for step in steps]


def converted(model: Any, steps: list[dict[str, Any]], seed: int) -> Any:
    """Return a model with the attention of some steps, in place."""
    return hf_optim.optimize(model, seeded(steps, seed)) if steps else model


def train(model: Any, dense: bool, rows: list[dict[str, Tensor]], batch: int, rate: float, seed: int) -> float:
    """Train a model on rows, each once, in place; return the seconds of processor time of a step."""
    count = len(rows) // batch
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=count, per_device_train_batch_size=batch, learning_rate=rate, seed=seed,
            lr_scheduler_type="cosine", warmup_steps=max(1, count // 10), report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        kind = Trainer if dense else hf_optim.OptimTrainer
        trainer = kind(model=model, args=settings, train_dataset=rows)
        start = time.process_time()
        trainer.train()
    return (time.process_time() - start) / count


@torch.no_grad()
def cache_bytes(model: Any, row: Tensor) -> int:
    """Return the bytes that a cache holds after a row ``[1, N]``."""
    cache = DynamicCache(config=model.config)
    found = model(row, **{compat.CACHE: cache})[compat.CACHE]
    parts = [each.nbytes() if hasattr(each, "nbytes") else plain_bytes(each) for each in found.layers]
    return sum(parts)


def plain_bytes(layer: Any) -> int:
    """Return the bytes of the keys and values of a layer of a cache."""
    return sum(part.numel() * part.element_size() for part in (layer.keys, layer.values) if part is not None)


def spread(values: list[float]) -> dict[str, Any]:
    """Return the mean of a figure over the seeds, and each."""
    return {"mean": round(statistics.mean(values), 4), "each": [round(value, 4) for value in values]}


# -- language ---------------------------------------------------------------------------------------------------------
def language(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what one technique does to the pretrained model."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wanted = args.steps * BATCH
    rows = torch.cat([sequences(tokenizer, args.data / f"{part}.jsonl", wanted) for part in ("train", "calibration")])
    held_out = sequences(tokenizer, args.data / "eval.jsonl", args.sequences)
    examples = [{"input_ids": row, "labels": row} for row in rows[:wanted]]
    steps, found = VARIANTS[name][0], {"before": [], "after": [], "scratch": []}
    for seed in range(args.seeds):
        set_seed(seed)
        model = converted(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), steps, seed)
        found["before"].append(perplexity(model.eval(), held_out, BATCH)["perplexity"])
        seconds = train(model, not steps, examples, BATCH, RATE, seed)
        found["after"].append(perplexity(model.eval(), held_out, BATCH)["perplexity"])
        if seed == 0:
            costs = {
                "seconds": round(seconds, 3),
                "cache_bytes": cache_bytes(model, held_out[:1]),
                "parameters": sum(each.numel() for each in model.parameters()),
            }
    set_seed(0)
    blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
    model = converted(blank, steps, 0)
    train(model, not steps, examples, BATCH, RATE, 0)
    scratch = perplexity(model.eval(), held_out, BATCH)["perplexity"]
    return {
        "before": spread(found["before"]),
        "after": spread(found["after"]),
        "scratch": round(scratch, 2),
        "tokens": {"trained": len(examples) * rows.shape[1], "held_out": held_out.numel()},
        **costs,
    }


# -- recall -----------------------------------------------------------------------------------------------------------
def copies(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of a sign, random symbols, the sign and the symbols again, and labels of the repetition."""
    symbols = torch.randint(4, SYMBOLS, (count, COPIED), generator=generator)
    sign = torch.ones(count, 1, dtype=torch.long)
    ids = torch.cat([sign, symbols, sign, symbols], 1)
    labels = ids.clone()
    labels[:, : COPIED + 2] = -100
    return ids, labels


def lookups(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of noise among which stands one symbol of each class, then classes with their symbols; and labels."""
    first = 4 + CLASSES
    ids = torch.randint(first, first + NOISE, (count, READ), generator=generator)
    places = torch.stack([torch.randperm(READ, generator=generator)[:CLASSES] for _ in range(count)])
    own = torch.randint(0, EACH, (count, CLASSES), generator=generator)
    symbols = first + NOISE + EACH * torch.arange(CLASSES) + own
    ids.scatter_(1, places, symbols)
    order = torch.stack([torch.randperm(CLASSES, generator=generator) for _ in range(count)])
    asked = torch.stack([4 + order, symbols.gather(1, order)], -1).flatten(1)
    ids = torch.cat([torch.ones(count, 1, dtype=torch.long), ids, asked], 1)
    labels = torch.full_like(ids, -100)
    labels[:, READ + 2 :: 2] = ids[:, READ + 2 :: 2]
    return ids, labels


TASKS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {"copy": copies, "lookup": lookups}


def recall(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the share of symbols that a small model with one technique names, for each task."""
    found = {}
    for task, make in TASKS.items():
        right = []
        for seed in range(args.seeds):
            set_seed(seed)
            config = LlamaConfig(
                vocab_size=SYMBOLS + 8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0,
            )  # fmt: skip
            model = converted(LlamaForCausalLM(config), VARIANTS[name][1], seed)
            generator = torch.Generator().manual_seed(seed)
            ids, labels = make(args.lessons * 32, generator)
            rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
            train(model, not VARIANTS[name][1], rows, 32, 3e-3, seed)
            ids, labels = make(256, torch.Generator().manual_seed(1000 + seed))
            with torch.no_grad():
                said = model.eval()(ids, use_cache=False).logits[:, :-1].argmax(-1)
            asked = labels[:, 1:] != -100
            right.append(float((said == labels[:, 1:])[asked].float().mean()))
        found[task] = spread(right)
    return found


PARTS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {"language": language, "recall": recall}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", default=[""], help="names, or what they begin with; all by default")
    parser.add_argument("--steps", type=int, default=30, help="of 8 rows of 256 tokens")
    parser.add_argument("--sequences", type=int, default=32, help="held-out rows of 256 tokens")
    parser.add_argument("--lessons", type=int, default=150, help="steps of 32 rows of a task")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "learned_study.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in args.parts:
        for name in VARIANTS:
            if not any(name.startswith(start) for start in args.variants):
                continue
            row = results.setdefault(part, {})[name] = PARTS[part](name, args)
            print(part, name, json.dumps(row), flush=True)
            results.update({"seeds": args.seeds, "steps": args.steps, "lessons": args.lessons})
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    learned_study_page.write(args.output)


if __name__ == "__main__":
    main()

"""Attention by random features: its error, its time, and a language model that is converted to it.

    python examples/attention/linear.py --shared ../shared --output model_cards/attention
    python examples/attention/linear.py --shared ../shared --output linear --steps 8 --texts 4 --repeats 1   # a trial
    python examples/attention/linear_page.py model_cards/attention

1. The error of ``performer`` and ``rfa`` against the softmax attention that they estimate, for 16 to 4096 features,
   over many draws: the root of the mean square, as a share of that of the exact output, and the slope on logarithms.
2. Time of one causal attention on the CPU against the length, beside PyTorch's softmax attention, with the exponent.
3. babyllama-1m is converted, with and without distillation of the outputs of its attention, and trained on stories
   under one budget of tokens: those of distillation are taken from those of training. Perplexity on held-out stories,
   beside the dense model trained on the whole budget.

``--parts`` runs some of ``errors``, ``times`` and ``study``, and keeps the others of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stories import CONTEXT, perplexity, windows
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_optim
from hf_optim_plugins.attention._feature_draws import gaussian_features, generator_for, orthogonal_features
from hf_optim_plugins.attention._performer_attention import performer_attention
from hf_optim_plugins.attention._rfa_attention import rfa_attention

PARTS = ("errors", "times", "study")
COUNTS = (16, 64, 256, 1024, 4096)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
BATCH, RATE = 4, 3e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the study
FEATURES = {"performer": 128, "rfa": 64}
METHODS = (
    ("dense", []),
    ("performer", [{"technique": "performer", "features": 128}]),
    ("performer, learned", [{"technique": "performer", "features": 128, "learned": True}]),
    ("rfa", [{"technique": "rfa", "features": 64}]),
    ("rfa, gate", [{"technique": "rfa", "features": 64, "gate": True}]),
)
DISTILLED = 0.5  # share of the budget


# -- errors -----------------------------------------------------------------------------------------------------------
def estimates(length: int = 64, width: int = 32) -> dict[str, tuple[Tensor, Callable[[int, int], Tensor]]]:
    """Return for each technique exact attention and ``estimate(features, seed)``, float64 and causal."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, width, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = width**-0.5
    q, k = q / 3, k / 3  # of larger ones the estimate has more variance, and the slope shows only beyond
    units = [1e6 * functional.normalize(part, dim=-1) for part in (q, k)]  # beside which 0.001 is nothing
    sharpness = 0.5

    def softmax(query: Tensor, key: Tensor, by: float) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, v, is_causal=True, scale=by)

    def performer(draw: Callable[..., Tensor]) -> Callable[[int, int], Tensor]:
        return lambda count, seed: performer_attention(q, k, v, draw(count, seed), scale, True)[0]

    def rfa(count: int, seed: int) -> Tensor:
        weight, scale = gaussian_features(1, count, width, generator_for(seed)), torch.full((1, 1), sharpness**0.5)
        return rfa_attention(*units, v, weight, scale, True, 0.01)[0]

    orthogonal = performer(lambda count, seed: orthogonal_features(1, count, width, generator_for(seed), "chi"))
    independent = performer(lambda count, seed: gaussian_features(1, count, width, generator_for(seed)))
    exact = softmax(q, k, scale)
    return {
        "performer": (exact, orthogonal),
        "independent": (exact, independent),
        "rfa": (softmax(units[0] / 1e6, units[1] / 1e6, sharpness), rfa),
    }


def slope(x: list[float], y: list[float]) -> float:
    """Return the slope of the line through the logarithms of points, by least squares."""
    found = statistics.linear_regression([math.log(each) for each in x], [math.log(each) for each in y])
    return found.slope


def errors(draws: int) -> dict[str, Any]:
    """Return the error of each technique by number of features, and its slope."""
    found: dict[str, Any] = {"draws": draws, "counts": list(COUNTS), "errors": {}, "slopes": {}}
    for name, (exact, estimate) in estimates().items():
        relative = []
        for count in COUNTS:
            squares = [float((estimate(count, seed) - exact).square().mean()) for seed in range(draws)]
            relative.append(math.sqrt(statistics.mean(squares) / float(exact.square().mean())))
        found["errors"][name] = [round(each, 5) for each in relative]
        found["slopes"][name] = round(slope(list(COUNTS), relative), 4)
        print(name, found["errors"][name], found["slopes"][name], flush=True)
    return found


# -- times ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def times(repeats: int) -> dict[str, Any]:
    """Return median milliseconds of one causal attention of 4 heads of 64 by length, and exponents from 4096 on."""
    heads, width = 4, 64
    weights = {name: gaussian_features(heads, m, width, generator_for(0)).float() for name, m in FEATURES.items()}
    runs: dict[str, Callable[..., Any]] = {
        "softmax": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "performer": lambda q, k, v: performer_attention(q, k, v, weights["performer"], width**-0.5, True),
        "rfa": lambda q, k, v: rfa_attention(q, k, v, weights["rfa"], torch.ones(1, 1), True, 0.01),
    }
    rows = []
    for length in LENGTHS:
        parts = torch.randn(3, 1, heads, length, width, generator=torch.Generator().manual_seed(0)).unbind()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):  # in turn, since a machine's speed drifts
            for name, compute in runs.items():
                begin = time.process_time()  # one thread: other work on the machine does not count
                compute(*parts)
                if turn:
                    taken[name].append(1000 * (time.process_time() - begin))
        median = {name: round(statistics.median(each), 2) for name, each in taken.items()}
        rows.append({"length": length, "load": round(os.getloadavg()[0], 1), "ms": median})
        print(json.dumps(rows[-1]), flush=True)
    long = [row for row in rows if row["length"] >= 4096]
    exponents = {name: slope([r["length"] for r in long], [r["ms"][name] for r in long]) for name in runs}
    return {
        "heads": heads, "width": width, "features": FEATURES, "repeats": repeats, "rows": rows,
        "exponents": {name: round(each, 3) for name, each in exponents.items()},
    }  # fmt: skip


# -- study ------------------------------------------------------------------------------------------------------------
def trained(model: Any, tokens: Tensor, steps: int, seed: int) -> Any:
    """Train a model on windows of tokens with the Trainer of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            seed=seed, dataloader_pin_memory=DEVICE == "cuda",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model=model, args=args, train_dataset=data).train()
    return model.eval()


def converted(home: Path, steps: list[dict[str, Any]], distill: int, tokens: Tensor, seed: int) -> Any:
    """Return the language model with the attention of a recipe of one step; ``distill`` steps teach it its outputs."""
    model = AutoModelForCausalLM.from_pretrained(home).eval().to(DEVICE)
    if not steps:
        return model
    step = {**steps[0], "seed": seed, "distill_steps": distill, "distill_rate": 3e-3}
    batches = [{"input_ids": part} for part in tokens.split(BATCH)] if distill else None
    return hf_optim.optimize(model, [step], calibration=batches)


def study(shared: Path, texts: int, steps: int, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Return perplexities of babyllama-1m by attention, distilled or not, under one budget of ``steps`` batches."""
    home = shared / "models" / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held = windows(tokenizer, shared / "data" / "tinystories" / "eval.jsonl", texts)
    train = windows(tokenizer, shared / "data" / "tinystories" / "train.jsonl", BATCH * steps)
    rows = []
    for name, recipe in METHODS:
        for share in (0.0, DISTILLED) if recipe else (0.0,):
            for seed in seeds:
                distill = round(share * steps)
                model = converted(home, recipe, distill, train[: BATCH * distill], seed)
                row: dict[str, Any] = {"method": name, "distill": distill, "seed": seed}
                row["before"] = perplexity(model, held)
                if distill:
                    report = hf_optim.run_of(model).record.steps["0"]["distillation"]
                    row |= {"error_before": report["before"], "error_after": report["after"]}
                row["after"] = perplexity(trained(model, train[BATCH * distill :], steps - distill, seed), held)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return {
        "held_out_tokens": held.numel(), "steps": steps, "batch": BATCH, "context": CONTEXT, "rate": RATE,
        "seeds": list(seeds), "rows": rows,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="folder with models and data")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--draws", type=int, default=50, help="of the features, for each error")
    parser.add_argument("--steps", type=int, default=60, help="of each language model, those of distillation included")
    parser.add_argument("--texts", type=int, default=48, help="held-out windows of 256 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="of each time")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="of features and of the order of windows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "linear.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {
        "errors": lambda: errors(args.draws),
        "times": lambda: times(args.repeats),
        "study": lambda: study(args.shared, args.texts, args.steps, tuple(args.seeds)),
    }
    for part in args.parts:
        results[part] = run[part]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

"""Feed-forward parameters against held-out loss: `moefication` of a SwiGLU model, and of the same model with ReLU.

    python examples/moe/moefication.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/moe

The decoder is ReLU-fied first: the same weights with ``hidden_act="relu"``, distilled from the original (`logit_kd`).
Then both are divided, and the loss is measured with several numbers of active experts, for the trained router and

- a router that compares the input with the experts' mean weights (similarity),
- the best choice, by the true activations of every token, which nothing can know before computing them,
- random experts.

``--data`` is a folder with calibration.jsonl, train.jsonl and eval.jsonl: the first trains routers, the second the ReLU
model, the last is held out. At the end the time of one token is measured on a layer of the shape of OPT-1.3B. It takes
15 minutes on one CPU core, most of it the distillation; ``--relu`` names a folder that keeps its result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moefication_page
import torch
from capacity import sequences
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

import hf_optim
from hf_optim.toolkit.modules import Inlet, connect
from hf_optim_plugins.moe import _moefied_layers

EXPERTS, BATCH = 44, 8
SHARES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
WIDTH, NEURONS, LAYERS, PASSES, REPEATS = 2048, 8192, 3, 6, 4  # of OPT-1.3B, and more layers than a cache holds


def relu_model(args: argparse.Namespace, rows: Tensor) -> Any:
    """Return the model with ReLU in place of its activation, distilled from it; from ``--relu`` if it is there."""
    if args.relu is not None and (args.relu / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(args.relu, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, hidden_act="relu")
    model = hf_optim.optimize(model, [{"technique": "logit_kd", "teacher": args.model, "alpha": 1.0}])
    model = distill(model, rows, args.steps)
    if args.relu is not None:
        model.save_pretrained(args.relu)
    return model


@torch.no_grad()
def quality(model: Any, rows: Tensor) -> dict[str, float]:
    """Return the loss (nats per token) and the share of right next tokens."""
    losses, right = [], []
    for ids in rows.split(BATCH):
        logits = model(ids).logits[:, :-1].flatten(0, 1).float()
        losses.append(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"))
        right.append(logits.argmax(-1) == ids[:, 1:].flatten())
    return {
        "nll": round(float(torch.cat(losses).mean()), 4),
        "accuracy": round(float(torch.cat(right).float().mean()), 4),
    }


def divided_layers(model: Any) -> list[Any]:
    """Return the divided feed-forward layers of a model."""
    return [module for module in model.modules() if hasattr(module, "inlet") and hasattr(module, "router")]


def best_choice(ffn: Any, x: Tensor) -> Tensor:
    """Return the experts with the largest activations, ``[T, active]``: all are computed to know them."""
    mass = torch.stack([ffn.experts.neurons(x, e).abs().sum(-1) for e in range(ffn.experts.num_experts)], -1)
    return mass.topk(ffn.active, dim=-1).indices


def random_choice(ffn: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return random experts, others for each token, ``[T, active]``."""
    return torch.rand(len(x), ffn.experts.num_experts, generator=generator).topk(ffn.active, dim=-1).indices


@contextmanager
def choosing(layers: list[Any], choose: Callable[..., Tensor] | None) -> Iterator[None]:
    """Choose experts by another function of layer and input while the block runs."""
    for ffn in layers if choose else ():
        ffn.choose = lambda x, ffn=ffn: choose(ffn, x)
    try:
        yield
    finally:
        for ffn in layers:
            vars(ffn).pop("choose", None)


def distill(model: Any, rows: Tensor, steps: int) -> Any:
    """Train a model by the step of its recipe that distills, in evaluation mode and without its run afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, seed=0, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=steps // 20, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=50,
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        hf_optim.OptimTrainer(
            model=model, args=settings, train_dataset=examples, data_collator=default_data_collator
        ).train()
    return hf_optim.release(model).eval()


def recovered(
    path: str, batches: list[dict[str, Tensor]], train: Tensor, held_out: Tensor, steps: int
) -> dict[str, Any]:
    """Return quality with a fifth of the experts after distillation from the dense model."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    every = sum(p.numel() for block in dense.model.layers for p in block.mlp.parameters())
    recipe = [
        {"technique": "moefication", "experts": EXPERTS, "active": 0.2, "clustering": "coactivation"},
        {"technique": "logit_kd", "alpha": 1.0, "teacher": path},
    ]
    model = distill(hf_optim.optimize(dense, recipe, calibration=batches), train, steps)
    layers = divided_layers(model)
    return {"steps": steps, "share": round(computed_share(layers, every), 4), **quality(model, held_out)}


def curves(dense: Callable[[], Any], calibration: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return quality by way of choosing and share of active experts, for one dense model."""
    generator = torch.Generator().manual_seed(0)
    variants: dict[str, tuple[dict[str, Any], Callable[..., Tensor] | None]] = {
        "trained router": ({}, None),
        "trained router, co-activation": ({"clustering": "coactivation"}, None),
        "similarity": ({"router": "similarity"}, None),
        "best choice": ({}, best_choice),
        "random": ({}, lambda ffn, x: random_choice(ffn, x, generator)),
    }
    batches = [{"input_ids": ids} for ids in calibration.split(BATCH)]
    result: dict[str, Any] = {"dense": quality(dense(), held_out), "shares": {}}
    for name, (fields, choose) in variants.items():
        step = {"technique": "moefication", "experts": EXPERTS, "active": 0.2, **fields}
        model = hf_optim.optimize(dense(), [step], calibration=batches)
        layers, entry = divided_layers(model), dict(hf_optim.run_of(model).record.steps["0"])
        entry.pop("layers")
        result.setdefault("records", {})[name] = entry
        result[name] = {}
        for share in SHARES:
            for ffn in layers:
                ffn.active = max(1, round(share * EXPERTS))
            with choosing(layers, choose):
                result[name][f"{share:g}"] = quality(model, held_out)
            result["shares"][f"{share:g}"] = round(computed_share(layers, entry["feed_forward_parameters"]), 4)
        print(name, json.dumps(result[name]), flush=True)
    return result


def computed_share(layers: list[Any], every: int) -> float:
    """Return the parameters that a token reads in the divided layers, routers included, as a share of ``every``."""
    read = 0
    for ffn in layers:
        stacks = sum(p.numel() for p in ffn.experts.parameters())
        router = sum(p.numel() for p in ffn.router.parameters()) if ffn.active < ffn.experts.num_experts else 0
        read += stacks * ffn.active // ffn.experts.num_experts + router
    return read / every


@torch.no_grad()
def times(threads: int) -> list[dict[str, Any]]:
    """Return the time of one token through a ReLU layer of OPT-1.3B's shape, dense and divided, in milliseconds.

    Weights and tokens are random; several layers take turns, so that their weights come from memory. All variants are
    timed in turn, and the fastest pass of each counts, since other work on the machine only slows down.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, 1, WIDTH, generator=generator) for _ in range(8)]
    dense = [dense_layer() for _ in range(LAYERS)]
    found = [{"experts": 1, "share": 1.0, "ms": math.inf}]
    divided = {}
    for experts in (64, 256):
        entry = {"experts": experts, "active": 1, "neurons": NEURONS, "router": "mlp", "act": "relu", "gated": False,
                 "bias": True, "out_bias": True}  # fmt: skip
        divided[experts] = [divided_layer(entry, generator) for _ in range(LAYERS)]
        found += [{"experts": experts, "share": share, "ms": math.inf} for share in (0.1, 0.25, 0.5)]
    for _ in range(PASSES):
        for row in found:
            layers: Any = divided.get(row["experts"], dense)
            for ffn in layers if row["experts"] > 1 else ():
                ffn.active = round(row["share"] * row["experts"])
            row["ms"] = min(row["ms"], per_layer(layers, tokens))
    for row in found:
        row |= {"ms": round(row["ms"], 3), "times": round(found[0]["ms"] / row["ms"], 2)}
    return found


def dense_layer() -> nn.Module:
    """Return a dense layer with random weights."""
    return nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.Linear(NEURONS, WIDTH))


def divided_layer(entry: dict[str, Any], generator: torch.Generator) -> Any:
    """Return a divided layer with random weights, as the checkpoint's code builds it."""
    config = SimpleNamespace(_experts_implementation="grouped_mm")
    ffn = _moefied_layers.MoefiedFFN(config, WIDTH, WIDTH, entry, {"dtype": torch.float32})
    for parameter in ffn.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    connect(ffn, Inlet(keeps=True))
    return ffn


def per_layer(layers: list[Any], tokens: list[Tensor]) -> float:
    """Return the mean time of one token through one layer, in milliseconds; the layers take turns."""
    calls = [
        layer if isinstance(layer, nn.Sequential) else lambda x, ffn=layer: ffn(ffn.inlet[0](x)) for layer in layers
    ]
    begin = time.perf_counter()
    for x in tokens:
        for call in calls:
            call(x)
    return 1e3 * (time.perf_counter() - begin) / (len(tokens) * len(calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Llama with SwiGLU layers")
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--relu", type=Path, help="a folder for the ReLU-fied model")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--steps", type=int, default=500, help="of the distillation")
    parser.add_argument("--recovery", type=int, default=200, help="steps of training after the division")
    parser.add_argument("--sequences", type=int, default=48, help="held-out sequences of 256 tokens")
    parser.add_argument("--threads", type=int, default=1, help="for the times")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, calibration, held_out = (
        sequences(tokenizer, args.data / f"{split}.jsonl", count)
        for split, count in (("train", None), ("calibration", 32), ("eval", args.sequences))
    )
    relu = relu_model(args, train)
    relu_path = tempfile.mkdtemp() if args.relu is None else str(args.relu)
    relu.save_pretrained(relu_path)
    models = {"ReLU": relu_path, "SwiGLU": args.model}
    results: dict[str, Any] = {
        "model": Path(args.model).name,
        "experts": EXPERTS,
        "steps": args.steps,
        "held_out_tokens": held_out.numel(),
        "calibration_tokens": calibration.numel(),
    }
    for name, path in models.items():
        print(name, flush=True)

        def dense(path: str = path) -> Any:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

        results[name] = curves(dense, calibration, held_out)
        batches = [{"input_ids": ids} for ids in calibration.split(BATCH)]
        results[name]["recovered"] = recovered(path, batches, train, held_out, args.recovery)
        print("recovered", json.dumps(results[name]["recovered"]), flush=True)
    results["times"] = {
        "width": WIDTH,
        "neurons": NEURONS,
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 1),
    }
    measured = [times(args.threads) for _ in range(REPEATS)]
    quarter = [row["times"] for rows in measured for row in rows if row["share"] == 0.25]
    results["times"] |= {"repeats": REPEATS, "quarter": [min(quarter), max(quarter)], "rows": measured[-1]}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "moefication.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    moefication_page.write(args.output)


if __name__ == "__main__":
    main()

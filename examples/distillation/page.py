"""The distillation page and plot, from the figures that minilm_student.py wrote.

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

Written by `examples/distillation/page.py` from what `minilm_student.py` and `classifier_student.py` beside it computed:
students of `distilbert`, made of layers of their teachers.

![Teacher, copied layers, student](students.png)
"""


def gather(files: list[Path], folder: Path) -> list[dict[str, Any]]:
    """The figures of all runs, without what belongs to one machine; written to ``results.json``."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for run in runs:
        run["settings"] = {key: value for key, value in run["settings"].items() if key in SETTINGS}
    if runs:
        (folder / NAME).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def encoder_rows(run: dict[str, Any]) -> list[str]:
    found, settings = run["encoder"], run["settings"]
    layers = ", ".join(map(str, next(iter(found["layers"].values()))))
    pool = settings.get("alpha_pool", "none: the cosine of tokens alone")
    (of_layers, of_model, seconds) = (found[key] for key in ("layer parameters", "parameters", "encoding seconds"))
    lines = [
        f"## all-MiniLM-L6-v2, layers {layers}: Spearman on STS-B",
        "",
        f"{settings['steps']} steps of {settings['batch']} unlabelled sentences on {settings['device']}, "
        f"{found['training seconds']:.0f} s, alpha_pool {pool}. "
        f"Parameters of the layers: {of_layers[0]:,} to {of_layers[1]:,}; of the model: {of_model[0]:,} to "
        f"{of_model[1]:,}. Encoding the test sentences: {seconds[0]:.2f} s to {seconds[1]:.2f} s, "
        f"{found['speed-up']:.2f} times as fast.",
        "",
        "| | dev | test | share of the teacher, test |",
        "|---|---|---|---|",
    ]
    for name in ("teacher", "copied layers", "student"):
        figures = found[name]
        share = figures["test"] / found["teacher"]["test"]
        lines.append(f"| {name} | {figures['dev']:.4f} | {figures['test']:.4f} | {100 * share:.1f} % |")
    return [*lines, ""]


def decoder_rows(run: dict[str, Any]) -> list[str]:
    found = run["decoder"]
    before, after = found["layer parameters"]
    lines = [
        "## babyllama-1m, five layers to three: perplexity on TinyStories",
        "",
        f"{run['settings']['decoder_steps']} steps, the same copied layers twice: with the recipe, and by the task "
        f"loss alone. Parameters of the layers: {before:,} to {after:,}.",
        "",
        "| | perplexity |",
        "|---|---|",
    ]
    return [*lines, *(f"| {name} | {found[name]:.3f} |" for name in STUDENTS), ""]


def classifier_rows(run: dict[str, Any]) -> list[str]:
    found, settings = run["classifier"], run["settings"]
    (before, after), (slow, fast) = found["layer parameters"], found["encoding seconds"]
    layers = ", ".join(map(str, next(iter(found["layers"].values()))))
    lines = [
        f"## all-MiniLM-L6-v2 fine-tuned on SST-2, layers {layers}: accuracy on dev",
        "",
        f"{settings['steps']} steps of {settings['batch']} sentences on {settings['device']}, the same copied layers "
        f"twice: with the recipe, and by the task loss alone. Parameters of the layers: {before:,} to {after:,}. "
        f"Encoding the sentences: {slow:.2f} s to {fast:.2f} s, {found['speed-up']:.2f} times as fast.",
        "",
        "| | accuracy | share of the teacher |",
        "|---|---|---|",
    ]
    for name in STUDENTS:
        lines.append(f"| {name} | {found[name]:.4f} | {100 * found[name] / found['teacher']:.1f} % |")
    return [*lines, ""]


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "encoder": "Spearman, STS-B test\n(higher is better)",
        "classifier": "accuracy, SST-2 dev\n(higher is better)",
        "decoder": "perplexity, TinyStories\n(logarithmic, lower is better)",
    }
    panels = [
        (label, _spearman(run) if kind == "encoder" else _both_ways(run[kind]), run)
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


def _spearman(run: dict[str, Any]) -> dict[str, float]:
    layers = " ".join(map(str, next(iter(run["encoder"]["layers"].values()))))
    names = {"teacher": "teacher", f"layers {layers},\ncopied": "copied layers", "student": "student"}
    return {label: run["encoder"][name]["test"] for label, name in names.items()}


def _both_ways(found: dict[str, Any]) -> dict[str, float]:
    labels = ("teacher", "copied", "task loss", "distilbert")
    return {label: found[name] for label, name in zip(labels, STUDENTS, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="*", help="json files; none: those that are there already")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = gather(args.figures, args.output)
    lines = [HEAD]
    for run in runs:
        lines += encoder_rows(run) if "encoder" in run else []
        lines += classifier_rows(run) if "classifier" in run else []
        lines += decoder_rows(run) if "decoder" in run else []
    (args.output / "README.md").write_text("\n".join(lines), encoding="utf-8")
    plot(args.output / "students.png", runs)


if __name__ == "__main__":
    main()

"""Render the figures of ``learned_study.py`` as a page and a plot, from ``learned_study.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_optim.evaluation.cards.plots import COLOURS


def write(folder: Path) -> None:
    """Write ``learned_study.md`` and ``learned_study.png`` beside ``learned_study.json``."""
    results = json.loads((folder / "learned_study.json").read_text(encoding="utf-8"))
    draw(results, folder / "learned_study.png")
    (folder / "learned_study.md").write_text(page(results), encoding="utf-8")


def figure_of(own: Mapping[str, Any], digits: int = 3) -> str:
    """Return the mean over the seeds, and half of the distance between the largest and the smallest."""
    half = (max(own["each"]) - min(own["each"])) / 2
    return f"{own['mean']:.{digits}f} ± {half:.{digits}f}"


def page(results: Mapping[str, Any]) -> str:
    """Return the page."""
    language, recall = results.get("language", {}), results.get("recall", {})
    rows = [
        f"| {name} | {figure_of(own['before'])} | {figure_of(own['after'])} | {own['scratch']:.1f} | "
        f"{own['seconds']:.2f} | {own['cache_bytes'] / 1024:,.0f} | {own['parameters']:,} |"
        for name, own in language.items()
    ]
    tasks = [
        f"| {name} | {figure_of(own['copy'], 2)} | {figure_of(own['lookup'], 2)} |" for name, own in recall.items()
    ]
    tokens = next(iter(language.values()))["tokens"] if language else {"trained": 0, "held_out": 0}
    return f"""# Learned, recurrent and linear attention in one study

babyllama-1m converted by each technique and trained on {tokens["trained"]:,} tokens ({results["steps"]} steps), the
same for all; the dense row is the control, trained too. Perplexity of {tokens["held_out"]:,} held-out tokens in rows of
256, mean of {results["seeds"]} seeds and half of their range. *From nothing*: the same training from random weights.
Processor time of a step of 8 rows on a CPU under other load, KiB that the cache has taken after 256 tokens in float32
(room for later tokens included), and parameters. The rate of this training suits models that must learn again: it costs
the dense model a little. Rows are short: at 256 tokens none of them is faster than dense attention, and memories cover
less than a row. Performer and RFA are converted here without distillation; [with it](linear.md) their error is smaller.
Made by
[examples/attention/learned_study.py](../../examples/attention/learned_study.py).

| technique | converted | trained | from nothing | s / step | cache, KiB | parameters |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

![Perplexity after training, and what each recalls](learned_study.png)

## What each recalls

Models of two layers, trained from nothing for {results["lessons"]} steps of 32 rows. *Copy*: 24 random symbols, each
from 25 tokens back. *Lookup*: for each of four classes the symbol that stood among 64 tokens. Share of right symbols in
256 new rows. A window, chunk or memory that does not reach, or features that cannot tell, shows here.

| technique | copy | lookup |
| --- | ---: | ---: |
{chr(10).join(tasks)}
"""


def draw(results: Mapping[str, Any], target: Path) -> None:
    """Write the plot: perplexities with their ranges, and shares of right symbols."""
    language, recall = results.get("language", {}), results.get("recall", {})
    figure = Figure(figsize=(11, 5), dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(language)
    means = [language[name]["after"]["mean"] for name in names]
    ends = [language[name]["after"]["each"] for name in names]
    errors = [
        [m - min(e) for m, e in zip(means, ends, strict=True)],
        [max(e) - m for m, e in zip(means, ends, strict=True)],
    ]
    left.barh(names, means, xerr=errors, color=COLOURS[0])
    left.set(xlabel="held-out perplexity after training", xlim=(0, None))
    left.invert_yaxis()
    names = list(recall)
    for shift, (task, colour) in enumerate(zip(("copy", "lookup"), COLOURS, strict=False)):
        places = [index + 0.38 * shift for index in range(len(names))]
        right.barh(places, [recall[name][task]["mean"] for name in names], 0.36, label=task, color=colour)
    right.set_yticks([index + 0.19 for index in range(len(names))], names)
    right.set(xlabel="share of right symbols", xlim=(0, 1.02))
    right.invert_yaxis()
    right.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(target)

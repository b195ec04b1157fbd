"""The table of the sweep (docs/architectures.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .architectures import TASKS, Architecture
from .recipes import RECIPES

MARKS = {"pass": "+", "refused": "refused", "FAIL": "FAIL", "": ""}
REASON = 420

HEAD = """# Architectures

Does hf_optim support your model? Look up its class (`architectures` in its `config.json`) in the tables below: `+`
means that the recipe works, `refused` that it is not possible, with the reason beside it. For a class that is not
listed, or has its own code, ask `hf-optim check RECIPE --model MODEL`, which reads the configuration only. In general
the decoders, encoders, encoder-decoders, mixtures of experts, and vision, speech and multimodal models of
transformers work. Integer weights are refused for GPT-2 and other models of `Conv1D`, and for experts that
transformers does not store one by one. Pruning works for nearly all.

Every class that transformers {version} lists under the auto classes of text, vision, speech and multimodal models,
built tiny from its configuration, through five recipes: {recipes}. `make sweep` writes this page ({classes} classes,
about an hour on two cores).

A recipe *passes* (+) if the model is optimized from a checkpoint on two batches, saved, reloaded by transformers
without hf_optim to bit-equal logits with every tensor found in the files, and reloaded with `optim_config="auto"`:
off the kernels bit-equal, and on them within {tolerance:.0%} of the norm of the logits (or four times what a change
of the norms by a millionth does: 8-bit inputs turn a last bit into a step, which random weights amplify). It is
*refused* if hf_optim raises a `ModelError` or `RecipeError` with the reason before anything is written. Everything
else fails: other exceptions, unequal logits, missing tensors. Models of text and images are calibrated on text if
they run on text alone. The weights are random: the table says nothing about quality. An empty cell was not run.

{shares}

{failures}## Classes
"""


def shares(rows: Sequence[Architecture], results: Mapping[str, Any]) -> str:
    """Return the shares of passes, refusals and failures, as a Markdown table with a sentence before it."""
    names = list(dict.fromkeys(row.name for row in rows if row.name in results))
    able = [name for name in names if not results[name]["stock"]]
    lines = [
        f"{len(names)} classes, of which transformers alone builds, runs, saves and reloads {len(able)} to equal "
        "logits with the packages and inputs at hand. Of these:",
        "",
        "| recipe | pass | refused with a reason | fail | pass or refused |",
        "|---|---:|---:|---:|---:|",
    ]
    for recipe in RECIPES:
        lines.append(_share(recipe, (_outcome(results[name], recipe) for name in able)))
    lines.append(_share("all five", (_worst(results[name]) for name in able)))
    return "\n".join(lines)


def _share(label: str, outcomes: Iterable[str]) -> str:
    found = Counter(outcome for outcome in outcomes if outcome)
    total = sum(found.values()) or 1
    counts = [found[key] for key in ("pass", "refused", "FAIL")]
    cells = [f"{count} ({count / total:.1%})" for count in counts]
    return f"| {label} | {' | '.join(cells)} | {(counts[0] + counts[1]) / total:.1%} |"


def _outcome(result: Mapping[str, Any], recipe: str) -> str:
    return str(result["recipes"].get(recipe, ("", ""))[0])


def _worst(result: Mapping[str, Any]) -> str:
    found = {_outcome(result, recipe) for recipe in RECIPES}
    return next((outcome for outcome in ("FAIL", "", "refused") if outcome in found), "pass")


def write_table(path: Path, rows: Sequence[Architecture], results: Mapping[str, Any]) -> None:
    """Write the page: the shares, the failures, and a table of the classes of each task."""
    import transformers

    from .checks import KERNEL_ERROR

    failed = {
        name: [f"{recipe}: {_cell(why)}" for recipe, (outcome, why) in result["recipes"].items() if outcome == "FAIL"]
        for name, result in results.items()
        if not result["stock"] and _worst(result) == "FAIL"
    }
    failures = "".join(f"- `{name}`: {'; '.join(reasons)}\n" for name, reasons in sorted(failed.items()))
    text = HEAD.format(
        version=transformers.__version__,
        recipes=", ".join(f"`{name}`" for name in RECIPES),
        classes=len({row.name for row in rows}),
        tolerance=KERNEL_ERROR,
        shares=shares(rows, results),
        failures=f"## Failures\n\n{failures}\n" if failures else "",
    )
    for task in TASKS:
        text += f"\n### {task}\n\n| class | {' | '.join(RECIPES)} | reason |\n|---|{'---|' * (len(RECIPES) + 1)}\n"
        for row in rows:
            if row.task == task and row.name in results:
                text += _row(row.name, results[row.name])
    path.write_text(text, encoding="utf-8")


def _row(name: str, result: Mapping[str, Any]) -> str:
    if result["stock"]:
        return f"| {name} |{' |' * len(RECIPES)} stock cannot: {_cell(result['stock'])} |\n"
    marks = " | ".join(MARKS[_outcome(result, recipe)] for recipe in RECIPES)
    reasons = dict.fromkeys(_cell(reason) for _, reason in result["recipes"].values() if reason)
    return f"| {name} | {marks} | {'; '.join(reasons)} |\n"


def _cell(text: str) -> str:
    """Return text that fits into a cell: short, in one line, without paths of temporary folders."""
    import re

    text = re.sub(r"/tmp/[^\s:]*/", "", " ".join(text.split()))
    text = text if len(text) <= REASON else text[:REASON].rsplit(" ", 1)[0] + " ..."
    return text.replace("|", "\\|").replace("<", "&lt;")

"""Measured figures: what each is called, how it is written, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReportedMetric:
    """One row of the before/after table.

    Attributes:
        key: in ``record.measured["before"]`` and ``["after"]``.
        label: with the unit, for people.
        write: the number as text.
        metric: its name in a model index of the Hub; empty for what does not belong there.
        lower_is_better: which way is better.
        relative: whether a change in percent says something.
        of_two: True for a figure that compares the result with the original, which has none of its own.
    """

    key: str
    label: str
    write: Callable[[Any], str]
    metric: str = ""
    lower_is_better: bool = True
    relative: bool = True
    of_two: bool = False


def bytes_text(number: float) -> str:
    """Decimal units, as disks are sold and the Hub counts: ``3.88 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def _both(number: float) -> str:
    return f"{bytes_text(number)} ({number:,.0f})"


REPORTED_METRICS = (
    ReportedMetric("perplexity", "perplexity", "{:.4f}".format, "perplexity"),
    ReportedMetric("bits_per_byte", "bits per byte", "{:.4f}".format, "bits_per_byte"),
    ReportedMetric("accuracy", "accuracy", "{:.4f}".format, "accuracy", lower_is_better=False),
    ReportedMetric("spearman", "Spearman correlation", "{:.4f}".format, "spearmanr", lower_is_better=False),
    ReportedMetric(
        "top1_agreement",
        "top-1 agreement with the original",
        "{:.2%}".format,
        "top1_agreement",
        lower_is_better=False,
        relative=False,
        of_two=True,
    ),
    ReportedMetric(
        "kl", "KL from the original (nats per position)", "{:.5f}".format, "kl", relative=False, of_two=True
    ),
    ReportedMetric("bytes_on_disk", "weights on disk (bytes)", _both),
    ReportedMetric("parameter_bytes", "weights in memory (bytes)", _both),
    ReportedMetric("peak_memory_bytes", "peak memory (bytes)", _both),
    ReportedMetric("ms_per_token", "milliseconds per token (greedy, batch 1)", "{:.2f}".format),
)
QUALITY = tuple(f for f in REPORTED_METRICS if f.key in ("perplexity", "accuracy", "spearman"))


def quality_of(*measured: Mapping[str, Any]) -> ReportedMetric | None:
    """The first figure of quality that all of these have."""
    return next((f for f in QUALITY if all(is_number(m.get(f.key)) for m in measured)), None)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def change(figure: ReportedMetric, before: Any, after: Any) -> str:
    """``"-74.2 %"``, or an empty string where a relative change says nothing."""
    if not (figure.relative and is_number(before) and is_number(after) and before):
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def full_fields(step: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's step with the defaults it leaves out, where its technique is at hand."""
    from ..errors import RecipeError
    from ..recipes.catalogue import catalogue

    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}
    name = str(fields.pop("technique"))
    try:
        made = catalogue().get(name).from_dict(fields)
    except (RecipeError, ImportError):
        return fields
    return {key: getattr(made, key) for key in made.__dataclass_fields__}  # type: ignore[attr-defined]


def step_label(step: Mapping[str, Any]) -> str:
    """``"gptq 4-bit g32"``: a technique with what matters most of its fields."""
    fields = full_fields(step)
    words = [str(step["technique"])]
    if is_number(fields.get("bits")):
        words.append(f"{fields['bits']}-bit")
    if is_number(fields.get("group_size")):
        words.append(f"g{fields['group_size']}")
    if is_number(fields.get("keep")) and is_number(fields.get("group")):
        words.append(f"{fields['keep']}:{fields['group']}")
    elif is_number(fields.get("sparsity")):
        words.append(f"{100 * fields['sparsity']:g} %")
    return " ".join(words)


def recipe_label(recipe: Mapping[str, Any]) -> str:
    """The steps of a recipe in a few words: ``"nm 2:4 + gptq 4-bit g32"``."""
    return " + ".join(step_label(step) for step in recipe.get("steps", ())) or "no steps"


def short_id(model: str) -> str:
    """The last part of a model's id."""
    return Path(model).name or model

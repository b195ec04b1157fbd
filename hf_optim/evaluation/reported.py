"""How results are reported: the label, the text form and the better direction of each metric, and names of recipes.

``REPORTED_METRICS`` is the only list of what cards, plots and commands show, in the formats of ``trust.figures``.
Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..trust.figures import format_bytes, format_count, format_share


@dataclass(frozen=True)
class ReportedMetric:
    """One row of the table that compares the original with the result.

    Attributes:
        key: its key in ``record.measured["before"]`` and ``["after"]``.
        label: its name for readers, with the unit.
        format: turns the number into text.
        hub_name: its name in a model index of the Hub; empty for metrics that do not belong there.
        quality: True for a metric that plots and the index use as the quality of a model.
        lower_is_better: True if a smaller number is better.
        relative: True if a change in percent is meaningful.
        in_memory: True if it is measured on the model in memory, False if on the checkpoint, loaded again.
    """

    key: str
    label: str
    format: Callable[[Any], str]
    hub_name: str = ""
    quality: bool = False
    lower_is_better: bool = True
    relative: bool = True
    in_memory: bool = False


def format_coverage(touched: float, total: float, share: float) -> str:
    """Return how much of a model a step changed: ``921,600 of 969,216 weights (95.1 %)``."""
    return f"{format_count(touched)} of {format_count(total)} weights ({format_share(share)})"


def format_exact_bytes(number: float) -> str:
    """Return bytes as text, rounded and exact: ``3.88 MB (3,881,848)``."""
    return f"{format_bytes(number)} ({format_count(number)})"


REPORTED_METRICS = (
    ReportedMetric("perplexity", "perplexity", "{:.4f}".format, "perplexity", quality=True),
    ReportedMetric("bits_per_byte", "bits per byte", "{:.4f}".format, "bits_per_byte"),
    ReportedMetric("accuracy", "accuracy", "{:.4f}".format, "accuracy", quality=True, lower_is_better=False),
    ReportedMetric(
        "spearman", "Spearman correlation", "{:.4f}".format, "spearmanr", quality=True, lower_is_better=False
    ),
    # These two compare the result with the original, which has no value itself.
    ReportedMetric(
        "top1_agreement",
        "top-1 agreement with the original",
        partial(format_share, digits=2),
        "top1_agreement",
        lower_is_better=False,
        relative=False,
        in_memory=True,
    ),
    ReportedMetric(
        "kl", "KL from the original (nats per position)", "{:.5f}".format, "kl", relative=False, in_memory=True
    ),
    ReportedMetric("dropped_share", "choices of experts dropped", partial(format_share, digits=2), relative=False),
    ReportedMetric("bytes_on_disk", "weights on disk (bytes)", format_exact_bytes),
    ReportedMetric("parameter_bytes", "weights in memory (bytes)", format_exact_bytes),
    ReportedMetric("peak_memory_bytes", "peak memory (bytes)", format_exact_bytes),
    ReportedMetric("ms_per_token", "ms per token (greedy, batch 1)", "{:.2f}".format),
    ReportedMetric("ms_per_example", "ms per example (batch 8)", "{:.2f}".format),
)
QUALITY_METRICS = tuple(m for m in REPORTED_METRICS if m.quality)


def common_quality_metric(*measured: Mapping[str, Any]) -> ReportedMetric | None:
    """Return the first quality metric that all of these have, or None."""
    return next((m for m in QUALITY_METRICS if all(is_number(values.get(m.key)) for values in measured)), None)


def is_number(value: Any) -> bool:
    """Return True for an int or a finite float, and False for a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def relative_change(metric: ReportedMetric, before: Any, after: Any) -> str:
    """Return the change as text, ``"-74.2 %"``; empty if there is none or it is not meaningful."""
    if not (metric.relative and is_number(before) and is_number(after) and before):
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def recipe_trains(recipe: Mapping[str, Any]) -> bool:
    """Return True if a step of a recipe trains; a technique that is not installed here counts as one that does not."""
    from ..errors import RecipeError
    from ..recipes.catalogue import catalogue

    for step in recipe.get("steps", ()):
        try:
            if catalogue().get(str(step["technique"])).spec.trains:
                return True
        except (RecipeError, ImportError):
            continue
    return False


def has_hub_metrics(measured: Mapping[str, Any]) -> bool:
    """Return True if a metric that belongs into a model index of the Hub was measured."""
    return any(is_number(measured.get(m.key)) for m in REPORTED_METRICS if m.hub_name)


def fields_with_defaults(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe step, with defaults filled in if the technique is installed."""
    from ..errors import RecipeError
    from ..recipes.catalogue import catalogue

    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}
    name = str(fields.pop("technique"))
    try:
        technique = catalogue().get(name).from_dict(fields)
    except (RecipeError, ImportError):
        return fields
    return {key: getattr(technique, key) for key in technique.__dataclass_fields__}  # type: ignore[attr-defined]


def step_title(step: Mapping[str, Any]) -> str:
    """Return the technique of a step with its most important fields: ``"gptq 4-bit g32"``."""
    fields = fields_with_defaults(step)
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
    """Return the steps of a recipe in a few words: ``"nm 2:4 + gptq 4-bit g32"``."""
    return " + ".join(step_title(step) for step in recipe.get("steps", ())) or "no steps"


def short_id(model: str) -> str:
    """Return the last part of a model id."""
    return Path(model).name or model

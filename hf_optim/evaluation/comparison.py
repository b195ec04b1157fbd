"""Measurements as tables: original, control and result beside each other, or everything that was measured on one model.

Cards and commands show the same rows with titles of their own. Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..trust.figures import format_count
from .reported import (
    REPORTED_METRICS,
    ReportedMetric,
    format_exact_bytes,
    has_hub_metrics,
    is_number,
    relative_change,
)
from .timings import SPREAD, is_hidden_by_noise, is_within_spread, noise_reason, spread_of

# What an evaluation returns besides, and what only `hf-optim eval` shows.
DETAILS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "task": ("task", str),
    "nll": ("negative log-likelihood (nats per token)", "{:.4f}".format),
    "tokens": ("tokens scored", format_count),
    "pairs": ("sentence pairs", format_count),
    "peak_host_bytes": ("peak memory of the process (bytes)", format_exact_bytes),
    "device": ("device", str),
    "time_rounds": ("rounds timed", format_count),
    "kernels": ("linear layers on kernels", str),
}
NO_CONTROL = "no control: a dense model trained alike was not measured"
# Columns of the table that compares measurements; "change" stands behind the side whose change it is.
CAPACITY = "experts with capacity factor"
"""Begins the ``kernels`` of a result whose experts have a capacity under ``optim_config="auto"``."""

BEFORE, CONTROL, AFTER, ACCELERATED = SIDES = ("before", "control", "after", "accelerated")
TERMINAL_TITLES = {
    "metric": "metric",
    BEFORE: "before",
    CONTROL: "trained alike",
    AFTER: "after",
    ACCELERATED: "after, on kernels",
    "change": "change",
}
CARD_TITLES = {
    "metric": "",
    BEFORE: "original",
    CONTROL: "original, trained alike",
    AFTER: "this checkpoint",
    ACCELERATED: "on hf_optim's kernels",
    "change": "change",
}
STOCK_TITLES = {TERMINAL_TITLES[AFTER]: "after, stock", CARD_TITLES[AFTER]: "this checkpoint, stock transformers"}
NOISE = "noise"
WITHIN_SPREAD = "within spread"


def comparison_columns(measured: Mapping[str, Any]) -> list[str]:
    """Return the keys of the columns of ``comparison_rows``: ``["metric", "before", "after", "change"]``, or more.

    A control that was measured stands before ``after``, the result on kernels and its change behind the others.
    """
    control = [CONTROL] if measured.get(CONTROL) else []
    kernels = [ACCELERATED, "change"] if measured.get(ACCELERATED) else []
    return ["metric", BEFORE, *control, AFTER, "change", *kernels]


def column_titles(measured: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Return the header of ``comparison_rows``: ``titles`` is ``TERMINAL_TITLES`` or ``CARD_TITLES``."""
    found = [titles[column] for column in comparison_columns(measured)]
    return [STOCK_TITLES.get(title, title) for title in found] if measured.get(ACCELERATED) else found


def comparison_rows(measured: Mapping[str, Any], trained: bool = False) -> list[list[str]]:
    """Return a row for each metric that one of the measurements has, with the columns of ``comparison_columns``.

    Without a control, the last row of a result that was ``trained`` says so: training on the data may improve a dense
    model as well.
    """
    columns = comparison_columns(measured)
    rows = []
    for metric in REPORTED_METRICS:
        values = [(measured.get(side) or {}).get(metric.key) for side in SIDES]
        if any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            rows.append([metric.label, *_cells(metric, columns[1:], measured)])
    evaluated = any(has_hub_metrics(measured.get(side) or {}) for side in (AFTER, ACCELERATED))
    if trained and CONTROL not in columns and evaluated:
        rows.append([NO_CONTROL, *("" if column == "change" else "-" for column in columns[1:])])
    return rows


def _cells(metric: ReportedMetric, columns: list[str], measured: Mapping[str, Any]) -> list[str]:
    cells, side = [], BEFORE
    for column in columns:
        if column == "change":
            cells.append(_change(metric, measured, side))
        else:
            side = column
            cells.append(_text(metric, measured, side))
    return cells


def _change(metric: ReportedMetric, measured: Mapping[str, Any], side: str) -> str:
    values = [(measured.get(name) or {}).get(metric.key) for name in (BEFORE, side)]
    if is_hidden_by_noise(measured, side, metric.key):
        return NOISE
    if is_within_spread(measured, side, metric.key):
        return WITHIN_SPREAD
    return relative_change(metric, *values)


def comparison_notes(measured: Mapping[str, Any], trained: bool = False) -> list[str]:
    """Return what a reader of ``comparison_rows`` must know: how times were measured, and what the columns are.

    Sentences of plain text, which may hold names from a record.
    """
    notes = []
    timed = [measured.get(side) or {} for side in (BEFORE, AFTER)]
    if all(any(is_number(values.get(key)) for key in SPREAD) for values in timed):
        notes += _time_notes(measured, timed[1])
    if accelerated := measured.get(ACCELERATED):
        kernels = accelerated.get("kernels")
        layers = f" (linear layers: {kernels})" if kernels else ""
        stock = "decodes the weights when it runs, and computes with the decoded ones"
        if CAPACITY in str(kernels):
            layers = f" ({kernels})"
            stock = "computes the experts without the capacity"
        notes.append(
            f'On hf_optim\'s kernels: the same checkpoint, loaded with optim_config="auto"{layers}. Stock '
            f"transformers {stock}"
        )
    if control := measured.get(CONTROL):
        name = control.get("name") or "a model"
        made = "" if control.get("trained") else ", a model that this recipe did not make"
        notes.append(f"The control is {name}{made}")
    elif trained and has_hub_metrics(measured.get(AFTER) or {}):
        notes.append(
            "Training on the data can improve a dense model as well: without a control, a change is what the "
            "techniques cost together with what the training gained (hf-optim compress --control train)"
        )
    return notes


def _time_notes(measured: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    timing = measured.get("timing")
    if not timing:
        return ["Times were measured on one model after the other, minutes apart: a rough figure on a busy machine"]
    rounds = after.get("time_rounds")
    what = f" ({timing['what']})" if timing.get("what") else ""
    order = "the models in turn in one process"
    if not timing.get("in_turn"):
        order = "one model after the other, since they did not fit on the device together"
    measured_in = "one round" if rounds == 1 else f"median ± half the interquartile range of {rounds} rounds"
    notes = [f"Times{what}: {measured_in}, {order}"]
    if reason := noise_reason(measured):
        hidden = any(is_hidden_by_noise(measured, side, key) for side in (AFTER, ACCELERATED) for key in SPREAD)
        meaning = f'. "{NOISE}" stands for a difference from the original\'s time that is no larger than the spread'
        notes.append(f"The host was noisy while times were measured: {reason}{meaning if hidden else ''}")
    return notes


def measurement_rows(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row ``(label, text)`` for everything that was measured on one model, for the terminal.

    A spread stands with its time, and what a peak memory is of with the memory; other keys of the measurement that
    have no label here (tasks of lm-eval) are named by themselves.
    """
    known = {metric.key: metric for metric in REPORTED_METRICS}
    sides = {BEFORE: measured}
    rows = []
    for key, value in measured.items():
        if key in SPREAD.values() or key == "peak_memory_of":
            continue
        if key == "peak_host_bytes" and value == measured.get("peak_memory_bytes"):
            continue
        if key in known:
            label = known[key].label
            if key == "peak_memory_bytes" and measured.get("peak_memory_of"):
                label = f"peak memory of the {measured['peak_memory_of']} (bytes)"
            rows.append((label, _text(known[key], sides, BEFORE)))
        else:
            label, written = DETAILS.get(key, (key.replace("_", " "), _plain_number))
            rows.append((label, "-" if value is None else written(value)))
    return rows


def _plain_number(value: Any) -> str:
    if is_number(value):
        return format_count(value) if isinstance(value, int) else f"{value:.4f}"
    return str(value)


def _text(metric: ReportedMetric, measured: Mapping[str, Any], side: str) -> str:
    values = measured.get(side) or {}
    value, iqr = values.get(metric.key), spread_of(values, metric.key)
    if not is_number(value):
        return "not finite" if isinstance(value, float) else "-"
    spread = f" ± {metric.format(iqr / 2)}" if iqr is not None else ""
    return metric.format(value) + spread

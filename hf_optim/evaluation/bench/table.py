"""The published page of a benchmark: tables per operator, with losing rows marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from .goals import Goal, decode_goal, goal_of, goals
from .results import Results, Row
from .roofline import roofline

FILE, PLOT = "README.md", "roofline.png"
HEADER = (
    "M", "contender", "graph us", "spread", "eager us", "host us", "% of floor", "x dense", "error", "goal", "lost to",
)  # fmt: skip


def publish(results: Results, directory: Path) -> list[Path]:
    """Write ``results.json``, the page and (if there is a time to draw) the plot; returns the files."""
    written = [results.save(directory)]
    if any(row.graph_us for row in results.rows):
        written.append(roofline(results, directory / PLOT))
    page = directory / FILE
    page.write_text(render(results, plot=len(written) > 1), encoding="utf-8")
    return [*written, page]


def render(results: Results, plot: bool = False) -> str:
    """The page in Markdown."""
    parts = ["# Kernels, measured", _about(results)]
    if plot:
        parts.append(f"![Time against the roofline]({PLOT})")
    lost = [row for row in results.rows if row.role == "ours" and (losers(row, results) or row.failure)]
    if results.rows:
        ours = [row for row in results.rows if row.role == "ours"]
        parts.append(
            f"{len(ours)} rows of ours; **{len(lost)}** of them failed or lose to something (last column). "
            f"{_goal_count(results)}"
        )
    if results.decode:
        parts += ["## End to end", _decode_table(results)]
    if results.prefill:
        parts += ["## Prefill", _prefill_table(results)]
    for op, rows in groupby(results.rows, key=lambda row: row.op):
        parts.append(f"## {op}")
        for (N, K, dtype), group in groupby(rows, key=lambda row: (row.N, row.K, row.dtype)):
            parts += [f"### N={N}, K={K}, {dtype}", _op_table(list(group), results)]
    parts.append(_method(results))
    if results.left_out:
        parts.append("## Left out\n\nThe time was spent before: " + "; ".join(results.left_out) + ".")
    return "\n\n".join(parts) + "\n"


def losers(row: Row, results: Results) -> list[str]:
    """The contenders of the same place that are not ours and were faster than ``row`` by more than 2 %.

    A peer that was faster than one of our formats counts only if it reads about as many bytes, or more.
    """
    if row.graph_us is None or row.role != "ours":
        return []
    rivals = [r for r in results.rows if r.place == row.place and r.role in ("dense", "peer") and r.graph_us]
    others = [r for r in rivals if r.bytes > 0.9 * row.bytes]
    return [r.contender for r in others if (r.graph_us or 0) * 1.02 < row.graph_us]


def dense_ratio(row: Row, results: Results) -> float | None:
    """Dense time over this one's: in graphs where both have been replayed, else eager."""
    dense = next((r for r in results.rows if r.place == row.place and r.role == "dense"), None)
    if dense is None:
        return None
    if dense.graph_us and row.graph_us:
        return dense.graph_us / row.graph_us
    return dense.eager_us / row.eager_us if dense.eager_us and row.eager_us else None


def _op_table(rows: Sequence[Row], results: Results) -> str:
    return _table(HEADER, [_cells(row, results) for row in rows])


def _cells(row: Row, results: Results) -> list[str]:
    name = f"**{row.contender}**" if row.role == "ours" else row.contender
    if row.failure:
        return [str(row.M), name, f"failed: {row.failure}", *[""] * (len(HEADER) - 3)]
    lost, goal = losers(row, results), goal_of(row, results)
    return [
        str(row.M),
        name,
        _number(row.graph_us, ".1f", "not capturable"),
        _number(row.spread, ".0%"),
        _number(row.eager_us, ".1f"),
        _number(row.host_us, ".1f"),
        _number(row.of_floor, ".0%"),
        _number(dense_ratio(row, results), ".2f"),
        _number(row.error, ".1e"),
        _goal_text(goal),
        f"**{', '.join(lost)}**" if lost else "",
    ]


def _decode_table(results: Results) -> str:
    header = (
        "model", "scheme", "cache", "batch", "ms a token", "overall", "device busy", "floor", "of floor", "weights GB",
        "peak GB", "warm-up s", "goal", "layers on",
    )  # fmt: skip
    rows = []
    for row in results.decode:
        if row.failure:
            rows.append([row.model, row.scheme, row.mode, str(row.batch), f"failed: {row.failure}", *[""] * 9])
            continue
        share = row.floor_ms / row.ms if row.floor_ms and row.ms else None
        kernels = ", ".join(f"{label} ({count})" for label, count in row.kernels.items())
        numbers = [
            _number(row.ms, ".2f"), _number(row.overall_ms, ".2f"), _number(row.gpu_ms, ".2f"),
            _number(row.floor_ms, ".2f"), _number(share, ".0%"), _number(row.weights_gb, ".2f"),
            _number(row.peak_gb, ".2f"), _number(row.warmup_s, ".1f"),
        ]  # fmt: skip
        goal = _goal_text(decode_goal(row, results))
        rows.append([row.model, row.scheme, row.mode, str(row.batch), *numbers, goal, kernels])
    return _table(header, rows)


def _prefill_table(results: Results) -> str:
    rows = []
    for row in results.prefill:
        of = [str(row.batch), str(row.tokens)]
        if row.failure:
            rows.append([row.model, row.scheme, *of, f"failed: {row.failure}", *[""] * 3])
            continue
        same = (row.model, row.batch, row.tokens)
        dense = [r.ms for r in results.prefill if r.scheme == "dense" and (r.model, r.batch, r.tokens) == same and r.ms]
        ratio = dense[0] / row.ms if dense and row.ms else None
        rate = row.batch * row.tokens / row.ms * 1e3 if row.ms else None
        numbers = [
            _number(row.ms, ".2f"), _number(rate, ".0f"), _number(ratio, ".2f"), _number(row.peak_gb, ".2f")
        ]  # fmt: skip
        rows.append([row.model, row.scheme, *of, *numbers])
    header = ("model", "scheme", "batch", "tokens", "ms", "tokens a second", "x dense", "peak GB")
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _about(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    driver = f", driver {results.driver}" if results.driver else ""
    copy = results.ceilings["copy"] / 1e6
    rates = ", ".join(f"{k} product {v / 1e6:.3g} TFLOP/s" for k, v in results.ceilings.items() if k != "copy")
    return (
        f"{results.device}{driver}; {results.date}; {versions}.\n\n"
        f"Ceilings measured in the same run: copy {copy:.3g} TB/s, {rates}.\n\n`{results.command}`"
    )


def _goal_count(results: Results) -> str:
    found = [goal for row in results.rows if (goal := goal_of(row, results))]
    met = sum(goal.met is True for goal in found)
    return f"Goals met: {met} of {len(found)} ({goals()['source']})." if found else ""


def _goal_text(goal: Goal | None) -> str:
    if goal is None:
        return ""
    verdict = {True: "met", False: "**missed**", None: "not measured"}[goal.met]
    return f"{goal.text}: {verdict}"


def _number(value: float | None, form: str, none: str = "") -> str:
    return none if value is None else format(value, form)


def _method(results: Results) -> str:
    cuda = "CUDA graph that goes over several copies of the weight, together three times the L2 cache, on random data"
    return (
        "## How this was measured\n\n"
        f"`graph us` is the median of 31 replays of a {cuda}, over the number of copies; `spread` the distance from "
        "its 10th to its 90th percentile, over the median. (On a CPU: wall-clock medians, without a graph.) "
        "`eager us`: the host launches each call, one behind the other. `host us`: until a call returns to the host. "
        "The floor is the longer of the bytes that the format must read over the copy bandwidth (read and write "
        "counted) and the operations over the rate of a large product. `x dense` above 1 is faster than the dense "
        "product. `error` is the norm of the difference to float64 over its norm; a peer's has the error of its own "
        "codes in it. A goal is in microseconds on the card it was set on, and elsewhere the share of the floor that "
        "it was there. `lost to`: what was faster in a graph by more than 2 %."
    )

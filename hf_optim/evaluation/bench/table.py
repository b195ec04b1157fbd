"""The published page of a benchmark: tables per operator, with a mark where another contender was faster."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ...runs.disk_errors import readable_disk_errors
from .goals import Goal, find_decode_goal, find_goal, load_goals
from .results import OpResult, Results
from .roofline import is_above_floor, roofline, rows_above_floor

FILE, PLOT = "README.md", "roofline.png"
HEADER = (
    "M", "contender", "graph us", "spread", "eager us", "host us", "% of floor", "x dense", "error", "goal", "lost to",
)  # fmt: skip


ABOVE = " †"
ABOVE_NOTE = (
    "†: faster than the floor, and above the lines of the roofline plot. The floor assumes that each call reads the "
    "weight from memory and computes at the rate of the large dense product. A weight that stays in a processor's "
    "caches between calls is read faster (those of a whole model do not fit there), and another shape, or a 2:4 sparse "
    "product, may be computed faster."
)


def publish(results: Results, directory: Path) -> list[Path]:
    """Write ``results.json``, the page and (if any row has a time) the plot; return the files."""
    with readable_disk_errors(directory, "the results"):
        written = [results.save(directory)]
        if any(row.graph_us for row in results.rows):
            written.append(roofline(results, directory / PLOT))
        page = directory / FILE
        page.write_text(render(results, plot=len(written) > 1), encoding="utf-8")
        return [*written, page]


def render(results: Results, plot: bool = False) -> str:
    """Return the page as Markdown; ``plot``: include the plot."""
    parts = ["# Kernel benchmarks", _environment(results)]
    if plot:
        parts.append(f"![Time against the roofline]({PLOT})")
    lost = [row for row in results.rows if row.role == "ours" and (faster_contenders(row, results) or row.failure)]
    if results.rows:
        ours = [row for row in results.rows if row.role == "ours"]
        parts.append(
            f"{len(ours)} rows of hf_optim; **{len(lost)}** of them failed or were slower than another (last column). "
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
        parts.append("## Left out\n\nThe time limit was reached before: " + "; ".join(results.left_out) + ".")
    return "\n\n".join(parts) + "\n"


def faster_contenders(row: OpResult, results: Results) -> list[str]:
    """Return the dense product and peers that were faster than ``row`` by more than 2 % on the same problem.

    A peer counts only if it reads about as many bytes, or more.
    """
    if row.graph_us is None or row.role != "ours":
        return []
    rivals = [
        r for r in results.rows if r.problem_key == row.problem_key and r.role in ("dense", "peer") and r.graph_us
    ]
    others = [r for r in rivals if r.bytes > 0.9 * row.bytes]
    return [r.contender for r in others if (r.graph_us or 0) * 1.02 < row.graph_us]


def speedup_over_dense(row: OpResult, results: Results) -> float | None:
    """Return the time of the dense product over that of ``row``: in graphs if both were replayed, else eager."""
    dense = next((r for r in results.rows if r.problem_key == row.problem_key and r.role == "dense"), None)
    if dense is None:
        return None
    if dense.graph_us and row.graph_us:
        return dense.graph_us / row.graph_us
    return dense.eager_us / row.eager_us if dense.eager_us and row.eager_us else None


def _op_table(rows: Sequence[OpResult], results: Results) -> str:
    return _table(HEADER, [_cells(row, results) for row in rows])


def _cells(row: OpResult, results: Results) -> list[str]:
    name = f"**{row.contender}**" if row.role == "ours" else row.contender
    if row.failure:
        return [str(row.M), name, f"failed: {row.failure}", *[""] * (len(HEADER) - 3)]
    lost, goal = faster_contenders(row, results), find_goal(row, results)
    return [
        str(row.M),
        name,
        _number(row.graph_us, ".1f", "not capturable"),
        _number(row.spread, ".0%"),
        _number(row.eager_us, ".1f"),
        _number(row.host_us, ".1f"),
        _share_of_floor(row.fraction_of_floor),
        _number(speedup_over_dense(row, results), ".2f"),
        _number(row.error, ".1e"),
        _goal_text(goal),
        f"**{', '.join(lost)}**" if lost else "",
    ]


def _decode_table(results: Results) -> str:
    header: tuple[str, ...] = (
        "model", "scheme", "cache", "batch", "ms per token", "overall", "device busy", "floor", "of floor",
        "weights GB", "peak GB", "warm-up s", "goal", "layers on",
    )  # fmt: skip
    first = header.index("warm-up s") if any(row.first_ms is not None for row in results.decode) else None
    if first is not None:
        header = (*header[:first], "first", *header[first:])
    rows = []
    for row in results.decode:
        if row.failure:
            rows.append(
                [row.model, row.scheme, row.mode, str(row.batch), f"failed: {row.failure}", *[""] * (len(header) - 5)]
            )
            continue
        share = row.floor_ms / row.ms if row.floor_ms and row.ms else None
        kernels = ", ".join(f"{label} ({count})" for label, count in row.kernels.items())
        numbers = [
            _number(row.ms, ".2f"), _number(row.overall_ms, ".2f"), _number(row.gpu_ms, ".2f"),
            _number(row.floor_ms, ".2f"), _share_of_floor(share), _number(row.weights_gb, ".2f"),
            _number(row.peak_gb, ".2f"), _number(row.warmup_s, ".1f"),
        ]  # fmt: skip
        if first is not None:
            numbers.insert(-1, _number(row.first_ms, ".1f"))
        goal = _goal_text(find_decode_goal(row, results))
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
    header = ("model", "scheme", "batch", "tokens", "ms", "tokens per second", "x dense", "peak GB")
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _environment(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    driver = f", driver {results.driver}" if results.driver else ""
    copy = results.ceilings["copy"] / 1e6
    rates = ", ".join(f"{k} product {v / 1e6:.3g} TFLOP/s" for k, v in results.ceilings.items() if k != "copy")
    return (
        f"{results.device}{driver}; {results.date}; {versions}.\n\n"
        f"Ceilings measured in the same run: copy {copy:.3g} TB/s, {rates}.\n\n`{results.command}`"
    )


def _goal_count(results: Results) -> str:
    found = [goal for row in results.rows if (goal := find_goal(row, results))]
    met = sum(goal.met is True for goal in found)
    return f"Goals met: {met} of {len(found)} ({load_goals()['source']})." if found else ""


def _goal_text(goal: Goal | None) -> str:
    if goal is None:
        return ""
    verdict = {True: "met", False: "**missed**", None: "not measured"}[goal.met]
    return f"{goal.text}: {verdict}"


def _number(value: float | None, form: str, none: str = "") -> str:
    return none if value is None else format(value, form)


def _share_of_floor(share: float | None) -> str:
    """Return the floor over a time in percent, with a mark (explained below the tables) if the time is shorter."""
    return _number(share, ".0%") + (ABOVE if is_above_floor(share) else "")


def _method(results: Results) -> str:
    graph = "CUDA graph that reads several copies of the weight, together three times the L2 cache, on random data"
    return (
        "## How this was measured\n\n"
        f"`graph us` is the median of 31 replays of a {graph}, over the number of copies; `spread` is the distance "
        "from its 10th to its 90th percentile, over the median. (On a CPU: wall-clock medians, without a graph.) "
        "`eager us`: the host launches one call after the other. `host us`: the time until a call returns to the host. "
        "The floor is the roofline bound: the longer of the bytes that the format must read over the copy bandwidth "
        "(reads and writes counted) and the operations over the rate of a large product. `x dense` above 1 is faster "
        "than the dense product. `error` is the norm of the difference to float64 over its norm; that of a peer "
        "includes its quantization error. A goal is in microseconds on the GPU it was set on, and on others the same "
        "fraction of the floor. `lost to`: the contenders that were faster in a graph by more than 2 %."
        + (f"\n\n{ABOVE_NOTE}" if rows_above_floor(results) else "")
    )

"""Write the page of learned attention on a GPU, with its plot, from what ``learned_attention.py`` has measured.

    python examples/gpu/learned_attention_page.py model_cards/kernels/learned_attention

The folder has records of the script, oldest first in ``RECORDS``; a later one is of later kernels. Those that are not
there are left out. ``check-h200.json`` and ``decoding-h200.json`` have errors and times of single tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# File -> what was measured. The script has put forward and step into one section, and now into one each.
RECORDS = {
    "h200.json": "in plain PyTorch, but for `performer`",
    "kernels-h200.json": "with kernels for hashed and sorted attention in their first form",
    "second-h200.json": "with these kernels after a second change; the run was cut after these",
    "learned_attention.json": "with the kernels of now",
}
DENSE, DENSE_CAUSAL = "sdpa", "sdpa, causal"
WHOLE_ROWS = ("linformer", "set_transformer")  # beside SDPA without a mask
NAMED = ("linformer", "performer", "rfa", "reformer, 4", "routing_transformer", "sinkhorn")  # by the goal
GOAL, SHOWN = 8192, (2048, 4096, 5120, 6144, 8192, 16384, 65536)
PARTS = {"forward": "forward_us", "step": "step_us"}
TEXT = """# Learned attention on a GPU

{device}, torch {torch}, triton {triton}, transformers 5.17; bfloat16, one row, 16 heads of 64, without padding. Microseconds of replayed CUDA graphs: forward / forward with all gradients; then the most memory of the latter, MiB. Written by
`examples/gpu/learned_attention_page.py` from what `examples/gpu/learned_attention.py` has measured. `linformer` and `set_transformer` are beside SDPA without a mask, the others beside causal SDPA. Outputs differ from float64 by at most
{output:.1e} and gradients by {gradients:.1e} (norm over norm, 1,024 tokens; [check-h200.json](check-h200.json)).

{sections}
![Time and memory by length](learned_attention.png)

A line of the plot is of the latest record that has it{older}.

Goals, by the latest record that has an attention at two lengths: linear families grow from 4,096 tokens on with a power of at most 1.1: {powers}. Faster than SDPA below 8,192 tokens: {verdict}.

## One token behind a context

[decoding-h200.json](decoding-h200.json), `examples/gpu/random_features.py decode`; 256 features of `performer`, 64 of `rfa`; microseconds, megabytes:

{decoding}

Time and memory of a token are constant for both, as the goal asks.
"""


def loaded(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records that there are: their versions, the rows by name and length, and kernels."""
    found = {}
    for name in RECORDS:
        if not (folder / name).exists():
            continue
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        rows: dict[str, dict[int, dict[str, Any]]] = {}
        for part in (record, *(record.get(each, {}) for each in ("times", "forward times", "step times"))):
            for attention, own in part.get("rows", {}).items() if isinstance(part, dict) else ():
                for length, row in own.items():
                    rows.setdefault(attention, {}).setdefault(int(length), {}).update(row)
        found[name] = {**record, "rows": rows}
    return found


def dense_of(attention: str) -> str:
    """Return the name of what an attention is beside."""
    return DENSE if attention.startswith((DENSE, *WHOLE_ROWS)) and attention != DENSE_CAUSAL else DENSE_CAUSAL


def times(rows: dict[str, Any], attention: str, part: str) -> dict[int, float]:
    """Return microseconds by length."""
    return {n: row[PARTS[part]] for n, row in sorted(rows.get(attention, {}).items()) if PARTS[part] in row}


def crossing(rows: dict[str, Any], attention: str, part: str) -> str:
    """Return between which measured lengths an attention becomes faster than SDPA, for good."""
    own, dense = times(rows, attention, part), times(rows, dense_of(attention), part)
    both = sorted(own.keys() & dense.keys())
    slower = [n for n in both if own[n] >= dense[n]]
    after = [n for n in both if n > max(slower, default=0)]
    if not both:
        return ""
    if not after:
        return f"none to {both[-1]:,}"
    return f"{after[0]:,}" + (f" (not {slower[-1]:,})" if slower else "")


def power(own: dict[int, float]) -> float | None:
    """Return the slope of log time over log length from 4,096 tokens on."""
    import math

    points = [(math.log(n), math.log(t)) for n, t in own.items() if n >= 4096]
    if len(points) < 2:
        return None
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def table(rows: dict[str, Any]) -> str:
    """Return a table of the lengths that are shown, with powers and crossings."""
    lengths = [n for n in SHOWN if any(n in own for own in rows.values())]
    lines = [
        "| attention | " + " | ".join(f"{n:,}" for n in lengths) + " | power | faster than SDPA from |",
        "|" + " --- |" * (len(lengths) + 3),
    ]
    for attention, own in rows.items():
        cells = []
        for n in lengths:
            row = own.get(n, {})
            cell = " / ".join(f"{row[key]:,.0f}" for key in PARTS.values() if key in row)
            cells.append(cell + (f", {row['step_bytes'] / 2**20:,.0f}" if "step_bytes" in row else ""))
        powers = [power(times(rows, attention, part)) for part in PARTS]
        crossings = [crossing(rows, attention, part) for part in PARTS if attention not in (DENSE, DENSE_CAUSAL)]
        told = (
            " / ".join(f"{p:.2f}" for p in powers if p is not None),
            " / ".join(each for each in crossings if each),
        )
        lines.append(f"| {attention} | " + " | ".join((*cells, *told)) + " |")
    return "\n".join(lines)


def kernels(record: dict[str, Any]) -> str:
    """Return the kernels that take most of a forward."""
    found = record.get("kernels")
    if not isinstance(found, dict):
        return ""
    lines = []
    for attention, recorded in found.items():
        rows = [row for row in recorded if row[2] > 0]  # calls of the host take no time of the device
        total = sum(us for _, _, us in rows)
        most = ", ".join(f"`{key.split('(')[0][:40]}` {us:,.0f} ({count})" for key, count, us in rows[:5])
        lines.append(f"- `{attention}`: {total:,.0f} in {sum(count for _, count, _ in rows)} launches: {most}")
    return "\nMicroseconds of kernels (and their launches) in a forward at 8,192 tokens:\n\n" + "\n".join(lines) + "\n"


def latest(records: dict[str, Any], attention: str, part: str) -> dict[str, Any] | None:
    """Return the rows of the last record with two lengths of an attention and of SDPA."""
    for record in reversed(records.values()):
        rows = record["rows"]
        if min(len(times(rows, each, part)) for each in (attention, dense_of(attention))) > 1:
            return rows
    return None


def verdicts(records: dict[str, Any]) -> dict[str, str]:
    """Return what the goals give, by the latest records."""
    names = [n for n in dict.fromkeys(n for r in records.values() for n in r["rows"]) if "sdpa" not in n]
    met, missed, powers = [], [], []
    for attention in names:
        rows = latest(records, attention, "forward")
        if rows is None:
            continue
        powers.append((power(times(rows, attention, "forward")) or 0.0, attention))
        if attention.startswith(NAMED):
            told = crossing(rows, attention, "forward")
            first = told.split(" ")[0].replace(",", "")
            (met if first.isdigit() and int(first) < GOAL else missed).append(f"{attention.split(',')[0]} from {told}")
    told = "; ".join(f"**{what}**: {', '.join(each)}" for what, each in (("met", met), ("missed", missed)) if each)
    above = [f"{name} {found:.2f}" for found, name in powers if found > 1.1]
    return {
        "verdict": told,
        "powers": f"missed by {', '.join(above)}" if above else f"all do, {max(powers)[0]:.2f} at most",
    }


def draw(records: dict[str, Any], path: Path) -> None:
    """Plot time and memory by length, each attention by the latest record that has it, in each panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8))
    names = list(dict.fromkeys(name for record in records.values() for name in record["rows"]))
    panels = [("forward", "forward_us", 1e-3), ("step", "step_us", 1e-3), ("step", "step_bytes", 2**-20)]
    for number, attention in enumerate(names):
        style = {"color": f"C{number}" if "sdpa" not in attention else "black", "marker": "o", "markersize": 3}
        style["linestyle"] = "--" if attention == DENSE else "-"
        for axis, (part, key, unit) in zip(axes, panels, strict=True):
            own = (latest(records, attention, part) or {}).get(attention, {})
            points = [(n, row[key] * unit) for n, row in sorted(own.items()) if key in row]
            axis.plot(*zip(*points, strict=True), label=attention, **style) if points else None
    titles = ("forward, ms", "forward and all gradients, ms", "most memory of the latter, MiB")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.set_xticks([1024, 4096, 16384, 65536], ["1k", "4k", "16k", "64k"])
        axis.grid(alpha=0.3)
    figure.suptitle("Learned attention on an H200: 16 heads of 64, bfloat16, one row")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8)
    figure.savefig(path, dpi=110)


def decoding(folder: Path) -> str:
    """Return the table of single tokens."""
    rows = json.loads((folder / "decoding-h200.json").read_text(encoding="utf-8"))["decode"]
    keys = list(rows[0])
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + " --- |" * len(keys)]
    for row in rows:
        cells = (
            f"{value / 1e6:.2f} MB" if "bytes" in key else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
            for key, value in row.items()
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(folder: Path, records: dict[str, Any]) -> str:
    """Return the text of the page, of the records of a folder."""
    errors = json.loads((folder / "check-h200.json").read_text(encoding="utf-8"))["check"].values()
    sections = "".join(
        f"## {what[0].upper() + what[1:]}\n\n[{name}]({name}):\n\n{table(records[name]['rows'])}\n{kernels(records[name])}\n"
        for name, what in reversed(RECORDS.items())
        if name in records
    )
    last = list(records.values())[-1]
    steps = any("step_us" in row for own in last["rows"].values() for row in own.values())
    return TEXT.format(
        **{key: last[key] for key in ("device", "torch", "triton")}, sections=sections, decoding=decoding(folder),
        output=max(each["output"] for each in errors), gradients=max(each["gradients"] for each in errors),
        older="" if steps else ": forwards are of other kernels than steps and memory", **verdicts(records),
    )  # fmt: skip


def main(folder: Path) -> None:
    """Write ``README.md`` and the plot."""
    records = loaded(folder)
    (folder / "README.md").write_text(page(folder, records), encoding="utf-8")
    draw(records, folder / "learned_attention.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the records, and gets the page and its plot")
    main(parser.parse_args().folder)

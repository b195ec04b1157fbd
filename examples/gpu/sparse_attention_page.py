"""Write the page of sparse attention on a GPU, with its plots, from what the two benchmarks have measured.

    python examples/gpu/sparse_attention_page.py model_cards/kernels/sparse_attention

The folder has ``sparse_attention.json`` of ``sparse_attention.py`` and ``sparse_encoders.json`` of
``sparse_encoders.py``; models under ``"of an earlier run"`` were kept from the record before.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

DENSE, FLEX = "dense (SDPA)", ", FlexAttention"
# Microseconds of the forward, as the work was begun with: what FlexAttention takes, and less where it is slow.
GOALS = {
    ("window 256", 4096): 44, ("window 256", 16384): 125, ("globals 64", 4096): 60, ("globals 64", 16384): 500,
    ("big bird", 4096): 60, ("big bird", 16384): 500, ("window 1024 causal", 16384): 993,
}  # fmt: skip
GOALS_MS = {4096: 2.0, 16384: 3.1}
# Ten colours of the field, and darker ones for more lines.
PALETTE = [f"C{i}" for i in range(10)] + ["navy", "darkgreen", "maroon", "black", "goldenrod"]
SHOWN = (1024, 4096, 16384, 65536, 131072)
TEXT = """# Sparse attention on a GPU

{device}, torch {torch}, triton {triton}, transformers 5.17; bfloat16, batch 1. Written by `examples/gpu/sparse_attention_page.py` from what `examples/gpu/sparse_attention.py` and
`examples/gpu/sparse_encoders.py` have measured. Outputs and gradients of the kernel differ from float64 by at most {error:.1e} (norm over norm); last hidden states of the encoders from those under a mask
in dense products by at most {hidden:.1e}. Tiles were chosen on the window and the causal window of 16,384 tokens; all other rows are held out.

## The kernel

Microseconds of a forward and of a forward with its backward, replayed as CUDA graphs. *share* is the pairs that are visible; *SDPA x share* is what dense attention would take for them. *least* is the longest
of what the blocks multiply, exponentiate and move. FlexAttention gets the same blocks of 128 and, where a pattern has an order, tokens that are permuted by the call.

{kernel}

{verdicts}

The first call of a process takes {first} s, with the backward {first_step} s (heads of 64, blocks of 64), compiled from nothing.

![Time of attention by length](sparse_attention.png)

## Encoders

An encoder of BERT-base width with four layers, in milliseconds: replayed CUDA graph, then an ordinary call, which on this host waits for Python below about 16,000 tokens (dense ones too), then the most memory
that a forward needs. Patterns have a window of 256 tokens a side or about as many keys. {growing}

{encoders}

Slower than the goals of 2.0 ms at 4,096 tokens and 3.1 ms at 16,384, replayed: {slow}. Ordinary calls at 4,096 tokens take {eager} ms, where dense attention takes {dense} ms: above the goal, for the host.

{called}![Time of encoders by length](sparse_encoders.png)
"""


def rows_of(path: Path) -> dict[str, Any]:
    """Return what a benchmark has written."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def kernel_table(times: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the table of shapes, and sentences that say which goals are met and missed."""
    rows, ratios, shares = [], [], []
    missed = []
    for key, row in times.items():
        heads, size, n, pattern = ast.literal_eval(key)
        causal = "causal" in pattern
        fair = row["sdpa"]["forward"] * row["share"] * (2 if causal else 1)
        ours, goal = row["ours 64"], GOALS.get((pattern, n))
        least = max(row["bounds"]["64"][name] for name in ("multiply", "exponentials", "bytes"))
        pair = lambda each: f"{each['forward']:.0f} / {each['step']:.0f}"  # noqa: E731
        rows.append([
            f"{heads} x {size}", f"{n:,}", pattern, f"{row['share']:.3f}", f"**{pair(ours)}**", pair(row["flex"]),
            pair(row["sdpa"]), f"{fair:.0f}", f"{least:.0f}", "" if goal is None else str(goal),
        ])  # fmt: skip
        name = f"{pattern} at {n:,}"
        if goal is not None and ours["forward"] > goal:
            missed.append(name)
        ratios.append((ours["step"] / ours["forward"] - 1, name))
        if n >= 16384:
            shares.append((ours["forward"] / fair, name))
    head = ["heads", "tokens", "pattern", "share", "ours", "FlexAttention", "SDPA", "SDPA x share", "least", "goal"]
    over = [f"{name} {ratio:.2f}" for ratio, name in sorted(shares, reverse=True) if ratio > 1.5]
    slow = [f"{name} {ratio:.1f}" for ratio, name in sorted(ratios, reverse=True) if ratio > 2.7]
    return table(head, rows), [
        f"- Slower than the goal: {', '.join(missed) or 'none'}.",
        f"- More than 1.5 times the share of SDPA's time from 16,384 tokens on: {', '.join(over) or 'none'}.",
        f"- A backward of more than 2.7 forwards: {', '.join(slow) or 'none'}.",
    ]


def encoder_table(times: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the table of encoders, and those over the goals."""
    rows, slow = [], []
    for name, by_length in times.items():
        cells = []
        for n in SHOWN:
            row = by_length.get(str(n), {})
            if "eager_ms" not in row:
                cells.append("")
                continue
            graph = row["graph_ms"]
            replayed = f"{graph:.2f}" if isinstance(graph, float) else "-"
            cells.append(f"{replayed} / {row['eager_ms']:.2f}, {row['peak_mib']:,.0f} MiB")
            known = name != DENSE and not name.startswith("stock") and FLEX not in name and isinstance(graph, float)
            if known and graph > GOALS_MS.get(n, graph):
                slow.append(f"{name} {graph:.2f} at {n:,}")
        rows.append([name, *cells])
    return table(["model", *(f"{n:,}" for n in SHOWN)], rows), slow


def called_text(called: dict[str, Any], patterns: list[str]) -> str:
    """Return the table of ordinary calls, and of calls of ``hf_optim.captured``, with what is over the goals.

    ``patterns`` are all that could have been called so: those that were not are named.
    """
    if not called:
        return ""
    lengths = sorted({int(n) for rows in called.values() for n in rows})
    rows: list[list[str]] = []
    slow, wrong = [], []
    for name, by_length in called.items():
        cells = []
        for n in lengths:
            row = by_length.get(str(n), {})
            cells.append(f"{row['eager_ms']:.2f} / {row['captured_ms']:.2f}" if "captured_ms" in row else "")
            if name != DENSE and row.get("captured_ms", 0) > GOALS_MS.get(n, 1e9):
                slow.append(f"{name} {row['captured_ms']:.2f} at {n:,}")
            if row.get("failure"):
                wrong.append(f"{name} ({row['failure']})")
        rows.append([name, *cells])
    worst = max(row["difference"] for each in called.values() for row in each.values() if "difference" in row)
    head = ["model", *(f"{n:,}" for n in lengths)]
    return (
        "As they are called, in milliseconds: `model(ids)`, and `hf_optim.captured(model)(ids)`, whose results differ by "
        f"at most {worst:.1e} (norm over norm).\n\n{table(head, rows)}\n\n"
        f"Over the goals, captured: {', '.join(slow) or 'none'}. Not captured: {', '.join(sorted(set(wrong))) or 'none'}. "
        f"Not measured in this way: {', '.join(name for name in patterns if name not in called) or 'none'}.\n\n"
    )


def growing_text(times: dict[str, Any], earlier: list[str]) -> str:
    """Return what patterns read more with the length, what FlexAttention gets, and which rows are older than the rest."""
    more = {
        "compressed": "`compressed` a window for each 16 tokens",
        "axial": "and `axial` the column of a grid of 256 columns in every other layer",
    }
    parts = ["With the length `strided` reads one in 128 keys more, `sparse_transformer` 8 in 128"]
    text = (
        ", ".join([*parts, *(each for name, each in more.items() if name in times)]) + ", so that they are not linear."
    )
    if any(FLEX in name for name in times):
        text += "\nFlexAttention gets the blocks of 128 that a mask touches; that of `strided` in its natural order touches all."
    else:
        text += " FlexAttention has no encoder here: above it stands beside the kernel."
    if earlier:
        text += f" Of an earlier run, with the same versions: {', '.join(earlier)}."
    return text


def series_of_kernel(lengths: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, microseconds) by line."""
    found: dict[str, dict[int, float]] = {}
    for key, row in lengths.items():
        name, n = key.rsplit(" ", 1)
        for label, time in (
            (name, row["ours 64"]["forward"]),
            (name + FLEX, row.get("flex", {}).get("forward")),
            (DENSE, row["sdpa"]["forward"]),
        ):
            if isinstance(time, float) and time == time:
                found.setdefault(label, {})[int(n)] = time
    return {label: sorted(points.items()) for label, points in found.items()}


def series_of_encoders(times: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, milliseconds) by line: replayed, ordinary calls of transformers' own sparse classes."""
    found = {}
    for name, by_length in times.items():
        way = "eager_ms" if name.startswith("stock") else "graph_ms"
        points = [(int(n), row[way]) for n, row in by_length.items() if isinstance(row.get(way), float)]
        found[name] = sorted(points)
    return found


def draw(series: dict[str, list[tuple[int, float]]], title: str, unit: str, target: Path) -> None:
    """Write a plot of times by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 6), dpi=150)
    colours: dict[str, str] = {}
    for label, points in series.items():
        xs, ys = zip(*points, strict=True)
        own = label.removesuffix(FLEX)
        if own not in colours:
            colours[own] = "black" if own == DENSE else PALETTE[len(colours) % len(PALETTE)]
        dashed = label != own or label.startswith("stock")
        axes.plot(
            xs, ys, "--" if dashed else "-", marker="os^Dv"[len(colours) % 5], ms=3.5, color=colours[own], label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
    axes.set_xscale("log", base=2)
    ticks = sorted({n for points in series.values() for n, _ in points})
    axes.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=1 + (len(series) > 10))
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def page(kernel: dict[str, Any], encoders: dict[str, Any]) -> str:
    """Return the text of the page, of what the two benchmarks have written."""
    (shapes, verdicts), (layers, slow) = kernel_table(kernel["times"]), encoder_table(encoders["times"])
    first = kernel["first call"]["64 64"]
    at = "4096"
    techniques = [name for name in encoders["check"] if name in encoders["times"] and FLEX not in name]
    ours = [encoders["times"][name][at]["eager_ms"] for name in techniques]
    return TEXT.format(
        device=kernel["device"],
        torch=kernel["torch"],
        triton=kernel["triton"],
        error=max(max(each) for each in kernel["check"]["worst"].values()),
        hidden=max(encoders["check"].values()),
        kernel=shapes,
        verdicts="\n".join(verdicts),
        first=first[0],
        first_step=first[1],
        growing=growing_text(encoders["times"], encoders.get("of an earlier run", [])),
        encoders=layers,
        slow=", ".join(slow) or "none",
        called=called_text(encoders.get("called", {}), techniques),
        eager=f"{min(ours):.1f} to {max(ours):.1f}",
        dense=f"{encoders['times'][DENSE][at]['eager_ms']:.1f}",
    )


def main(folder: Path) -> None:
    """Write ``README.md`` and the plots."""
    kernel, encoders = rows_of(folder / "sparse_attention.json"), rows_of(folder / "sparse_encoders.json")
    (folder / "README.md").write_text(page(kernel, encoders), encoding="utf-8")
    title = f"Attention of 12 heads x 64, bfloat16, {kernel['device']}"
    draw(series_of_kernel(kernel["lengths"]), title, "microseconds, forward", folder / "sparse_attention.png")
    title = f"Encoders of BERT-base width, 4 layers, bfloat16, {encoders['device']}"
    draw(series_of_encoders(encoders["times"]), title, "milliseconds, forward", folder / "sparse_encoders.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the records, and gets the page and its plots")
    main(parser.parse_args().folder)

"""Draw the section ``lengths`` of ``sparse_attention.json`` as a PNG beside it.

python examples/gpu/sparse_attention_plot.py FOLDER/sparse_attention.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def series(lengths: dict) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, microseconds) by line: the faster block of ours, FlexAttention by pattern, and dense attention."""
    found: dict[str, list[tuple[int, float]]] = {}
    for key, row in lengths.items():
        name, n = key.rsplit(" ", 1)
        mine = [each["forward"] for way, each in row.items() if way.startswith("ours")]
        times = {name: min((t for t in mine if isinstance(t, float)), default=None)}
        times |= {f"{name}, FlexAttention": row.get("flex", {}).get("forward"), "dense (SDPA)": row["sdpa"]["forward"]}
        for label, time in times.items():
            if isinstance(time, float) and time == time:
                points = found.setdefault(label, [])
                if (int(n), time) not in points:
                    points.append((int(n), time))
    return found


def draw(path: Path) -> Path:
    """Write ``<path>.png`` and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(8, 5.5), dpi=150)
    colours: dict[str, str] = {}
    for label, points in series(result["lengths"]).items():
        xs, ys = zip(*sorted(points), strict=True)
        pattern = label.removesuffix(", FlexAttention")
        if pattern not in colours:
            colours[pattern] = "black" if "dense" in label else f"C{len(colours)}"
        axes.plot(xs, ys, "--" if label != pattern else "-", marker="o", ms=3.5, color=colours[pattern], label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds, forward")
    axes.set_xscale("log", base=2)
    ticks = sorted({int(key.rsplit(" ", 1)[1]) for key in result["lengths"]})
    axes.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axes.set_title(f"Attention of 12 heads x 64, bfloat16, {result['device']}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target)
    plt.close(figure)
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))

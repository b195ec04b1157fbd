"""Plot the time of a token against the bytes that it moves, from the records of offloading.

python examples/offload_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

HOME = Path(__file__).resolve().parent.parent / "model_cards" / "measurements"


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    gpu = json.loads((HOME / "offload-h200.json").read_text(encoding="utf-8"))
    cpu = json.loads((HOME / "offload-cpu.json").read_text(encoding="utf-8"))
    dense, packed, disk = gpu["8B"]["pinned"], gpu["W4A16"]["pinned"], gpu["disk"]
    points = {
        "8B, bfloat16": (dense["streamed_bytes"], dense["ms_per_token"], "tab:blue", "o"),
        "8B, W4A16": (packed["streamed_bytes"], packed["ms_per_token"], "tab:blue", "s"),
        "8B, accelerate": (dense["streamed_bytes"], gpu["accelerate"]["ms_per_token"], "tab:red", "o"),
        "8B from disk": (disk["disk_bytes"], disk["ms_per_token"], "tab:green", "o"),
        **{
            f"2.5 GB on a CPU, {budget}": (row["streamed_bytes"], row["ms_per_token"], "tab:orange", "^")
            for budget, row in cpu["rows"].items()
            if "streamed_bytes" in row
        },
    }
    figure, axes = plt.subplots(figsize=(7, 4.5))
    line = [1e9, 2e10]
    for rate, label in (
        (dense["link_gb_s"], "link, measured"),
        (disk["disk_gb_s"], "disk of the GPU machine, measured"),
    ):
        axes.plot([b / 1e9 for b in line], [b / rate / 1e6 for b in line], "--", color="gray", linewidth=1)
        axes.annotate(f"{label}: {rate:.1f} GB/s", (line[0] / 1e9, line[0] / rate / 1e6 * 1.1), fontsize=7)
    for name, (size, time, color, marker) in points.items():
        axes.scatter(size / 1e9, time, color=color, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="GB moved for a token", ylabel="ms for a token")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HOME / "offload.png", dpi=110)


if __name__ == "__main__":
    main()

"""Fit the choice of products with packed weights again, and time it on layers that the fit has not seen (section 3).

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/layers_of_any_shape.py [--limit 230]
        [--kernels specialized library] [--ops w4a16 w8a16]

In this order, each in a process that ends at its share of the limit:

1. tests of the kernels for warp groups; configurations are compared with float64 again before they are timed, so that a failure
   does not end this (the specialized kernel is left out if a test hangs); those of the other kernels run last;
2. every configuration of ``--kernels`` on the shapes that the choice is fitted to: ``sweep.json``;
3. the fit to these times and those on record (``model_cards/kernels/sweeps``): ``choice.json``, and what the choice loses on a
   shape that is left out of the fit: ``calibrate.txt``. Copied to ``kernels/hf_optim_kernels/common/tables/choice.json`` it ships;
4. layers that neither the fit nor a table has seen, beside the dense product, in the configurations of that fit: ``held-out.json``
   and, as a table, ``held-out.md``, with the times on record (``model_cards/kernels/layers``) as a second number.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", ".")).resolve()
RECORD = ROOT / "model_cards/kernels/layers/h200.json"
SWEEPS = sorted((ROOT / "model_cards/kernels/sweeps").glob("*.json"))
FITTED = ("14336x4096", "4096x4096", "4096x14336", "2560x9728", "8192x2048", "28672x4096")
HELD_OUT = ("3584x3584", "4608x3584", "5120x5120", "3584x18944", "37888x3584", "10240x8192")
TESTS, OTHERS = ("wide_kernels",), ("llm_int8", "w8a8", "wna16")
LEVEL = 0.97


def run(name: str, seconds: float, *command: str) -> int:
    """Run a command of this Python for at most ``seconds``; return its status (124: it was stopped)."""
    begin, path = time.monotonic(), OUT / f"{name}.txt"
    print(f"== {name}", flush=True)
    with path.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OUT": str(OUT)},
        )  # fmt: skip
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    said = path.read_text(encoding="utf-8")
    print(said[-5000:], f"{name}: status {status}, {time.monotonic() - begin:.0f} s", sep="\n", flush=True)
    return status


def tests_of(names: tuple[str, ...]) -> list[str]:
    """Return the command of tests that need a card, in several processes if there are as many cores and pytest can."""
    many = (os.cpu_count() or 1) >= 12 and importlib.util.find_spec("xdist")
    files = [str(ROOT / f"tests/kernels/test_{name}.py") for name in names]
    return ["-m", "pytest", "-q", "-m", "gpu", *(["-n", "12"] if many else []), *files]


def table(cells: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    """Return a Markdown table of ratios to dense, now and on record, and lines about their distribution."""

    def ratio_of(cell: dict[str, Any]) -> float:
        return cell["dense_us"] / cell["us"] if isinstance(cell.get("us"), float) else 0.0

    old = {(c["op"], c["N"], c["K"], c["M"]): ratio_of(c) for c in before}
    rows, lines = sorted({cell["M"] for cell in cells}), []
    lines += [f"| layer | product | {' | '.join(map(str, rows))} |", "|---" * (2 + len(rows)) + "|"]
    found = {(c["op"], c["N"], c["K"], c["M"]): c for c in cells}
    for op, N, K in sorted({key[:3] for key in found}):
        line = []
        for M in rows:
            cell = found.get((op, N, K, M))
            was = old.get((op, N, K, M))
            now = "-" if cell is None else f"{ratio_of(cell):.2f}" if ratio_of(cell) else str(cell["us"])[:40]
            line.append(now if was is None else f"{now} ({was:.2f})")
        lines.append(f"| {N} x {K} | {op} | {' | '.join(line)} |")
    lines.append("")
    for op in sorted({cell["op"] for cell in cells}):
        mine = {key: ratio_of(cell) for key, cell in found.items() if key[0] == op}
        for label, values in (
            ("now", list(mine.values())),
            ("now, cells on record", [value for key, value in mine.items() if key in old]),
            ("on record", [old[key] for key in mine if key in old]),
        ):
            if values:
                values.sort()
                share = sum(value >= LEVEL for value in values) / len(values)
                lines.append(
                    f"- {op}, {label}: {len(values)} cells, median {statistics.median(values):.2f}, tenth percentile "
                    f"{values[len(values) // 10]:.2f}, worst {values[0]:.2f}, at {LEVEL} or above {share:.0%}"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--limit", type=float, default=230.0, help="seconds for everything")
    parser.add_argument("--kernels", nargs="+", default=["specialized", "library"])
    parser.add_argument("--ops", nargs="+", default=["w4a16", "w8a16"], help="products that are fitted again")
    parser.add_argument("--untested", action="store_true", help="skip the tests")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    left = lambda: options.limit - (time.monotonic() - begin)  # noqa: E731
    if not options.untested and run("tests", 0.25 * options.limit, *tests_of(TESTS)) == 124:
        print("a test did not end: the specialized kernel is not timed", flush=True)
        options.kernels = [kernel for kernel in options.kernels if kernel != "specialized"]
    module = "hf_optim_kernels.common"
    run("sweep", 0.5 * left(), "-m", f"{module}.sweep", "--budget", f"{0.46 * left():.0f}", "--ops", *options.ops,
        "--only", *options.kernels, "--shapes", *FITTED, "--rows", "128", "256", "512", "1024", "4096", "2048")  # fmt: skip
    choice, times = OUT / "choice.json", [str(path) for path in SWEEPS]
    if (OUT / "sweep.json").is_file():
        times.append(str(OUT / "sweep.json"))
    run("calibrate", 60, "-m", f"{module}.calibrate", *times, "--out", str(choice))
    run("held-out", 0.8 * left(), "-m", f"{module}.held_out", "--budget", f"{0.74 * left():.0f}", "--choice", str(choice),
        "--shapes", *HELD_OUT, "--rows", "128", "256", "64", "512", "1024", "16", "4096", "8192",
        "--ops", *options.ops, "w8a8-int8", "llm-int8", "w8a8-float8", "sparse24")  # fmt: skip
    if (OUT / "held-out.json").is_file():
        cells = json.loads((OUT / "held-out.json").read_text(encoding="utf-8"))["cells"]
        page = table(cells, json.loads(RECORD.read_text(encoding="utf-8"))["cells"])
        (OUT / "held-out.md").write_text(page, encoding="utf-8")
        print(page, flush=True)
    if not options.untested:
        run("tests-others", left(), *tests_of(OTHERS))
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The goals of decoding at the speed of memory, and the page of ``decode_at_memory_speed.py`` against them.

Figures come from the results of that script's parts; a part that a run did not measure is taken from the record of an
earlier one (``RECORDS``), and the page says so. Nothing is rounded in a goal's favour, and what is missed is on the
page with what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Where the figures of a part are kept, once they have been measured.
RECORDS = {
    "steps": "model_cards/measurements/generate-h200.json",
    "long": "model_cards/measurements/generate-h200.json",
    "attention": "model_cards/measurements/kv-cache-h200.json",
    "memory": "model_cards/measurements/kv-cache-h200.json",
    "layers": "model_cards/kernels/layers/h200.json",
    "peers": "model_cards/kernels/results.json",
}
# Milliseconds a token: weights and batch, at 128 tokens of context, 32 layers.
STEPS = {
    ("w4a16", 1): 2.6, ("w4a16", 8): 3.2, ("w8a8", 1): 3.7, ("w8a8", 8): 4.1, ("2:4-w4a16", 1): 2.5, ("dense", 1): 5.5,
}  # fmt: skip
# Milliseconds a token of 8 dense layers: batch and tokens of context.
LONG = {(1, 30_000): 1.5, (8, 8_000): 2.0}
SHAPES = ("1 x 32k", "16 x 8k", "16 x 32k")
# Share of the bandwidth of a copy, on these shapes; and times as fast as 16 bits, on the last.
SHARE, FASTER = 0.85, {"int8": 1.7, "int4": 2.8}
# Bytes that a cache may hold over its format's share of 16 bits.
PROPORTION = 1.1
LEVEL = 0.97  # of the dense product
COMPILED, CAPTURED, STATIC, DYNAMIC = "captured and compiled", "captured", "stock, static cache", "stock, dynamic cache"
EAGER = "stock, static cache, not compiled"
WAYS = {"graph": COMPILED, "captured": CAPTURED, "static": STATIC, "static-eager": EAGER, "dynamic": DYNAMIC}
Results = dict[str, dict[str, Any]]


class Goal(NamedTuple):
    """A goal, and what was found; ``least``: found must be at least the limit, otherwise at most."""

    section: int
    what: str
    limit: float
    unit: str
    least: bool
    found: float | None

    @property
    def verdict(self) -> str:
        """Return `met`, or by how much the goal was missed."""
        if self.found is None:
            return "not measured"
        over = self.found / self.limit - 1
        if (over >= 0) if self.least else (over <= 0):
            return "met"
        return f"**missed** by {abs(over):.1%}"


def results_of(run: Results) -> tuple[Results, dict[str, str]]:
    """Return the results of every part, of a run or on record, and where each is from, with the ``tree`` it names.

    Steps that a run has not reached (``generate.py`` may end early) are those on record, and named so in the tables.
    """
    found, where = {}, {}
    for part in (*RECORDS, "long-static", "caches"):
        if part in RECORDS:
            kept = json.loads((ROOT / RECORDS[part]).read_text(encoding="utf-8"))
            on_record = f"[on record](../../{RECORDS[part]}){tree_of(kept)}"
        if part in run:
            found[part], where[part] = run[part], f"this run{tree_of(run[part])}"
            if part == "long" and (missing := lacking(run[part], kept)):
                found[part] = {**run[part], "rows": [*rows_of(run[part]), *missing]}
                where[part] += f", and what it has not, {on_record}"
        elif part in RECORDS:
            found[part], where[part] = kept, on_record
    return found, where


def tree_of(result: dict[str, Any]) -> str:
    """Return in brackets of which kernels a result is, if it says so."""
    return f" ({result['tree']})" if "tree" in result else ""


def lacking(result: dict[str, Any], kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of eight layers on record that ``result`` has not, marked with ``on_record``."""
    fields = ("scheme", "batch", "prompt", "vocabulary", "way")
    own = {tuple(row[field] for field in fields) for row in rows_of(result)}
    rows = [row for row in rows_of(kept) if row.get("layers") == 8]
    return [{**row, "on_record": True} for row in rows if tuple(row[field] for field in fields) not in own]


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of ``generate.py``, of a run or on record, with the same names of ways."""
    rows = [row for row in result.get("rows", result.get("generate", [])) if "ms_per_token" in row]
    filled = [{"vocabulary": 128_256, "prompt": result.get("prompt", 128), **row} for row in rows]
    return [{**row, "way": WAYS.get(row["way"], row["way"])} for row in filled]


def row_of(result: dict[str, Any], way: str, **wanted: Any) -> dict[str, Any]:
    """Return the first row that has all the wanted fields; an empty one if there is none."""
    rows = (row for row in rows_of(result) if row["way"] == way)
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), {})


def step_of(result: dict[str, Any], way: str, **wanted: Any) -> float | None:
    """Return the milliseconds of the first row that has all the wanted fields."""
    return row_of(result, way, **wanted).get("ms_per_token")


def ratios(cells: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, int, str]]]:
    """Return of each product the times of the dense product over its own, with rows and layer, slowest first."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    for cell in cells:
        if isinstance(cell["us"], float):
            ratio = cell["dense_us"] / cell["us"]
            found.setdefault(cell["op"], []).append((ratio, cell["M"], f"{cell['N']} x {cell['K']}"))
    return {op: sorted(each) for op, each in found.items()}


def copy_of(results: Results) -> float | None:
    """Return the bandwidth of a copy in TB/s, of the run that timed attention, else on record."""
    return results["attention"].get("copy_tb_per_s") or results["steps"].get("copy_tb_per_s")


def goals(results: Results) -> list[Goal]:
    """Return every goal with its figure."""
    made = [
        Goal(1, f"{scheme}, batch {batch}: ms a token", limit, "ms", False,
             step_of(results["steps"], COMPILED, scheme=scheme, batch=batch, layers=32))
        for (scheme, batch), limit in STEPS.items()
    ]  # fmt: skip
    # Without torch.compile, stock is what it is without; below stock with it is more than the goal asks.
    for scheme in ("dense", "w4a16", "w8a8"):
        for way, name in ((EAGER, "not compiled"), (STATIC, "compiled")):
            stock = step_of(results["steps"], way, scheme=scheme, batch=1, layers=32)
            if stock is not None:
                found = step_of(results["steps"], CAPTURED, scheme=scheme, batch=1, layers=32)
                made.append(Goal(1, f"{scheme}, batch 1, not compiled: below stock, {name}", stock, "ms", False, found))
    copy, times = copy_of(results), results["attention"].get("times", {})
    for shape in SHAPES:
        rate = times.get(shape, {}).get("bf16 kernel", times.get(shape, {}).get("bf16 kernel, before", {})).get("tb_s")
        share = rate / copy if rate and copy else None
        made.append(Goal(2, f"attention to 16 bits, {shape}: share of a copy", SHARE, "", True, share))
    for (batch, tokens), limit in LONG.items():
        for vocabulary in (32_000, 128_256):
            row = row_of(results["long"], COMPILED, batch=batch, prompt=tokens, vocabulary=vocabulary)
            if row or vocabulary == 128_256:
                what = f"8 layers, {batch} x {tokens:,} tokens, {vocabulary:,} words: ms a token"
                what += " (on record)" if row.get("on_record") else ""
                made.append(Goal(2, what, limit, "ms", False, row.get("ms_per_token")))
    for name, limit in FASTER.items():
        found = times.get(SHAPES[-1], {}).get(name, {}).get("times_bf16")
        made.append(Goal(2, f"attention to {name}, {SHAPES[-1]}: times 16 bits", limit, "x", True, found))
    made += list(proportions(results["memory"].get("generate", {})))
    for op, each in ratios(results["layers"].get("cells", [])).items():
        worst, rows, layer = each[0]
        made.append(Goal(3, f"{op}: worst of dense ({layer}, {rows} rows)", LEVEL, "x", True, worst))
    return made


def proportions(rows: dict[str, Any]) -> Iterable[Goal]:
    """Yield the goals of memory: what a cache holds over 16 bits, by its bytes over those of 16 bits."""
    for batch, length in LONG:
        start = f"{batch} x {length}, "
        own = {name[len(start) :].split(" ")[0]: row for name, row in rows.items() if name.startswith(start)}
        base = own.get("16", {})
        for bits in ("8", "float8", "4"):
            row = own.get(bits, {})
            if "held_gib" in row and "held_gib" in base:
                share = row["held_gib"] / base["held_gib"] / (row["cache_gib"] / base["cache_gib"])
                yield Goal(
                    2, f"memory of {bits} bits, {batch} x {length:,}: of its share", PROPORTION, "x", False, share
                )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    titles = [str(title) for title in head]
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: Any, digits: int = 2) -> str:
    """Return a number of a table; a dash for none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def page(run: Results, about: dict[str, Any]) -> str:
    """Return the page: every goal, then the figures of each section beside others'."""
    results, where = results_of(run)
    made = goals(results)
    met = sum(goal.verdict == "met" for goal in made)
    found = [
        (goal.section, goal.what, f"{'>=' if goal.least else '<='} {goal.limit:g} {goal.unit}".strip(),
         number(goal.found, 3), goal.verdict) for goal in made
    ]  # fmt: skip
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "transformers") if name in about)
    parts = [
        "# Decoding at the speed of memory",
        f"{about.get('device', 'No device')}{f' ({versions})' if versions else ''}. `examples/gpu/decode_at_memory_speed.py` checks, "
        "then times; this page is what it writes. Sections: 1 `hf_optim.generate`, 2 the key/value cache and its attention, "
        "3 layers of shapes in no table.",
        "Figures: " + "; ".join(f"{part}: {text}" for part, text in where.items()) + ".",
        checks(run),
        f"## Goals\n\n{met} of {len(made)} met.\n\n" + table(("section", "goal", "limit", "found", ""), found),
        steps(results), attention(results), layers(results), peers(results),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def checks(run: Results) -> str:
    """Return which checks ran before the times."""
    rows = [(name, each["status"], each["said"]) for name, each in run.get("checks", {}).items()]
    if not rows:
        return "No checks ran with this page."
    return "## Checks\n\n" + table(("tests", "", "said"), rows)


def steps(results: Results) -> str:
    """Return the tables of ``generate``."""
    ways = (EAGER, STATIC, CAPTURED, COMPILED)
    lines = []
    for scheme, batch in (("dense", 1), ("dense", 8), *[key for key in STEPS if key[0] != "dense"]):
        wanted = {"scheme": scheme, "batch": batch, "layers": 32}
        lines.append((scheme, batch, *(number(step_of(results["steps"], way, **wanted), 3) for way in ways)))
    text = "## 1. `hf_optim.generate`\n\nMilliseconds a token, Llama-3-8B's shape, 128 tokens of context.\n\n"
    return text + table(("weights", "batch", *ways), lines)


def attention(results: Results) -> str:
    """Return the tables of the cache."""
    times, copy = results["attention"].get("times", {}), copy_of(results)
    names = list(dict.fromkeys(name for shape in SHAPES for name in times.get(shape, {})))
    lines = []
    for name in names:
        cells = [times.get(shape, {}).get(name, {}) for shape in SHAPES]
        lines.append((name, *(f"{number(c.get('us'), 1)} ({number(c.get('times_bf16'))})" if "us" in c else "-"
                              for c in cells), number(cells[-1].get("tb_s"))))  # fmt: skip
    text = "## 2. The key/value cache\n\nMicroseconds of one attention, 32 heads over 8 of 128; in brackets, times as fast as "
    text += f"the kernel of 16 bits. A copy: {number(copy)} TB/s.\n\n"
    text += table(("cache", *SHAPES, "TB/s of the last"), lines)
    rows = [row for part in ("long", "long-static") for row in rows_of(results.get(part, {})) if row.get("layers") == 8]
    cells = [
        (f"{row['batch']} x {row['prompt']:,}", f"{row['vocabulary']:,}",
         row["way"] + (", on record" if row.get("on_record") else ""), number(row["ms_per_token"], 3))
        for row in rows
    ]  # fmt: skip
    text += "\nEight dense layers of that width, ms a token.\n\n" + table(("context", "words", "way", "ms"), cells)
    named = {name: each for name, each in results.get("caches", {}).items() if isinstance(each, dict)}
    if named:
        ways = [(name, number(each.get("ms_token")), number(each.get("peak_gib")), each.get("failed", ""))
                for name, each in named.items()]  # fmt: skip
        text += "\nBeside transformers' own quantized caches, the same layers, 1 x 8,000.\n\n"
        return text + table(("cache", "ms a token", "GiB", ""), ways)
    return text + "\nTransformers' own quantized caches in `generate`: not measured on this device.\n"


def layers(results: Results) -> str:
    """Return the table of layers: of each product and number of rows, the share at ``LEVEL`` and the worst."""
    found = ratios(results["layers"].get("cells", []))
    rows = sorted({m for each in found.values() for _, m, _ in each})
    lines = []
    for op, each in found.items():
        cells = []
        for m in rows:
            own = [ratio for ratio, M, _ in each if m == M]
            cells.append(f"{sum(r >= LEVEL for r in own)}/{len(own)} ({min(own):.2f})" if own else "-")
        lines.append((op, *cells))
    text = f"## 3. Layers of any shape\n\nLayers at {LEVEL} of the dense product or faster, of those measured, and the slowest, "
    text += "by rows. 3-bit codes run on the kernel of w4a16.\n\n"
    return text + table(("product", *rows), lines)


def peers(results: Results) -> str:
    """Return the table of other libraries' products."""
    rows = [row for row in results["peers"].get("rows", []) if row["N"] == 14336]
    lines = []
    for key in dict.fromkeys((row["op"], row["M"]) for row in rows):
        own = [row for row in rows if (row["op"], row["M"]) == key]
        time = lambda row: row["graph_us"] or row["eager_us"]  # noqa: E731
        timed = {role: sorted((time(r), r["contender"]) for r in own if r["role"] == role and time(r))
                 for role in ("ours", "dense", "peer")}  # fmt: skip
        if timed["ours"]:
            dense = timed["dense"][0][0] if timed["dense"] else None
            others = "; ".join(f"{name} {us:.1f}" for us, name in timed["peer"])
            mine = "; ".join(f"{name} {us:.1f}" for us, name in timed["ours"])
            lines.append((*key, mine, number(dense, 1), others or "-"))
    missing = results["peers"].get("missing", [])
    text = "### Beside other libraries\n\nMicroseconds, 14336 x 4096, replayed graphs (eager where a graph cannot be captured)."
    text += f" Not installed in this run: {', '.join(missing)}.\n\n" if missing else "\n\n"
    return text + table(("operator", "rows", "hf_optim", "dense", "others"), lines)

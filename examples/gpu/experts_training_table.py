"""What the page of the experts' kernels says of training, of the launches of whole layers, and of a token's kernels.

``experts_table.py`` writes the page. ``training-h200.json`` is what ``experts.py training outer launches`` has
measured; without it, or for the sections that it does not have, the page has none of this.
"""

from __future__ import annotations

CHECK = """## Training

Gradients differ from float64 by at most {error:.1e} (norm over norm, bfloat16; {shapes}, {tokens} tokens, with pairs that no expert computes; [training-h200.json](training-h200.json)), and two runs have
{bits} bits.

"""
STEPS = """Microseconds of forward and backward of a layer, with the gradients of hidden states, gates and matrices, or without those of matrices (*frozen*); `examples/gpu/experts.py training outer launches`.
*Replayed* is one CUDA graph of both directions; the others include the host.

{steps}

Slower than transformers' `grouped_mm`: {losing}.{note}

"""
OUTER = """The sum of outer products that is the gradient of a first matrix, microseconds by tiles (rows, columns, warps, stages):

{outer}

"""
LAUNCHES = """## Launches of whole layers of 4,096 tokens

Microseconds in each kernel, and in the gap before it, when replayed layers are profiled; *whole* is the time of the same layers when they are not ([training-h200.json](training-h200.json),
`examples/gpu/experts.py launches`):

{launches}

As a whole: {goals}.{slower}

"""


def training(record, table, goals):
    """Return the sections from a record; ``table`` makes a table in Markdown, ``goals`` are microseconds by layer."""
    text = ""
    if "training check" in record:
        text += _check(record["training check"])
    if "training" in record:
        text += _steps(record["training"], table, record.get("note", ""))
    if "outer tiles" in record:
        tiles = list(next(iter(record["outer tiles"].values())))
        rows = [
            [*key.split(" "), *(_shown(row.get(one)) for one in tiles)] for key, row in record["outer tiles"].items()
        ]
        text += OUTER.format(outer=table(("layer", "tokens", *tiles), rows))
    if "launches of whole layers" in record:
        text += _launches(record["launches of whole layers"], table, goals)
    return text


def _shown(value):
    return f"{value:.0f}" if isinstance(value, (int, float)) else "-"


def _check(checks):
    errors = [value for row in checks.values() for key, value in row.items() if key != "same"]
    names, tokens = zip(*(key.rsplit(" ", 1) for key in checks), strict=True)
    return CHECK.format(
        error=max(errors), bits="equal" if all(row["same"] for row in checks.values()) else "**different**",
        shapes=", ".join(dict.fromkeys(names)), tokens=" and ".join(dict.fromkeys(tokens)),
    )  # fmt: skip


def _steps(found, table, note):
    ways = ("ours", "grouped_mm", "eager", "ours, replayed", "grouped_mm, replayed")
    steps, losing = [], []
    for key, row in found.items():
        name, tokens, *frozen = key.split(" ")
        steps.append([name, tokens, " ".join(frozen), *(_shown(row.get(way)) for way in ways)])
        for suffix in ("", ", replayed"):
            own, other = row.get(f"ours{suffix}"), row.get(f"grouped_mm{suffix}")
            if _shown(own) != "-" and _shown(other) != "-" and own > other:
                losing.append(f"{key}{suffix} ({own / other:.2f} times)")
    return STEPS.format(
        steps=table(("layer", "tokens", "matrices", *ways), steps), losing=", ".join(losing) or "none",
        note=f" {note}" if note else "",
    )  # fmt: skip


def _launches(found, table, goals):
    rows, reached, slower = [], [], []
    for name, row in found.items():
        kernels, gaps, whole = row["kernels"], row["gaps before"], row["whole"]
        rows += [[name, f"`{key}`", f"{us:.1f}", f"{gaps.get(key, 0):.1f}"] for key, us in kernels.items()]
        rows.append([name, "all", f"**{sum(kernels.values()):.1f}**", f"{sum(gaps.values()):.1f}"])
        rows.append([name, "whole, not profiled", f"**{whole:.1f}**", ""])
        goal = goals[name][4096]
        over = f"missed by {whole / goal - 1:.1%}" if whole > goal else "reached"
        reached.append(f"{name} {whole:.0f}, goal {goal}: {over}")
        if sum(kernels.values()) > whole:
            slower.append(name)
    note = (
        f" Profiled, the kernels of {' and '.join(slower)} took longer than the whole layer otherwise."
        if slower
        else ""
    )
    return LAUNCHES.format(
        launches=table(("layer", "kernel", "in it", "gap before"), rows), goals="; ".join(reached), slower=note
    )  # fmt: skip


def kernels_of_a_token(record, table, count=12):
    """Return what a record of ``generate`` says of the kernels of a token; nothing if it has none."""
    ways = record["generate"]
    row = (ways.get("door, choices in one launch") or ways.get("door", {})).get("kernels_us_token")
    if not row:
        return ""
    total, launches = row["sum"]
    rows = [[f"`{key}`", f"{us:.1f}", f"{n:.1f}"] for key, (us, n) in row.items() if key != "sum"][:count]
    rows.append(["all", f"**{total:.0f}**", f"{launches:.0f}"])
    return (
        "Kernels of a token of `hf_optim.generate`, by profiling:\n\n"
        + table(("kernel", "us a token", "launches a token"), rows)
        + "\n\n"
    )

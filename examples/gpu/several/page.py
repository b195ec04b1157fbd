"""Render what ``run.py`` has written as a page of ``model_cards/measurements``, and keep the figures in one file.

    python examples/gpu/several/page.py DIR            # adds to several-gpus-h200.json, and writes several-gpus-h200.md
    python examples/gpu/several/page.py --again        # the page from the kept file

Results of a run replace those of the same name in the kept file; others stay. What was not run, or failed, stands on the page as such.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[3] / "model_cards" / "measurements"
NAME = "several-gpus-h200"
SUMS = {"NCCL": "NCCL's", "one launch": "in one launch through mapped memory"}
EQUAL_CODES = 0.999  # the goal of calibration over ranks, of all codes
Results = dict[str, dict[str, Any]]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def size(count: float) -> str:
    """Return bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def short(text: Any) -> str:
    """Return an error as one line of a table."""
    return " ".join(str(text).split())[-160:].replace("|", "/")


def first_sentence(text: str) -> str:
    """Return the beginning of a message, or that there was none."""
    return text.partition(". ")[0].replace("|", "/") or "NONE"


def missing(title: str, name: str, results: Results) -> str:
    """Return a section that says why it has no figures."""
    states = [job for job in results.get("jobs", {}).get("jobs", []) if job["job"].startswith(name)]
    why = "; ".join(f"{job['job']}: {job['status']}" for job in states if job["status"] != 0) or "not run"
    return f"## {title}\n\nNo figures ({why}).\n"


def exchanges(results: Results) -> str:
    held = results.get("exchange")
    title = "Exchanges"
    if held is None or "times" not in held:
        return missing(title, "exchange", results)
    checks, rows = held["checks"], held["times"]
    wrong = ", ".join(checks["wrong"]) or "none"
    ways = list(dict.fromkeys(row["way"] for row in rows))
    by_way = {(row["way"], row["total"]): row for row in rows}
    sizes = sorted({row["total"] for row in rows})

    def cell(way: str, total: int) -> str:
        row = by_way[way, total]
        text = f"{row['seconds'] * 1e6:.1f}"
        if "forward_backward" in row:
            text += f" / {row['forward_backward'] * 1e6:.1f}"
        return text + (f" ({row['predicted'] * 1e6:.1f})" if "predicted" in row else "")

    text = (
        f"## {title}\n\n`exchange.py`: {checks['compared']} exchanges (orders, grids, chunks; even, uneven and empty; "
        f"float32 and bfloat16; forward and backward) compared with PyTorch's call; not bitwise equal: {wrong}.\n\n"
        "Microseconds by the bytes that a rank sends in all: forward / forward and backward (prediction of the fitted "
        "model for the forward).\n\n"
    )
    text += table(["bytes", *ways], ([size(total), *(cell(way, total) for way in ways)] for total in sizes))
    if (model := held.get("model")) is not None:
        fit = model["fit"]
        text += (
            f"\nThe cost model, fitted to {', '.join(map(size, model['sizes_fitted']))}: {fit['collective'] * 1e6:.1f} us "
            f"a collective, {fit['message_inside'] * 1e6:.1f} us a message, "
            + (f"{1e-9 / fit['byte_inside']:.1f} GB/s" if fit["byte_inside"] else "no time a byte")
            + f". On the other sizes its error is {model['error_median']:.0%} (median), {model['error_max']:.0%} (largest)."
            " Where every grid has one node or one rank a node, a message and a collective cannot be told apart.\n"
        )
    return text


def reductions(results: Results) -> str:
    held = results.get("reductions")
    title = "Sums of small tensors"
    if held is None:
        return missing(title, "reductions", results)
    text = (
        f"## {title}\n\n`reductions.py`: a sum over the ranks behind each layer that is cut by columns, in bfloat16: "
    )
    text += "by NCCL, and in one launch through memory that the GPUs map from each other. "
    if not held["mapped_memory"]:
        text += "These GPUs map no memory from each other here. "
    wrong = [f"{row['tokens']} x {row['width']}" for row in held["rows"] if not row.get("equal", True)]
    wrong += [f"gather of {row['tokens']} x {row['width']}" for row in held["rows"] if not row["gather_equal"]]
    text += f"Not equal to the bit: {', '.join(wrong) or 'none'}. Microseconds, launched by the host / in a replayed graph.\n\n"

    def cell(row: dict[str, Any], way: str) -> str:
        if f"{way}_seconds" not in row:
            return "-"
        text = f"{row[f'{way}_seconds'] * 1e6:.1f}"
        return text + (f" / {row[f'{way}_replayed_seconds'] * 1e6:.1f}" if f"{way}_replayed_seconds" in row else "")

    rows = (
        (row["tokens"], row["width"], size(row["bytes"]), cell(row, "nccl"), cell(row, "one_launch"))
        for row in held["rows"]
    )
    text += table(["tokens", "width", "bytes", "NCCL", "one launch"], rows)
    return text + (f"\nIt ended early: {short(held['error'])}\n" if "error" in held else "")


def mixture(results: Results) -> str:
    held = results.get("mixture")
    title = "Experts of Qwen3-30B-A3B's shape divided among GPUs, beside transformers"
    if held is None:
        return missing(title, "mixture", results)
    text = f"## {title}\n\n`mixture.py`, transformers {held['transformers']}, four layers in bfloat16.\n\n"
    if "refused" in held:
        return text + f"Not run: {held['refused']}.\n"
    checks = [one for one in held["checks"] if "bitwise_as_flat" in one]
    other = [one["way"] for one in checks if not one["bitwise_as_flat"]]
    if checks:
        error = max(one["error_to_stock"] for one in checks)
        text += f"{len(checks)} orders and grids; not bitwise the first flat exchange's: {', '.join(other) or 'none'}. "
        text += f"Relative distance of logits to transformers' own all-to-all: {error:.1e}.\n\n"
    text += table(
        ("way", "tokens a rank", "forward, ms", "forward and backward, ms"),
        (
            (row["way"], "-", short(row["error"]), "-")
            if "error" in row
            else (
                row["way"] + (" (the same tokens on all ranks)" if row["tokens_are_shared"] else ""),
                row["tokens_a_rank"],
                f"{row['forward_ms']:.2f}",
                f"{row['forward_backward_ms']:.2f}",
            )
            for row in held["rows"]
        ),
    )
    return text


def generation(results: Results, names: list[str], title: str, job: str) -> str:
    """Return the section of checkpoints that were cut: figures by number of ranks, with the efficiency of scaling."""
    held = [one for key, one in sorted(results.items()) if "rows" in one and one.get("name") in names]
    if not held:
        return missing(title, job, results)
    shapes = {
        "8b": "8 layers of Llama-3-8B's widths",
        "70b": "4 layers of Llama-3-70B's widths",
        "qwen3moe": "4 layers of Qwen3-30B-A3B's widths",
    }
    shown = ", ".join(text for shape, text in shapes.items() if any(one["name"].startswith(shape) for one in held))
    text = f"## {title}\n\n`tensor_parallel.py`: {shown}; milliseconds a token; efficiency is t(1) / (N t(N)).\n\n"
    alone = {
        (one["name"], row["way"], row["batch"]): row["ms_per_token"]
        for one in held
        if one["ranks"] == 1
        for row in one["rows"]
        if "ms_per_token" in row
    }
    lines = []
    for one in held:
        if "error" in one:
            lines.append((one["name"], one["ranks"], "-", "-", short(one["error"]), "-", "-", "-"))
        elif not one["rows"]:  # the run ended after the comparison
            memory = f"{one.get('gib_after_load', '-')} / -"
            lines.append((one["name"], one["ranks"], "-", "-", "not timed", "-", "-", memory))
        for row in one["rows"]:
            first = [one["name"], one["ranks"], row["way"], row["batch"]]
            if "error" in row:
                lines.append((*first, short(row["error"]), "-", "-", "-"))
                continue
            base = alone.get((one["name"], row["way"], row["batch"]))
            share = f"{base / row['ms_per_token'] / one['ranks']:.0%}" if base and one["ranks"] > 1 else "-"
            memory = f"{one.get('gib_after_load', '-')} / {row.get('peak_gib', '-')}"
            lines.append((*first, f"{row['ms_per_token']:.3f}", f"{row['tokens_per_s']:.0f}", share, memory))
    text += table(
        ("model", "GPUs", "way", "batch", "ms a token", "tokens/s", "efficiency", "GiB a GPU: loaded / peak"), lines
    )
    for sums in sorted({one["small_sums"] for one in held if one["ranks"] > 1 and "small_sums" in one}):
        rows = ", ".join(
            dict.fromkeys(one["name"] for one in held if one["ranks"] > 1 and one.get("small_sums") == sums)
        )
        text += f"\nSums of small tensors over the GPUs, {rows}: {SUMS.get(sums, sums)}.\n"
    compared = [one for one in held if "relative_error_of_logits" in one]
    if compared:
        text += "\nBeside one GPU:\n\n" + table(
            ("model", "GPUs", "relative error of logits", "same first choice", "equal tokens of 16", "ranks agree"),
            (
                (
                    one["name"],
                    one["ranks"],
                    f"{one['relative_error_of_logits']:.1e}",
                    f"{one['same_first_choice']:.2%}",
                    ", ".join(map(str, one["equal_tokens_of_16"])),
                    "yes" if one["ranks_have_equal_logits"] else "NO",
                )
                for one in compared
            ),
        )
    return text


def calibration(results: Results) -> str:
    title = "Calibration data shared by GPUs"
    held = [one for key, one in sorted(results.items()) if key.startswith("calibration-") and one.get("passes")]
    if not held:
        return missing(title, "calibration", results)
    first = held[0]
    text = (
        f"## {title}\n\n`calibration.py`: GPTQ W4A16 of two blocks of Llama-3-8B's shape, {first['rows']} x "
        f"{first['tokens_a_row']} tokens; the model is on every "
        "GPU, and ranks divide the layers of a block. Sums of batches in float64, rounded once (`precision: mixed`).\n\n"
    )
    text += table(
        ("GPUs", "pass", "seconds a block", "tokens/s of a GPU", "seconds in all", "peak GiB"),
        (
            (
                one["ranks"],
                row["turn"],
                row.get("seconds_per_block", "-"),
                row.get("tokens_per_second", "-"),
                row["seconds"],
                row.get("peak_gib", "-"),
            )
            for one in held
            for row in one["passes"]
        ),
    )
    for one in held:
        if (same := one.get("beside_one_rank")) is not None:
            text += (
                f"\n{one['ranks']} GPUs beside one: {same['equal_share']:.4%} of {same['codes']} codes are equal (worst "
                f"layer {same['equal_share_of_worst_layer']:.4%}); scales {'equal' if same['scales_equal'] else 'DIFFER'}. The "
                f"goal, more than {EQUAL_CODES:.1%}, is {'met' if same['equal_share'] > EQUAL_CODES else 'MISSED'}.\n"
            )
    return text


def training(results: Results) -> str:
    title = "Training under DDP and FSDP2"
    held = [one for key, one in sorted(results.items()) if key.startswith("training-") and one.get("rows")]
    if not held:
        return missing(title, "training", results)
    text = (
        f"## {title}\n\n`training.py`: babyllama-1m on TinyStories, {held[0]['steps']} steps of {held[0]['batch']} x "
        f"{held[0]['tokens_a_row']} tokens in float32; the same batches in all rows. A model of one million weights is far "
        "too small to gain by several GPUs: the times are those of launches and collectives.\n\n"
    )
    return text + table(
        ("recipe", "GPUs", "way", "first loss", "last loss", "largest difference to one GPU", "ms a step"),
        (
            (row["recipe"], one["ranks"], row["how"], "-", "-", short(row["error"]), "-")
            if "error" in row
            else (
                row["recipe"],
                one["ranks"],
                row["how"],
                f"{row['losses'][0]:.4f}",
                f"{row['losses'][-1]:.4f}",
                f"{row['largest_difference_of_losses']:.1e}" if "largest_difference_of_losses" in row else "-",
                f"{row['ms_a_step']:.2f}",
            )
            for one in held
            for row in one["rows"]
        ),
    )


def dead_rank(results: Results) -> str:
    title = "A rank that ends"
    held = results.get("dead-rank")
    if held is None:
        return missing(title, "dead-rank", results)
    text = (
        f"## {title}\n\n`dead_rank.py` over {held['backend']}: rank N - 1 is killed, or stopped, while the others wait in "
        f"an all-reduce; limit {held['limit_s']:g} s, and the process group's is ten minutes.\n\n"
    )
    return text + table(
        ("what happened", "rank", "exit status", "seconds after", "its message"),
        (
            (
                f"rank {case['rank']} {case['how']}",
                one["rank"],
                one["status"],
                one["seconds_after"],
                first_sentence(one["message"]),
            )
            for case in held["cases"]
            for one in case["survivors"]
        ),
    )


def page(results: Results) -> str:
    """Return the page."""
    first = max((one for one in results.values() if "device" in one), key=lambda one: one["ranks"])
    versions = ", ".join(f"{key} {first[key]}" for key in ("torch", "triton", "nccl", "transformers") if key in first)
    ranks = max(one["ranks"] for one in results.values() if "ranks" in one)
    llama = [f"{shape}-{scheme}" for shape in ("8b", "70b") for scheme in ("w4a16", "w8a8", "dense")]
    parts = [
        f"# Several GPUs of one host\n\n{ranks} x {first['device']}, {first['link']}; {versions}. NVLink multicast is off. "
        "Scripts in `examples/gpu/several`; random weights except in training; figures in "
        f"`{NAME}.json`.\n",
        exchanges(results),
        reductions(results),
        mixture(results),
        generation(results, llama, "Packed layers divided among GPUs", "tensor"),
        generation(results, ["qwen3moe-w4a16"], "Packed experts divided among GPUs", "experts"),
        calibration(results),
        training(results),
        dead_rank(results),
    ]
    if failed := [job for job in results.get("jobs", {}).get("jobs", []) if job["status"] != 0]:
        text = ", ".join(f"{job['job']} ({job['status']})" for job in failed)
        parts.append(f"## What did not end in order\n\n{text}.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what run.py had as OUT")
    parser.add_argument("--again", action="store_true", help="render the kept file")
    parser.add_argument("--output", type=Path, default=HOME)
    args = parser.parse_args()
    kept = args.output / f"{NAME}.json"
    if args.again:
        results: Results = json.loads(kept.read_text(encoding="utf-8"))
    else:
        if args.folder is None or not args.folder.is_dir():
            parser.error("name the folder that run.py had as OUT, or pass --again")
        results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.folder.glob("*.json"))}
        known = {job["job"]: job for job in results.get("jobs", {}).get("jobs", [])}
        known |= {job["job"]: job for job in found.pop("jobs", [])}
        results |= {**found, "jobs": {"jobs": list(known.values())}}
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.output / f"{NAME}.md").write_text(page(results), encoding="utf-8")
    print(f"wrote {args.output / NAME}.md")


if __name__ == "__main__":
    main()

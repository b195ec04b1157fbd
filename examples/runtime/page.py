"""Write ``model_cards/runtime/README.md`` from the records of the scripts that measure run time.

python examples/runtime/page.py model_cards
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

INTRODUCTION = """# Techniques of run time, measured

They change no weights, so a card of a checkpoint would show the original's quality. Here is what they change: time,
memory, and what stays equal. `kv_cache` is in the table of its own [measurement]({kv}), and on a card of a converted
model.
"""


def padding_removal(record: dict[str, Any]) -> str:
    """Return the section of ``padding_removal``."""
    rows = [
        f"| {name} | {c['padded_over_valid']:.2f} | {1e3 * c['stock_s']:.0f} | {1e3 * c['packed_s']:.0f} | "
        f"{c['speedup']:.2f} | {c['difference']:.1e} |"
        for name, c in record["cases"].items()
    ]
    return f"""## `padding_removal`

CPU milliseconds of all-MiniLM-L6-v2 (and of a T5 encoder with random weights), stock and packed; {record["rows"]} rows
of a batch, {record["threads"]} thread, float32, torch {record["torch"]}, the least of {record["rounds"]} rounds on a
shared machine. The last column is the largest difference of an output. Made by
[padding_removal.py](../../examples/runtime/padding_removal.py).

| batch | padded / valid | stock (ms) | packed (ms) | speed-up | difference |
|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

![speed-up over padded / valid tokens](padding_removal.png)
"""


def offload(record: dict[str, Any]) -> str:
    """Return the section of ``offload``."""
    lines = []
    blocks = max(sum(row.get("blocks", ())) for row in record["rows"].values())
    for name, row in record["rows"].items():
        memory, disk = row.get("blocks", (blocks, 0))
        equal = "yes" if row.get("equal_tokens", name == "stock") else "no"
        lines.append(
            f"| {'none (stock)' if name == 'stock' else name} | {memory}, {disk} | {row['resident_peak'] / 1e6:,.0f} | "
            f"{row.get('streamed_bytes', 0) / 1e9:.2f} | {row['ms_per_token']:,.0f} | {equal} |"
        )
    return f"""## `offload`

Greedy decoding of a model of {record["bytes"] / 1e9:.2f} GB in bfloat16 whose blocks are read from disk, on a CPU of a
busy machine. Made by [offload_on_cpu.py](../../examples/offload_on_cpu.py); on a GPU, see
[the documentation](../../docs/offload.md).

| budget | blocks in memory, on disk | resident, peak (MB) | GB from disk for a token | ms for a token | equal tokens |
|---|---:|---:|---:|---:|---|
{chr(10).join(lines)}
"""


def parallelism(record: dict[str, Any]) -> str:
    """Return the section of ``parallelism``."""
    rows = [
        f"| {number} | {held:,} | {held / record['bytes_whole']:.2f} | {difference / record['largest_logit']:.1e} | "
        f"{'yes' if equal else 'no'} |"
        for number, (held, difference, equal) in enumerate(
            zip(record["bytes_of_ranks"], record["largest_difference"], record["equal_tokens"], strict=True)
        )
    ]
    return f"""## `parallelism`

{record["model"]} with 4-bit weights in groups of 32, divided among {len(rows)} ranks (gloo, one machine), beside one
process that holds all of it ({record["bytes_whole"]:,} bytes). Bytes are those of parameters and buffers, which a
float32 model on a CPU holds decoded, with the embeddings, which every rank holds whole; then the largest difference of
a logit over the largest logit, and {record["new_tokens"]} tokens of greedy decoding. Nothing was timed: ranks that
share cores say nothing about it. Made by
[parallelism.py](../../examples/runtime/parallelism.py).

| rank | bytes | of the whole | difference of logits | equal tokens |
|---|---:|---:|---:|---|
{chr(10).join(rows)}
"""


def page(cards: Path) -> str:
    """Return the page of the records in a folder of cards."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((cards / name).read_text(encoding="utf-8"))

    sections = (
        INTRODUCTION.format(kv="../measurements/README.md"),
        padding_removal(read("runtime/padding_removal.json")),
        offload(read("measurements/offload-cpu.json")),
        parallelism(read("runtime/parallelism.json")),
    )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", type=Path)
    cards = parser.parse_args().cards
    (cards / "runtime" / "README.md").write_text(page(cards), encoding="utf-8")


if __name__ == "__main__":
    main()

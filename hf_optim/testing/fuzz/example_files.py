"""Contents of valid files that are not checkpoints: data of every format, and results of benchmarks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any


def data_files(words: list[str]) -> dict[str, bytes]:
    """Return data files by their suffix, made of ``words``."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rows: list[dict[str, Any]] = [
        {"text": " ".join(words[i % 9 :] * 2), "label": i % 2, "score": i / 8} for i in range(8)
    ]
    ids = [{"input_ids": [5 + i, 6, 7, 8], "attention_mask": [1, 1, 1, 1], "labels": [1, 2, 3, 4]} for i in range(4)]
    nested = [{"messages": [{"role": "user", "content": row["text"]}], "extra": {"a": [1, [2]]}} for row in rows]
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    pictures = [{"image": {"bytes": image.getvalue(), "path": None}, "label": i % 2} for i in range(2)]

    def table(mark: str) -> bytes:
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        return "\n".join(lines).encode()

    def lines(listed: Sequence[Any]) -> bytes:
        return "\n".join(map(json.dumps, listed)).encode()

    def parquet(listed: list[Any]) -> bytes:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), sink)
        return sink.getvalue().to_pybytes()

    return {
        ".jsonl": lines(rows),
        ".ids.jsonl": lines(ids),
        ".nested.jsonl": lines(nested),
        ".json": json.dumps(rows).encode(),
        ".csv": table(","),
        ".tsv": table("\t"),
        ".txt": "\n\n".join(row["text"] for row in rows).encode(),
        ".parquet": parquet(rows),
        ".ids.parquet": parquet(ids),
        ".images.parquet": parquet(pictures),
        ".npy": b"\x93NUMPY",
    }


def bench_results() -> dict[str, Any]:
    """Return the results of a benchmark with one row of each kind, in JSON types."""
    from dataclasses import fields

    from ...evaluation.bench.results import DecodeResult, OpResult, PrefillResult, Results

    def row(cls: Any, **values: Any) -> Any:
        kinds = {"str": "x", "int": 4, "float | None": 2.5}
        made = {f.name: kinds[f.type] for f in fields(cls) if f.name != "failure" and f.type in kinds}
        return cls(**{**made, **values})

    results = Results("cpu", "none", {"torch": "2"}, {"copy": 100.0, "bfloat16": 1e6, "int8": 1e6}, "2026-01-01", "x")
    results.rows = [
        row(OpResult, role=role, op="wna16", contender=role, dtype="bfloat16") for role in ("ours", "dense")
    ]
    results.decode, results.prefill = [row(DecodeResult)], [row(PrefillResult)]
    return results.to_json()

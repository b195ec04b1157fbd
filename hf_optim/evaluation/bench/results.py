"""The results of a benchmark, and the file that keeps them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...errors import OptimError

Whole = TypeVar("Whole", "Decode", "Prefill")

SCHEMA = 1
FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """One contender on one layer with one number of rows.

    Attributes:
        op: the operator's folder.
        N, K, M: outputs and inputs of the layer, rows of the input.
        role: ours, the dense product, a peer, or a part of the work, for comparison alone.
        graph_us, eager_us, host_us: microseconds of a call: in a replayed graph, launched by the host, and until the
            call returns to the host. None: could not be had.
        spread: of ``graph_us``, from the 10th to the 90th percentile over the median.
        floor_us: the longer of the bytes over the copy bandwidth and the operations over the matrix rate.
        error: norm of the difference to float64 over its norm. A peer's has the error of its own codes in it.
        failure: why there are no times; empty if there are.
    """

    op: str
    N: int
    K: int
    M: int
    dtype: str
    contender: str
    role: Literal["ours", "dense", "peer", "part"]
    bytes: int = 0
    flops: int = 0
    floor_us: float | None = None
    graph_us: float | None = None
    spread: float | None = None
    eager_us: float | None = None
    host_us: float | None = None
    error: float | None = None
    failure: str = ""

    @property
    def place(self) -> tuple[str, int, int, int, str]:
        """What rows that are compared with each other have in common."""
        return self.op, self.N, self.K, self.M, self.dtype

    @property
    def of_floor(self) -> float | None:
        """Floor over time in a graph: 1 is as fast as the device can be."""
        return self.floor_us / self.graph_us if self.floor_us and self.graph_us else None


@dataclass(frozen=True)
class Decode:
    """Greedy ``generate`` of one model under one scheme.

    Attributes:
        ms: median milliseconds from one token to the next, in steady decoding.
        overall_ms: milliseconds of the whole call over its new tokens.
        warmup_s: seconds of the calls before, compilation in them.
        weights_gb, peak_gb: bytes of the model's tensors, and the most the device held, in 10^9.
        floor_ms: bytes read a token over the copy bandwidth.
        gpu_ms: of ``ms``, how long the device was busy; None if not profiled.
        kernels: label -> number of linear layers.
    """

    model: str
    scheme: str
    mode: str
    batch: int
    ms: float | None = None
    overall_ms: float | None = None
    warmup_s: float | None = None
    weights_gb: float | None = None
    peak_gb: float | None = None
    floor_ms: float | None = None
    gpu_ms: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def name(self) -> str:
        """What was measured."""
        return f"{self.model} under {self.scheme}, {self.mode} cache, batch {self.batch}"


@dataclass(frozen=True)
class Prefill:
    """One forward over a prompt, with a cache to fill, of one model under one scheme.

    Attributes:
        tokens: of each of the ``batch`` prompts.
        ms: median milliseconds, eager.
        peak_gb: the most the device held, in 10^9 bytes.
    """

    model: str
    scheme: str
    batch: int
    tokens: int
    ms: float | None = None
    peak_gb: float | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        """What was measured."""
        return f"{self.model} under {self.scheme}, prefill of {self.batch} x {self.tokens}"


@dataclass
class Results:
    """Rows with the device, the versions and the ceilings they were measured with.

    Attributes:
        ceilings: ``copy`` in bytes a microsecond; ``bfloat16``, ``int8`` in operations a microsecond.
        left_out: what the time did not suffice for.
    """

    device: str
    driver: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    date: str
    command: str
    rows: list[Row] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    prefill: list[Prefill] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON types alone; a number that is not finite becomes null."""
        return _finite({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Inverse of ``as_json``. Raises ``OptimError`` for another schema or missing parts."""
        if data.get("schema") != SCHEMA:
            raise OptimError(f"benchmark results of schema {data.get('schema')!r}; this version reads {SCHEMA}")
        try:
            # Results from before prefill was timed have none.
            data = {"prefill": [], **data}
            parts = {f.name: data[f.name] for f in fields(cls)}
            parts["rows"] = [Row(**row) for row in parts["rows"]]
            parts["decode"] = [Decode(**row) for row in parts["decode"]]
            parts["prefill"] = [Prefill(**row) for row in parts["prefill"]]
        except (KeyError, TypeError) as error:
            raise OptimError(f"no benchmark results: {error}") from error
        return cls(**parts)

    def behind(self, earlier: Results) -> Results:
        """The rows of ``earlier`` that were not measured again, and then these; versions and ceilings are the new ones.

        Raises ``OptimError`` if the earlier ones are of another device or of other versions.
        """
        for what in ("device", "driver", "versions"):
            old, new = getattr(earlier, what), getattr(self, what)
            if old != new:
                raise OptimError(f"the earlier results are of another {what.rstrip('s')}: {old}, now {new}")
        again = {(*row.place, row.contender) for row in self.rows}
        rows = [row for row in earlier.rows if (*row.place, row.contender) not in again]
        decode = _behind(earlier.decode, self.decode)
        prefill = _behind(earlier.prefill, self.prefill)
        command = f"{earlier.command}; {self.command}"
        both = sorted(rows + self.rows, key=lambda row: row.op)
        return replace(self, rows=both, decode=decode, prefill=prefill, command=command)

    def save(self, directory: Path) -> Path:
        """Write ``results.json``, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        path, beside = directory / FILE, directory / f"{FILE}.new"
        beside.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
        return path

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Read ``results.json``. Raises ``OptimError`` if there is none, or it is damaged."""
        path = directory / FILE
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise OptimError(f"{directory} has no {FILE}") from error
        except json.JSONDecodeError as error:
            raise OptimError(f"{path} is damaged: {error}") from error


def _behind(earlier: list[Whole], now: list[Whole]) -> list[Whole]:
    again = {row.name for row in now}
    return [row for row in earlier if row.name not in again] + now


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

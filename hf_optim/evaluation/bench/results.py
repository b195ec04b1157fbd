"""The results of a benchmark, and the file that stores them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from ...errors import OptimError
from ...recipes.field_checks import admits_json
from ...trust.bounds import shown
from ...trust.documents import read_mapping

ModelResult = TypeVar("ModelResult", "DecodeResult", "PrefillResult")

SCHEMA = 1
FILE = "results.json"


@dataclass(frozen=True)
class OpResult:
    """The times of one contender on one layer with one number of input rows.

    Attributes:
        op: the folder of the operator.
        N, K, M: outputs and inputs of the layer, rows of the input.
        role: ours, the dense product, a peer, or a peer that does only part of the work.
        bytes: the fewest bytes that the format must read.
        flops: multiplications and additions of the product.
        graph_us, eager_us, host_us: microseconds of a call: in a replayed graph, launched by the host, and until the
            call returns to the host. None if not measurable.
        spread: of ``graph_us``, from the 10th to the 90th percentile over the median.
        floor_us: roofline bound: the longer of bytes over copy bandwidth and operations over matrix rate.
        error: norm of the difference to float64 over its norm. That of a peer includes its quantization error.
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
    def problem_key(self) -> tuple[str, int, int, int, str]:
        """What rows must have in common to be compared with each other."""
        return self.op, self.N, self.K, self.M, self.dtype

    @property
    def fraction_of_floor(self) -> float | None:
        """The floor over the time in a graph: 1 is the fastest that the device can be."""
        return self.floor_us / self.graph_us if self.floor_us and self.graph_us else None


@dataclass(frozen=True)
class DecodeResult:
    """The times of greedy ``generate`` with one model under one scheme.

    Attributes:
        ms: median milliseconds from one token to the next, in steady decoding.
        overall_ms: milliseconds of the whole call over its new tokens.
        warmup_s: seconds of the warm-up calls, including compilation.
        first_ms: milliseconds of a call for one token, the prefill included; None where steps are timed alone.
        weights_gb, peak_gb: bytes of the model's tensors, and the peak of the device memory, in 10^9.
        floor_ms: roofline bound: bytes read per token over the copy bandwidth.
        gpu_ms: the part of ``ms`` in which the device computes; None if not profiled.
        kernels: kernel name -> number of linear layers on it.
        failure: why there are no times; empty if there are.
    """

    model: str
    scheme: str
    mode: str
    batch: int
    ms: float | None = None
    overall_ms: float | None = None
    warmup_s: float | None = None
    first_ms: float | None = None
    weights_gb: float | None = None
    peak_gb: float | None = None
    floor_ms: float | None = None
    gpu_ms: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def name(self) -> str:
        """The model, the scheme and the setting, in words."""
        return f"{self.model} under {self.scheme}, {self.mode} cache, batch {self.batch}"


@dataclass(frozen=True)
class PrefillResult:
    """The time of one forward over prompts that fills a cache, with one model under one scheme.

    Attributes:
        tokens: length of each of the ``batch`` prompts.
        ms: median milliseconds, eager.
        peak_gb: the peak of the device memory, in 10^9 bytes.
        failure: why there is no time; empty if there is.
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
        """The model, the scheme and the setting, in words."""
        return f"{self.model} under {self.scheme}, prefill of {self.batch} x {self.tokens}"


@dataclass
class Results:
    """All rows, with the device, the versions and the ceilings they were measured with.

    Attributes:
        ceilings: ``copy`` in bytes per microsecond; ``bfloat16``, ``int8`` in operations per microsecond.
        left_out: the measurements that the deadline left no time for.
    """

    device: str
    driver: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    date: str
    command: str
    rows: list[OpResult] = field(default_factory=list)
    decode: list[DecodeResult] = field(default_factory=list)
    prefill: list[PrefillResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; a number that is not finite becomes null."""
        return _finite({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Read the result of ``to_json``. Raises ``OptimError`` for another schema or missing parts."""
        if data.get("schema") != SCHEMA:
            raise OptimError(f"benchmark results of schema {shown(data.get('schema'))}; this version reads {SCHEMA}")
        parts = {key: value for key, value in data.items() if key != "schema"}
        for key, kind in (("rows", OpResult), ("decode", DecodeResult), ("prefill", PrefillResult)):
            listed = parts.get(key, [])
            if not isinstance(listed, list):
                raise OptimError(f"these are not benchmark results: {key} is {shown(listed)}, not a list")
            parts[key] = [_parsed(kind, row, f"{key}[{number}]") for number, row in enumerate(listed)]
        return _parsed(cls, parts, "the file")

    def merged_after(self, earlier: Results) -> Results:
        """Return the rows of ``earlier`` that were not measured again, followed by these; the rest is from these.

        Raises ``OptimError`` if the earlier results are from another device, driver or package version.
        """
        for name in ("device", "driver", "versions"):
            old, new = getattr(earlier, name), getattr(self, name)
            if old != new:
                raise OptimError(f"the earlier results have another {name.rstrip('s')}: {old}, now {new}")
        again = {(*row.problem_key, row.contender) for row in self.rows}
        rows = [row for row in earlier.rows if (*row.problem_key, row.contender) not in again]
        decode = _merge(earlier.decode, self.decode)
        prefill = _merge(earlier.prefill, self.prefill)
        command = f"{earlier.command}; {self.command}"
        both = sorted(rows + self.rows, key=lambda row: row.op)
        return replace(self, rows=both, decode=decode, prefill=prefill, command=command)

    def save(self, directory: Path) -> Path:
        """Write ``results.json`` atomically; return the file."""
        directory.mkdir(parents=True, exist_ok=True)
        path, temporary = directory / FILE, directory / f"{FILE}.new"
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Read ``results.json``. Raises ``OptimError`` if it is missing or damaged."""
        if not os.path.lexists(directory / FILE):
            raise OptimError(f"{directory} has no {FILE}")
        return cls.from_json(read_mapping(directory / FILE, error=OptimError))


def _parsed(cls: Any, data: Any, what: str) -> Any:
    """Build a dataclass from a mapping of a file. Raises ``OptimError`` for a value of another type."""
    if not isinstance(data, dict):
        raise OptimError(f"these are not benchmark results: {what} is {shown(data)}, not a mapping")
    hints = get_type_hints(cls)
    for f in fields(cls):
        if f.name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise OptimError(f"these are not benchmark results: {what} has no {f.name}")
    for key, value in data.items():
        if key not in hints or not admits_json(hints[key], value):
            raise OptimError(f"these are not benchmark results: {shown(key)} of {what} is {shown(value)}")
    return cls(**data)


def _merge(earlier: list[ModelResult], now: list[ModelResult]) -> list[ModelResult]:
    again = {row.name for row in now}
    return [row for row in earlier if row.name not in again] + now


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

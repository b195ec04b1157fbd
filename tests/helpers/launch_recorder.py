"""A plugin of pytest that notes which kernels the interpreter runs, for ``compile_launches``.

    LAUNCHES=FOLDER TRITON_INTERPRET=1 pytest -p launch_recorder tests/kernels -m interpreted

Every process writes a file of JSON lines into the folder: a kernel, the types of its arguments, and its constants.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from hf_optim_kernels.common import launch as launching

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def kind_of(value: Any) -> list[Any]:
    """Return the compiler's name of an argument's type ("?" if not known here), and what it knows of the value."""
    if isinstance(value, torch.Tensor):
        return ["*" + NAMES.get(value.dtype, "?"), True]
    if isinstance(value, bool) or value is None:
        return ["constexpr", value]
    if isinstance(value, int):
        return ["constexpr", 1] if value == 1 else ["i32" if abs(value) < 2**31 else "i64", value % 16 == 0]
    return ["fp32", False] if isinstance(value, float) else ["?", False]


def pytest_configure(config: Any) -> None:
    constants_of, options_of = launching._all_of, launching._options
    held: dict[str, Any] = {}
    seen: set[str] = set()
    folder = Path(os.environ["LAUNCHES"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{os.getpid()}.jsonl"

    def all_of(kernel: Any, args: tuple, constants: dict[str, Any]) -> dict[str, Any]:
        function = getattr(kernel, "fn", kernel)
        held.clear()
        held.update(module=function.__module__, name=function.__name__, args=[kind_of(each) for each in args])
        held["constants"] = constants_of(kernel, args, constants)
        return held["constants"]

    def options(warps: int, stages: int, registers: int, early: int) -> dict[str, Any]:
        line = json.dumps({**held, "warps": warps, "stages": stages}, sort_keys=True, default=str)
        if line not in seen:
            seen.add(line)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        return options_of(warps, stages, registers, early)

    launching._all_of, launching._options = all_of, options

"""Compile, for a GPU that is not there, the kernels that the interpreter ran (``launch_recorder``).

    python tests/helpers/compile_launches.py FOLDER [--each 6] [--capability 90] [--jobs 2]

The interpreter takes what the compiler does not: a variable that changes its type in a loop, a constant that is not
one. Triton compiles to machine code without a device; nothing is run. A launch in 16 bits is compiled as a GPU would
run it, with the arithmetic and the assembly that the interpreter does not have. ``--each`` launches of a kernel are
compiled, as different as they come. Machine code is searched for additions of pairs of 16-bit numbers whose constant
ptxas has lost (``lost_constants``). Ends with status 1 and the errors if any fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# ``hf_optim_kernels.common.compute_type``
MATH = {"*bf16": 0, "*fp16": 1}
FP32 = 2


def as_on_a_gpu(launch: dict[str, Any]) -> dict[str, Any]:
    """Return a launch with the constants that it has on a GPU of compute capability 9.0 or more.

    A kernel that multiplies in float16 whatever its arguments are does so under the interpreter, too.
    """
    math = next((MATH[kind] for kind, _ in launch["args"] if kind in MATH), None)
    constants = launch["constants"]
    # Launches that begin before the one before has ended, or let the next one (``common.launch.begins_early``).
    constants = constants | {name: True for name in ("EARLY", "AHEAD") if name in constants}
    if math is not None and "ASM" in constants:
        own = {name: math for name in ("MATH", "TAIL_MATH") if constants.get(name) == FP32}
        constants = {**constants, **own, "ASM": True}
    return {**launch, "constants": constants}


def chosen(launches: list[dict[str, Any]], each: int) -> list[dict[str, Any]]:
    """Return up to ``each`` launches of every kernel, spread over all that there are."""
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for launch in launches:
        kernels.setdefault((launch["module"], launch["name"]), []).append(launch)
    found = []
    for same in kernels.values():
        same.sort(key=lambda launch: json.dumps(launch, sort_keys=True, default=str))
        step = max(1.0, len(same) / each)
        found += [same[int(index * step)] for index in range(min(each, len(same)))]
    return found


def constant_of(value: Any) -> Any:
    """Return a constant from what JSON holds of it: types and ``constexpr`` numbers are written as words."""
    import triton.language as tl

    if not isinstance(value, str):
        return value
    if number := re.fullmatch(r"constexpr\[(-?\d+)\]", value):
        return int(number[1])
    kind = getattr(tl, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(value, value), None)
    return kind if isinstance(kind, tl.dtype) else value


def lost_constants(machine_code: str) -> list[str]:
    """Return the additions of zero to a pair of 16-bit numbers.

    ptxas 12.8 to 13.0 writes them for ``add.s16x2`` with a constant where one half of the result is read: what was to
    be added is lost. A sum with a true zero reads the register RZ instead.
    """
    return re.findall(r"VIADD\.16x2 [^;\n]*, 0x0\b", machine_code)


def compile_one(launch: dict[str, Any], capability: int) -> str | None:
    """Compile a launch; return the error, or None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["name"])
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, (name, (kind, known)) in enumerate(zip(names, launch["args"], strict=False)):
        if kernel.params[index].do_not_specialize and isinstance(known, int):
            kind, known = ("i32" if kind == "constexpr" else kind), False
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = known
        elif known:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in launch["constants"].items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = constant_of(value)
    try:
        source = ASTSource(kernel, {name: signature[name] for name in names}, constants, attributes)
        options = {"num_warps": launch["warps"], "num_stages": launch["stages"]}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        lost = lost_constants(made.asm["sass"])
    except Exception as error:
        shared = "shared memory" in str(error)
        return None if shared else f"{launch['module']}.{launch['name']}: {type(error).__name__}: {str(error)[-600:]}"
    if lost:
        return f"{launch['module']}.{launch['name']}: ptxas has lost constants of add.s16x2: {', '.join(lost)}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=6, help="launches of a kernel")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 90 for an H100 or H200")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of the name of a kernel's module")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("under TRITON_INTERPRET=1 kernels are interpreted, not compiled")
    lines = {line for file in args.folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()}
    launches = [launch for launch in map(json.loads, sorted(lines)) if args.only in launch["module"]]
    unknown = [launch for launch in launches if any("?" in kind for kind, _ in launch["args"])]
    done = chosen([as_on_a_gpu(launch) for launch in launches if launch not in unknown], args.each)
    with ProcessPoolExecutor(args.jobs) as pool:
        errors = [error for error in pool.map(compile_one, done, [args.capability] * len(done)) if error]
    kernels = {(launch["module"], launch["name"]) for launch in done}
    print(f"{len(done)} of {len(launches)} launches of {len(kernels)} kernels compiled, {len(errors)} failed; "
          f"{len(unknown)} with arguments that are not known here left out")  # fmt: skip
    for error in dict.fromkeys(errors):
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())

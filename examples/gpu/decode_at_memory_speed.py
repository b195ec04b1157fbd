"""Check, then time, everything that decoding a model needs on a GPU, beside what others offer, and the goals of it.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/decode_at_memory_speed.py [--only WORD ...] [--limit SECONDS]

First the tests of a section compare it with its references on the device; if one fails, it is not timed. Then its parts
run, each in a process that ends at its share of the limit:

- section 1: ``steps``, captured and compiled steps beside stock transformers (``generate.py``);
- section 2: ``long``, the same after long prompts, ``long-static`` stock with a static cache there; ``attention`` and ``memory``, the quantized cache (``kv_cache.py``);
  ``caches``, transformers' own quantized caches, for the libraries that are installed (``stock_caches.py``);
- section 3: ``layers``, products on layers that no table knows (``hf_optim_kernels.common.held_out``); ``peers``,
  products beside gemlite, bitsandbytes and torchao, those that are installed (``hf-optim bench --peers``).

Libraries are looked for as Python does: a folder of them in ``PYTHONPATH`` will do, behind this package's own. Those
that are missing are named on the page.

``--only`` takes sections (``1``), parts, and ``checks-1`` to ``checks-3``; a part without its checks says so. Results
are kept in ``$OUT`` (or here) as ``decode-at-memory-speed.json``, with those of earlier runs in the same folder, and
against the goals as ``decode-at-memory-speed.md`` (``--render`` writes this page again, and measures nothing).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import decode_goals

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("OUT", ".")).resolve()
NAME = "decode-at-memory-speed"
ROWS = ("1", "16", "64", "256", "4096")
STEPS = ("dense", "w4a16", "w8a8", "2:4-w4a16", "dense-stock", "w4a16-stock", "w8a8-stock")
# Of the layers that no table knows, as many as fit into the time at all numbers of rows, from 1 to 8,192.
LAYERS = ("3584x3584", "3584x18944", "4608x3584", "5120x5120", "37888x3584", "10240x8192")
LONG = ("long", "long-8", "long-32000", "long-8-32000")
STATIC = ("long-stock", "long-8-stock")


class Part(NamedTuple):
    """A part of a section: seconds that it takes, its command without the interpreter, and the file it writes."""

    section: int
    seconds: float
    command: tuple[str, ...]
    file: str


def tests_of(*names: str) -> tuple[str, ...]:
    """Return the command of the tests that need a GPU, on several processes if pytest can."""
    many = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    # pytest-benchmark, where it is installed, warns beside several processes, and warnings are errors.
    return ("-m", "pytest", "-q", "-m", "gpu", *many, *(f"{ROOT}/tests/{name}" for name in names))


KERNEL_TESTS = ("wna16", "w8a8", "sparse24", "sparse24_tiles", "llm_int8", "wide_kernels")
CHECKS = {
    1: tests_of("generation"),
    2: tests_of("kernels/test_decode_attention.py", "kernels/test_kv_cache_kernels.py"),
    3: tests_of(*(f"kernels/test_{name}.py" for name in KERNEL_TESTS)),
}
CHECK_SECONDS = 120.0
PARTS = {
    "steps": Part(1, 190, (f"{HERE}/generate.py", "--only", *STEPS, "--output", "{file}", "--limit", "{seconds}"),
                  "generate.json"),
    "long": Part(2, 150, (f"{HERE}/generate.py", "--only", *LONG, "--output", "{file}", "--limit", "{seconds}"),
                 "long.json"),
    "long-static": Part(2, 120, (f"{HERE}/generate.py", "--only", *STATIC, "--output", "{file}", "--limit", "{seconds}"),
                        "long-static.json"),
    "attention": Part(2, 90, (f"{HERE}/kv_cache.py", "times"), "kv-cache.json"),
    "memory": Part(2, 60, (f"{HERE}/kv_cache.py", "generate"), "kv-cache.json"),
    "caches": Part(2, 90, (f"{HERE}/stock_caches.py",), "caches.json"),
    "layers": Part(3, 180, ("-m", "hf_optim_kernels.common.held_out", "--budget", "{seconds}", "--shapes", *LAYERS),
                   "held-out.json"),
    "peers": Part(3, 120, ("-m", "hf_optim.cli", "bench", "--op", "wna16", "w8a8", "sparse24", "llm_int8", "--peers",
                           "--shape", "14336x4096", "--rows", *ROWS, "--time-limit", "{seconds}", "--output",
                           "{folder}"), "peers/results.json"),
}  # fmt: skip


def chosen(words: list[str]) -> tuple[list[int], list[str]]:
    """Return the sections to check, and the parts to time. Raises ``ValueError`` for a word that names nothing."""
    if not words:
        return sorted(CHECKS), list(PARTS)
    names = {str(section): section for section in CHECKS}
    checks = {f"checks-{section}": section for section in CHECKS}
    if unknown := [word for word in words if word not in {*names, *checks, *PARTS}]:
        raise ValueError(f"nothing is named {', '.join(unknown)}; there are {', '.join([*names, *checks, *PARTS])}")
    sections = {names[word] for word in words if word in names}
    tested = sections | {checks[word] for word in words if word in checks}
    return sorted(tested), [name for name, part in PARTS.items() if part.section in sections or name in words]


def run(command: list[str], seconds: float, **options: Any) -> tuple[int | None, str, str]:
    """Run a command for at most ``seconds``; return its status (None: it was stopped), and what was captured of it.

    Processes that it started end with it: they would take time of what is measured next.
    """
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        out, errors = process.communicate(timeout=seconds)
    except BaseException as problem:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(problem, subprocess.TimeoutExpired):
            raise
        return None, "", ""
    return process.returncode, out or "", errors or ""


def check(section: int, seconds: float) -> dict[str, Any]:
    """Run the tests of a section; return how they ended, and their last line."""
    pipe = subprocess.PIPE
    status, out, errors = run([sys.executable, *CHECKS[section]], seconds, stdout=pipe, stderr=pipe)
    if status is None:
        result = {"status": "not finished", "said": f"after {seconds:.0f} s", "failures": []}
    else:
        lines = [line for line in out.splitlines() if line.strip()]
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        said = (lines or [errors.strip()[-200:]])[-1].strip("= ")
        # Status 5: no test was collected, so nothing was checked.
        result = {"status": "passed" if status == 0 else "FAILED", "said": said, "failures": failures}
    print(
        f"checks of section {section}: {result['status']}, {result['said']}", *result["failures"], sep="\n", flush=True
    )
    return result


def measure(name: str, seconds: float) -> dict[str, Any] | None:
    """Run a part; return what it has written, or None if it wrote nothing in this run."""
    part, file = PARTS[name], OUT / PARTS[name].file
    file.unlink(missing_ok=True)
    words = {"{file}": str(file), "{folder}": str(file.parent), "{seconds}": f"{0.85 * seconds:.0f}"}
    print(f"== {name}", flush=True)
    # Sections of examples choose by the words of their command line, so they get no other.
    command = [sys.executable, *(words.get(word, word) for word in part.command)]
    status, _, _ = run(command, seconds, env={**os.environ, "OUT": str(OUT)})
    ended = f"stopped after {seconds:.0f} s" if status is None else f"ended with status {status}" if status else ""
    if ended:
        print(f"{name}: {ended}", flush=True)
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    result["ended"] = ended
    if name == "peers":
        from hf_optim.evaluation.bench.peers import PEERS

        result["missing"] = sorted({peer.package for peer in PEERS if peer.missing() and peer.package})
    return result


def about() -> dict[str, str]:
    """Return the device and the versions."""
    import torch
    import transformers
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": device, **versions}


def write(found: dict[str, Any], page: Path) -> None:
    """Keep the results and write the page."""
    (OUT / f"{NAME}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page.write_text(decode_goals.page(found["parts"], found["about"]), encoding="utf-8")


def main() -> int:
    """Check and time; return 1 if a check or a part failed."""
    parser = argparse.ArgumentParser(description="Check and time what decoding needs on a GPU, against its goals.")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="sections, parts, checks-SECTION (all)")
    parser.add_argument("--limit", type=float, help="seconds for everything (what the chosen parts usually take)")
    parser.add_argument("--render", type=Path, metavar="JSON", help="write the page of earlier results beside them")
    args = parser.parse_args()
    if args.render is not None:
        found = json.loads(args.render.read_text(encoding="utf-8"))
        page = args.render.with_suffix(".md")
        page.write_text(decode_goals.page(found["parts"], found["about"]), encoding="utf-8")
        return 0
    try:
        tested, parts = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    usual = CHECK_SECONDS * len(tested) + sum(PARTS[name].seconds for name in parts)
    scale = (args.limit or usual) / usual
    kept = OUT / f"{NAME}.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"parts": {}}
    found["about"] = about()
    failed, begin = [], time.monotonic()
    for section in sorted({*tested, *(PARTS[name].section for name in parts)}):
        if section in tested:
            result = check(section, CHECK_SECONDS * scale)
            found["parts"].setdefault("checks", {})[str(section)] = result
            if result["status"] != "passed":
                failed.append(f"checks-{section}")
                write(found, OUT / f"{NAME}.md")
                if result["failures"]:
                    print(f"section {section} is not timed", flush=True)
                    continue
        for name in [name for name in parts if PARTS[name].section == section]:
            result = measure(name, PARTS[name].seconds * scale)
            if result is None or result["ended"]:
                failed.append(name)
            if result is not None:
                found["parts"][name] = result
            write(found, OUT / f"{NAME}.md")
    print(
        f"{time.monotonic() - begin:.0f} s; " + (f"failed or not finished: {', '.join(failed)}" if failed else "done")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the interpreter runs is compiled for a GPU that is not there, and what does not compile is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
from compile_launches import constant_of, lost_constants

TESTS = Path(__file__).parent
HELPERS = TESTS.parent / "helpers"
pytestmark = pytest.mark.slow


def run(*words, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HELPERS), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words], env={**environment, "PYTHONPATH": path, **variables}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    ended = run(
        "-m", "pytest", "-q", "-p", "launch_recorder", "-p", "no:cacheprovider", "-m", "interpreted",
        str(TESTS / "test_hadamard.py"), TRITON_INTERPRET="1", LAUNCHES=str(folder),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:]
    return folder


def test_launches_of_the_interpreter_compile(launches):
    ended = run(str(HELPERS / "compile_launches.py"), str(launches), "--each", "2", "--jobs", "1")
    assert ended.returncode == 0, ended.stderr
    assert " 0 failed" in ended.stdout
    assert not ended.stdout.startswith("0 of")


def test_what_does_not_compile_is_named(launches, tmp_path):
    line = next(iter(launches.glob("*.jsonl"))).read_text().splitlines()[0]
    broken = json.loads(line)
    broken["args"][0] = ["fp32", False]  # an address that is a number
    (tmp_path / "1.jsonl").write_text(json.dumps(broken) + "\n")
    ended = run(str(HELPERS / "compile_launches.py"), str(tmp_path), "--jobs", "1")
    assert ended.returncode == 1
    assert broken["name"] in ended.stderr
    assert "1 failed" in ended.stdout


def test_hashing_keeps_its_constants(tmp_path):
    """For 8 x 6 buckets ptxas lost the place of the second hash's columns: every bucket was 32 too high."""
    args = [["*fp32", True], ["*i32", True], ["*i16", True], *([["i32", False]] * 9)]
    sizes = {"ROWS": 64, "BLOCK_D": 32, "COLUMNS": 16}
    lines = [
        json.dumps({
            "module": "hf_optim_kernels.bucket_order.kernel", "name": "_hash_kernel", "warps": 4, "stages": 1,
            "args": [[kind, True], *args[1:]], "constants": {**sizes, "FIRST": first, "SECOND": second},
        })
        for kind in ("*fp32", "*bf16") for first, second in ((8, 6), (6, 8), (16, 0))
    ]  # fmt: skip
    (tmp_path / "1.jsonl").write_text("\n".join(lines))
    ended = run(str(HELPERS / "compile_launches.py"), str(tmp_path), "--jobs", "1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("6 of 6")


def test_a_lost_constant_is_found():
    kept = "VIADD.16x2 R7, R2, 0xffe0 ;\nVIADD.16x2 R0, R2, RZ ;\nVIADD R5, R5, 0x0 ;\nVIADD.16x2 R8, R9, 0x0a ;"
    assert lost_constants(kept) == []
    assert lost_constants(f"{kept}\nVIADD.16x2 R20, R20, 0x0 ;") == ["VIADD.16x2 R20, R20, 0x0"]


def test_constants_survive_json():
    constants = [tl.float32, tl.int16, tl.constexpr(3), "silu", "", 2, True, None]
    words = json.loads(json.dumps(constants, default=str))
    assert list(map(constant_of, words)) == [tl.float32, tl.int16, 3, "silu", "", 2, True, None]

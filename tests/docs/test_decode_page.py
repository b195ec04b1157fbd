"""The script of decoding: what it runs, what it does not time, and the page against the goals."""

from __future__ import annotations

import fcntl
import importlib
import json
import time

import pytest
from conftest import ROOT

HOME = ROOT / "model_cards" / "measurements"


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "gpu"))
    return importlib.import_module("decode_goals")


@pytest.fixture
def script(goals, monkeypatch, tmp_path):
    """The script with two parts that write a file, and checks that a test chooses."""
    module = importlib.import_module("decode_at_memory_speed")
    monkeypatch.setattr(module, "OUT", tmp_path)
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"rows\": []}')"
    parts = {
        name: module.Part(s, 5, ("-c", write, "{file}"), f"{name}.json") for s, name in ((1, "steps"), (2, "long"))
    }
    monkeypatch.setattr(module, "PARTS", parts)
    monkeypatch.setattr(module, "about", lambda: {"device": "GPU"})
    return module


def run(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["decode_at_memory_speed.py", *words])
    return script.main()


def test_the_page_is_what_the_results_give(goals):
    kept = HOME / "decode-at-memory-speed-h200.json"
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert kept.with_suffix(".md").read_text(encoding="utf-8") == goals.page(found["parts"], found["about"])


def test_what_is_not_measured_is_from_the_record_and_said(goals):
    row = {"way": "graph", "scheme": "w4a16", "batch": 1, "layers": 32, "prompt": 128, "ms_per_token": 2.73}
    text = goals.page({"steps": {"rows": [row]}}, {"device": "GPU", "torch": "2"})
    assert "| 1 | w4a16, batch 1: ms a token | <= 2.6 ms | 2.730 | **missed** by 5.0% |" in text
    assert "| 1 | w8a8, batch 8: ms a token | <= 4.1 ms | - | not measured |" in text
    assert "steps: this run" in text
    assert "layers: [on record](../../model_cards/kernels/layers/h200.json)" in text
    assert "No checks ran with this page." in text
    assert all((ROOT / path).is_file() for path in goals.RECORDS.values())


def test_steps_that_a_run_has_not_reached_are_from_the_record_and_said(goals):
    row = {"way": "graph", "scheme": "dense", "batch": 8, "layers": 8, "prompt": 8000, "vocabulary": 128_256}
    run = {"long": {"rows": [{**row, "ms_per_token": 1.9}], "tree": "kernels of today"}}
    text = goals.page(run, {"device": "GPU"})
    assert "long: this run (kernels of today), and what it has not, [on record](" in text
    assert "| 2 | 8 layers, 8 x 8,000 tokens, 128,256 words: ms a token | <= 2 ms | 1.900 | met |" in text
    assert "| 2 | 8 layers, 1 x 30,000 tokens, 128,256 words: ms a token (on record) | <= 1.5 ms | 1.566 |" in text
    assert "| 8 x 8,000 | 128,256 | captured and compiled | 1.900 |" in text
    assert "| 8 x 8,000 | 128,256 | captured and compiled, on record |" not in text
    assert "| 8 x 8,000 | 128,256 | captured, on record | 2.421 |" in text


@pytest.mark.parametrize(
    ("least", "found", "verdict"),
    [
        (True, 0.85, "met"),
        (True, 0.765, "**missed** by 10.0%"),
        (False, 0.85, "met"),
        (False, 0.935, "**missed** by 10.0%"),
        (False, None, "not measured"),
    ],
)
def test_a_goal_is_met_at_its_limit_and_missed_beyond(goals, least, found, verdict):
    assert goals.Goal(1, "", 0.85, "", least, found).verdict == verdict


def test_layers_are_counted_with_their_slowest(goals):
    cells = [{"op": "w8a8", "N": n, "K": 8, "M": 16, "us": us, "dense_us": 9.7} for n, us in ((8, 10.0), (16, 10.2))]
    results = {"layers": {"cells": [*cells, {"op": "w8a8", "N": 8, "K": 8, "M": 1, "us": "out of memory"}]}}
    assert "| w8a8 | 1/2 (0.95) |" in goals.layers(results)


def test_sections_and_parts_are_chosen_by_name(goals):
    module = importlib.import_module("decode_at_memory_speed")
    assert module.chosen([]) == ([1, 2, 3], list(module.PARTS))
    assert module.chosen(["3"]) == ([3], ["layers", "peers"])
    assert module.chosen(["checks-2", "long"]) == ([2], ["long"])
    with pytest.raises(ValueError, match=r"nothing is named layer; there are 1, 2, 3, checks-1, .*, peers"):
        module.chosen(["layer"])


def test_a_section_whose_checks_fail_is_not_timed(script, monkeypatch, tmp_path):
    end = "print('FAILED a::b'); print('1 failed'); raise SystemExit({})"
    monkeypatch.setattr(script, "CHECKS", {1: ("-c", end.format(1)), 2: ("-c", "print('3 passed')")})
    assert run(script, monkeypatch) == 1
    kept = json.loads((tmp_path / f"{script.NAME}.json").read_text(encoding="utf-8"))["parts"]
    assert kept["checks"]["1"] == {"status": "FAILED", "said": "1 failed", "failures": ["FAILED a::b"]}
    assert "steps" not in kept
    assert kept["long"] == {"rows": [], "ended": ""}
    text = (tmp_path / f"{script.NAME}.md").read_text(encoding="utf-8")
    assert "| 1 | FAILED | 1 failed |" in text
    assert "| 2 | passed | 3 passed |" in text


def test_a_part_that_ends_early_keeps_what_it_wrote_and_another_run_adds_to_it(script, monkeypatch, tmp_path):
    held = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    slow = (
        "import pathlib, subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {held!r}, sys.argv[1] + '.lock'], stdout=subprocess.PIPE); "
        "child.stdout.readline(); pathlib.Path(sys.argv[1]).write_text('{\"rows\": []}'); time.sleep(60)"
    )
    monkeypatch.setitem(script.PARTS, "steps", script.Part(1, 3, ("-c", slow, "{file}"), "steps.json"))
    assert run(script, monkeypatch, "--only", "steps") == 1
    begin = time.monotonic()
    with (tmp_path / "steps.json.lock").open() as file:  # the process that it started has ended with it
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - begin < 20
    monkeypatch.setitem(script.PARTS, "long", script.Part(2, 3, ("-c", "raise SystemExit(3)"), "long.json"))
    assert run(script, monkeypatch, "--only", "long") == 1
    kept = json.loads((tmp_path / f"{script.NAME}.json").read_text(encoding="utf-8"))["parts"]
    assert kept == {"steps": {"rows": [], "ended": "stopped after 3 s"}}

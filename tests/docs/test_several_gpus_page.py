"""The page on several GPUs follows from the results, says what failed, and counts codes one by one."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

HOME = ROOT / "model_cards" / "measurements"
FOLDER = ROOT / "examples" / "gpu" / "several"


@pytest.fixture(scope="module")
def load():
    sys.path.insert(0, str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"several_gpus_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(FOLDER))
    for name in ("ranks", "tensor_parallel"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_results_give(load):
    page = load("page")
    kept = HOME / f"{page.NAME}.json"
    if not kept.exists():
        pytest.skip("not measured")
    text = (HOME / f"{page.NAME}.md").read_text(encoding="utf-8")
    assert text == page.page(json.loads(kept.read_text(encoding="utf-8")))


def test_what_failed_or_was_not_run_stands_on_the_page(load):
    about = {"device": "GPU", "ranks": 2, "link": "NVLink (NV18)", "torch": "2"}
    row = {"way": "door", "batch": 1, "error": "RuntimeError: no | graph"}
    results = {
        "8b-w4a16-1": {**about, "ranks": 1, "name": "8b-w4a16", "rows": [{**row, "way": "stock", "error": "out"}]},
        "8b-w4a16-2": {**about, "name": "8b-w4a16", "rows": [row]},
        "jobs": {"jobs": [{"job": "exchange", "status": "out of time"}, {"job": "mixture", "status": 0}]},
    }
    text = load("page").page(results)
    assert text.startswith("# Several GPUs of one host\n\n2 x GPU, NVLink (NV18)")
    assert "No figures (exchange: out of time)." in text
    assert "| 8b-w4a16 | 2 | door | 1 | RuntimeError: no / graph |" in text
    assert text.count("No figures (not run).") == 6
    assert "exchange (out of time)." in text.rpartition("## What did not end in order")[2]


def test_efficiency_is_the_time_of_one_by_that_of_all(load):
    def one(ranks, ms):
        rows = [{"way": "stock", "batch": 1, "ms_per_token": ms, "tokens_per_s": 1e3 / ms, "peak_gib": 3.0}]
        return {"device": "GPU", "ranks": ranks, "link": "", "name": "8b-w8a8", "gib_after_load": 2.0, "rows": rows}

    text = load("page").page({"8b-w8a8-1": one(1, 3.0), "8b-w8a8-4": one(4, 1.0)})
    assert "| 8b-w8a8 | 4 | stock | 1 | 1.000 | 1000 | 75% | 2.0 / 3.0 |" in text


def test_codes_are_compared_one_by_one(load):
    one = {
        "a.weight_packed": torch.tensor([[0x12345678, -1], [0, -(2**31)]], dtype=torch.int32),
        "a.weight_scale": torch.ones(2, 1),
    }
    other = {**one, "a.weight_packed": torch.tensor([[0x12345679, -1], [0, 2**31 - 1]], dtype=torch.int32)}
    found = load("calibration").compare(one, other)
    assert found["codes"] == 32
    assert found["equal_share"] == pytest.approx(1 - 9 / 32)  # the last code of the first word, all of the last word
    assert found["scales_equal"]
    assert load("calibration").compare(one, one)["equal_share"] == 1.0

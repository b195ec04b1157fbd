"""The pages on sparse and on learned attention on a GPU are what their records give."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import ROOT

HOME = ROOT / "model_cards" / "kernels"


def rendering(name):
    """Return the module of ``examples/gpu`` that renders a page."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "gpu" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def encoders():
    return json.loads((HOME / "sparse_attention" / "sparse_encoders.json").read_text(encoding="utf-8"))


def sparse_page(encoders):
    kernel = json.loads((HOME / "sparse_attention" / "sparse_attention.json").read_text(encoding="utf-8"))
    return rendering("sparse_attention_page").page(kernel, encoders)


def test_the_page_on_sparse_attention_is_what_its_records_give(encoders):
    assert (HOME / "sparse_attention" / "README.md").read_text(encoding="utf-8") == sparse_page(encoders)


def test_it_names_what_is_slow_what_is_not_captured_and_what_is_older(encoders):
    encoders["times"]["local"]["4096"]["graph_ms"] = 2.5
    encoders["called"]["local"]["16384"]["captured_ms"] = 3.2
    encoders["called"]["etc"]["4096"]["failure"] = "a hook"
    del encoders["called"]["axial"]
    encoders["of an earlier run"] = ["stock BigBird"]
    page = sparse_page(encoders)
    assert "replayed: local 2.50 at 4,096, " in page
    assert "Over the goals, captured: local 3.20 at 16,384, " in page
    assert "Not captured: etc (a hook). Not measured in this way: axial." in page
    assert "Of an earlier run, with the same versions: stock BigBird." in page
    del encoders["of an earlier run"]
    assert "earlier run" not in sparse_page(encoders)


def test_the_page_on_learned_attention_is_what_its_records_give():
    module, folder = rendering("learned_attention_page"), HOME / "learned_attention"
    assert (folder / "README.md").read_text(encoding="utf-8") == module.page(folder, module.loaded(folder))


def test_it_takes_each_line_of_the_latest_record_that_has_it():
    module = rendering("learned_attention_page")
    rows = {n: {"forward_us": 3.0, "step_us": 9.0} for n in (4096, 8192)}
    newer = {n: {"forward_us": 1.0} for n in (4096, 8192)}
    dense = {n: {"forward_us": 2.0, "step_us": 4.0} for n in (4096, 8192)}
    names = {"performer": rows, "sdpa, causal": dense}
    records = {"first": {"rows": names}, "second": {"rows": {**names, "performer": newer}}}
    assert module.latest(records, "performer", "forward")["performer"] is newer
    assert module.latest(records, "performer", "step")["performer"] is rows
    assert module.verdicts(records)["verdict"] == "**met**: performer from 4,096"
    records["second"]["kernels"] = {"performer": [["_scan_kernel", 2, 5.0], ["cudaLaunchKernel", 2, 0]]}
    assert "- `performer`: 5 in 2 launches: `_scan_kernel` 5 (2)" in module.kernels(records["second"])

"""The page on sparse projections and Terraformer follows from the results, and its figures from the models."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import ROOT

HOME = ROOT / "model_cards" / "sparsity"


@pytest.fixture(scope="module")
def load():
    folder = ROOT / "examples" / "sparsity"
    sys.path.insert(0, str(folder))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(folder))
    for name in ("scaling_page", "sparse_projections", "terraformer"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_results_give(load):
    results = [json.loads((HOME / f"{name}.json").read_text()) for name in ("sparse_projections", "terraformer")]
    assert (HOME / "scaling.md").read_text(encoding="utf-8") == load("scaling_page").page(*results)


def test_bytes_that_a_token_reads_are_those_of_one_unit_of_each_block(load):
    script = load("terraformer")
    dense = load("sparse_projections").llama(64, 2, 2, 256, 128, 64, 0)
    blocks = sum(p.numel() for name, p in dense.named_parameters() if ".layers." in name)
    assert script.bytes_read(dense) == 4 * blocks
    step = {**script.STEP, **script.OFF, "sparse_ffn": True, "rank": 8}
    sparse = load("sparse_projections").converted(dense, step, 0)
    units = 3 * 256 * 64
    controller = 8 * 64 + 256 * 8 + 256 + 64
    assert script.bytes_read(sparse) == 4 * (blocks + 2 * (units // 64 - units + controller))

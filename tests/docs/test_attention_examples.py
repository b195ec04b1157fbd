"""The pages of the attention examples: rendered from their records, in which figures follow from the sizes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import ROOT

CARDS = ROOT / "model_cards" / "attention"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("mqa_page", ROOT / "examples" / "attention" / "mqa_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_record_gives(page, tmp_path):
    (tmp_path / "mqa.json").write_text((CARDS / "mqa.json").read_text(encoding="utf-8"), encoding="utf-8")
    page.write(tmp_path)
    assert (tmp_path / "mqa.md").read_text(encoding="utf-8") == (CARDS / "mqa.md").read_text(encoding="utf-8")
    assert (tmp_path / "mqa.png").stat().st_size > 10_000


def test_caches_shrink_with_the_heads():
    results = json.loads((CARDS / "mqa.json").read_text(encoding="utf-8"))
    for part in ("pretrained", "known_share"):
        rows = results[part]["variants"].values()
        assert len({row["cache_bytes"] / row["kv_heads"] for row in rows}) == 1
    context = results["decoding"]["context"]
    for heads, row in results["decoding"]["kv_heads"].items():  # two layers, keys and values, 64 channels, float32
        tokens = row["cache_bytes"] / (2 * 2 * int(heads) * 64 * 4)
        assert context < tokens < context + 32

"""The card of a result names the licence of the model that it was made from."""

from __future__ import annotations

import pytest
import yaml
from tiny_models import tiny_llama

import hf_optim
from hf_optim.runs.base_licence import licence_of


def test_the_licence_of_the_original_is_on_the_card(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    hf_optim.optimize(model, [{"technique": "rtn"}]).save_pretrained(tmp_path / "result")
    front = (tmp_path / "result/README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    again = type(model).from_pretrained(tmp_path / "result", optim_config=[{"technique": "kv_cache", "residual": 0}])
    assert hf_optim.run_of(again).record.base_model["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "card",
    ["", "license: mit", "---\nlicense: [mit]\n---", "---\nlicense: 'a b'\n---", "---\n*x\n---", "---\n- a\n---", "\0"],
)
def test_a_card_that_names_none_gives_none(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == ""
    assert licence_of("nobody/has-this") == licence_of(None) == ""

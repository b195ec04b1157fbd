"""Regular expressions of recipes and configurations: those that could take for ever are refused."""

from __future__ import annotations

import json
import time

import pytest
import torch

import hf_optim
from hf_optim import CheckpointError, RecipeError
from hf_optim.testing.models import tiny_llama
from hf_optim.toolkit.topology.selection import match
from hf_optim.trust.patterns import compile_pattern

NAMES = [f"model.layers.{number}.self_attn.q_proj" for number in range(30)]
SLOW = ("(.*)*x", "(.+)+\\d{9}", "(a|a)*b", "((a{0,50}){0,50}){0,50}", "(.*)(\\1)+x", "(?=(.*)*x)", "(?:(?:l|a)+y)+x")


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_with_repeats_of_repeats_is_refused(pattern):
    begun = time.process_time()
    with pytest.raises(ValueError, match="take for ever"):
        compile_pattern(pattern)
    with pytest.raises(ValueError, match="take for ever"):
        match(NAMES, [f"re:{pattern}"])
    with pytest.raises(RecipeError, match=r"targets: the regular expression"):
        hf_optim.OptimConfig.parse({"steps": [{"technique": "rtn", "targets": [f"re:{pattern}"]}]})
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is not a regular expression"), ("x" * 600, "more than 500"), (".*" * 9, "more than 8 repeats")],
)
def test_other_expressions_that_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.q_proj",
        r".*layers\.([0-9]|1[0-9])\..*",
        r"(?:.*\.)?model\.layers\.\d+\.self_attn\.(q|k|v)_proj$",
        r"model\.layers\.\d{1,2}\..*proj",
        r"^(?!.*lm_head).*$",
    ],
)
def test_expressions_that_people_write_are_accepted(pattern):
    assert match(NAMES, [f"re:{pattern}"])


def test_an_expression_in_a_quantization_config_is_checked_before_loading(tmp_path):
    with torch.no_grad():
        hf_optim.optimize(tiny_llama(), [{"technique": "rtn", "bits": 4, "group_size": 16}]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["re:(.*)*xyz"]
    path.write_text(json.dumps(config))
    from hf_optim.checkpoints.source import ModelSource, load_model

    with pytest.raises(CheckpointError, match=r"quantization_config of config\.json: the regular expression"):
        load_model(ModelSource(str(tmp_path)))

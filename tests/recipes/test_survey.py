"""Every technique of the survey "Large Transformer Model Inference Optimization" stands in the list, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_optim.cli import main
from hf_optim.recipes.catalogue import catalogue

SURVEY = {
    "quantization": "rtn gobo mixed_precision llm_int8 qbert peg zeroquant lkd obq gptq smoothquant qat",
    "distillation": "logit_kd distilbert",
    "pruning": "magnitude gmp iterative lottery_ticket lr_rewinding variational_dropout l0 structured",
    "sparsity": "nm channel_permutation sr_ste top_kast sparse_ffn sparse_qkv terraformer",
    "moe": "upcycle moefication capacity_routing batch_priority_routing vmoe task_moe pr_moe hierarchical_all_to_all "
    "tutel dynamoe",
    "attention": "blockwise local strided dilated compressed sparse_transformer axial etc longformer big_bird reformer "
    "routing_transformer sinkhorn transformer_xl universal_transformer compressive_transformer set_transformer "
    "linformer mqa performer rfa",
    "adaptive": "adaptive_span act depth_adaptive calm",
    "runtime": "offload padding_removal kv_cache parallelism",
}
ROWS = [(family, name) for family, names in SURVEY.items() for name in names.split()]
TESTS = Path(__file__).parent.parent


def test_the_survey_has_68_techniques_and_the_list_has_them(capsys):
    assert len(ROWS) == len(set(ROWS)) == 68
    main(["list", "--json"])
    listed = {entry["name"] for entry in json.loads(capsys.readouterr().out)["techniques"]}
    assert listed >= {name for _, name in ROWS}


@pytest.mark.parametrize(("family", "name"), ROWS, ids=[name for _, name in ROWS])
def test_a_technique_is_of_its_family_and_has_tests_that_name_it(family, name):
    spec = catalogue().get(name).spec
    assert (spec.name, spec.family) == (name, family)
    used = re.compile(rf"[\"'_ .]{name}[\"'._ ]|\btechnique: {name}\b")
    found = [path for path in (TESTS / "plugins").rglob("test_*.py") if used.search(path.read_text(encoding="utf-8"))]
    assert found

"""Recipes of llm-compressor as recipes of hf_optim: every modifier, what is named as missing, and hostile files."""

from __future__ import annotations

import random

import pytest
import torch
import yaml
from tiny_models import tiny_llama

from hf_optim import OptimConfig, RecipeError, optimize
from hf_optim.recipes.conversion.llm_compressor import translate, translate_file

IDS = torch.randint(2, 60, (8, 24), generator=torch.Generator().manual_seed(0))
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def stage(**modifiers):
    return {"quant_stage": {"quant_modifiers": modifiers}}


def group(weights=W4, inputs=None, targets=("Linear",)):
    return {"group_0": {"weights": weights, "input_activations": inputs, "targets": list(targets)}}


def quantization(**fields):
    return stage(QuantizationModifier={"ignore": ["lm_head"], **fields})


def gptq(**fields):
    return stage(GPTQModifier={"ignore": ["lm_head"], **fields})


INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}
FP8_TOKEN = {**INT8_TOKEN, "type": "float"}

COMPLETE = {
    "inputs of 4 bits": (
        quantization(config_groups=group(W4, {**INT8_TOKEN, "num_bits": 4})),
        [{"technique": "rtn", "scheme": "W4A4"}],
    ),
    "rotations": (
        stage(SpinQuantModifier={"rotations": ["R1"]}, QuantizationModifier={"scheme": "FP8", "ignore": ["lm_head"]}),
        [{"technique": "rotation", "where": ["residual"]}, {"technique": "rtn", "scheme": "FP8"}],
    ),
    "awq": (
        stage(AWQModifier={"scheme": "W4A16_ASYM", "targets": ["Linear"], "ignore": ["lm_head"], "n_grid": 20}),
        [{"technique": "awq", "scheme": "W4A16_ASYM"}, {"technique": "rtn", "scheme": "W4A16_ASYM"}],
    ),
    "autoround": (
        stage(AutoRoundModifier={"iters": 100, "lr": 0.01, "scheme": "W4A16", "ignore": ["lm_head"]}),
        [{"technique": "signround", "scheme": "W4A16", "steps": 100, "learning_rate": 0.01}],
    ),
    "a preset": (gptq(scheme="W4A16"), [{"technique": "gptq", "scheme": "W4A16"}]),
    "a preset for some layers": (
        gptq(scheme={"W8A16": ["re:.*mlp.*"]}),
        [{"technique": "gptq", "targets": ["re:.*mlp.*"], "scheme": "W8A16"}],
    ),
    "groups that are a preset": (gptq(config_groups=group()), [{"technique": "gptq", "scheme": "W4A16"}]),
    "groups that are none": (
        gptq(config_groups=group({**W4, "group_size": 64, "symmetric": False, "observer": "mse"}), actorder=None),
        [{"technique": "gptq", "bits": 4, "group_size": 64, "symmetric": False, "observer": "mse", "act_order": False}],
    ),
    "all the numbers of gptq": (
        gptq(
            scheme="W4A16", dampening_frac=0.1, block_size=64, actorder="weight", ignore=["lm_head", "re:.*down_proj"]
        ),
        [{"technique": "gptq", "skip": ["re:.*down_proj"], "scheme": "W4A16", "damp": 0.1, "block_size": 64}],
    ),
    "gptq with the format of the modifier before": (
        stage(
            QuantizationModifier={
                "ignore": ["lm_head"],
                "config_groups": group({"num_bits": 8, "strategy": "channel"}),
            },
            GPTQModifier={"block_size": 64},
        ),
        [{"technique": "gptq", "bits": 8, "group_size": None, "block_size": 64}],
    ),
    "channels by group_size -1": (
        gptq(config_groups=group({"num_bits": 4, "group_size": -1})),
        [{"technique": "gptq", "bits": 4, "group_size": None}],
    ),
    "rounding": (quantization(scheme="FP8_DYNAMIC"), [{"technique": "rtn", "scheme": "FP8_DYNAMIC"}]),
    "rounding, written out": (
        quantization(config_groups=group(FP8_CHANNEL, FP8_TOKEN)),
        [{"technique": "rtn", "scheme": "FP8_DYNAMIC"}],
    ),
    "no strategy is one scale per tensor": (
        quantization(config_groups=group({"num_bits": 8})),
        [{"technique": "rtn", "bits": 8, "strategy": "tensor", "group_size": None}],
    ),
    "static inputs with a zero point": (
        quantization(config_groups=group({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "symmetric": False})),
        [
            {
                "technique": "rtn",
                "bits": 8,
                "group_size": None,
                "activations": "int8",
                "dynamic": False,
                "symmetric_activations": False,
            }
        ],
    ),
    "an observer for the modifier": (
        quantization(scheme="W4A16", weight_observer="mse"),
        [{"technique": "rtn", "scheme": "W4A16", "observer": "mse"}],
    ),
    "smoothing before": (
        stage(
            SmoothQuantModifier={"smoothing_strength": 0.8, "mappings": [[["re:.*q_proj"], "re:.*input_layernorm"]]},
            GPTQModifier={"scheme": "W8A8", "targets": "Linear", "ignore": ["re:.*lm_head"], "offload_hessians": True},
        ),
        [{"technique": "smoothquant", "alpha": 0.8, "pairs": False}, {"technique": "gptq", "scheme": "W8A8"}],
    ),
    "sparsegpt": (
        stage(
            SparseGPTModifier={
                "sparsity": 0.5,
                "mask_structure": "2:4",
                "dampening_frac": 0.1,
                "targets": ["re:.*layers.0$", "model.layers.1", "re:.*layers.\\d+$"],
                "ignore": ["re:.*lm_head"],
            }
        ),
        [
            {
                "technique": "nm",
                "score": "obs",
                "compensate": True,
                "damp": 0.1,
                "keep": 2,
                "group": 4,
                "targets": ["re:.*layers.0\\.", "model.layers.1.*", "re:.*layers.\\d+\\."],
            }
        ],
    ),
    "the first number of a mask structure is what is removed": (
        stage(WandaPruningModifier={"sparsity": 0.25, "mask_structure": "1:4", "ignore": ["lm_head"]}),
        [{"technique": "nm", "score": "activation", "keep": 3, "group": 4}],
    ),
    "wanda without a structure": (
        stage(WandaPruningModifier={"sparsity": 0.6, "ignore": ["lm_head"]}),
        [{"technique": "magnitude", "score": "activation", "scope": "row", "sparsity": 0.6}],
    ),
    "masks of an earlier stage": (
        {
            "pruning_stage": {
                "pruning_modifiers": {
                    "MagnitudePruningModifier": {
                        "init_sparsity": 0.0,
                        "final_sparsity": 0.5,
                        "targets": "__ALL_PRUNABLE__",
                    },
                    "ConstantPruningModifier": {"targets": ["re:.*weight"], "start": 0.0, "end": 2.0},
                }
            },
            **quantization(scheme="W4A16"),
        },
        [{"technique": "magnitude", "sparsity": 0.5}, {"technique": "rtn", "scheme": "W4A16"}],
    ),
}


@pytest.mark.parametrize("what", COMPLETE)
def test_a_recipe_with_counterparts_is_translated_parses_and_composes(what, tmp_path):
    source, steps = COMPLETE[what]
    found = translate(source)
    assert found.steps == steps
    assert found.notes.complete
    (tmp_path / "ours.yaml").write_text(found.to_yaml("recipe.yaml"))
    OptimConfig.load(tmp_path / "ours.yaml").check()


PARTIAL = {
    "awq as a transform": (
        stage(AWQModifier={"duo_scaling": "both"}, QuantizationModifier={"scheme": "W4A16", "ignore": ["lm_head"]}),
        [{"technique": "rtn", "scheme": "W4A16"}],
        "awq searches for one: add the step by hand",
    ),
    "awq of float8": (
        stage(AWQModifier={"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}),
        [{"technique": "rtn", "scheme": "FP8_DYNAMIC"}],
        "awq cannot quantize to FP8_DYNAMIC",
    ),
    "autoround to float8": (
        stage(AutoRoundModifier={"iters": 200, "scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}),
        [{"technique": "rtn", "scheme": "FP8_DYNAMIC"}],
        "signround cannot write this format; rounding to nearest (rtn)",
    ),
    "rotations at run time of queries and keys": (
        stage(SpinQuantModifier={"rotations": ["R1", "R2", "R3", "R4"]}, QuantizationModifier={"scheme": "W4A4"}),
        [{"technique": "rotation", "online": True}, {"technique": "rtn", "scheme": "W4A4"}],
        "no counterpart: SpinQuantModifier: R3",
    ),
    "rotations of one layer each": (
        stage(QuIPModifier={"rotations": ["v", "u"]}, QuantizationModifier={"scheme": "FP8", "ignore": ["lm_head"]}),
        [{"technique": "rtn", "scheme": "FP8"}],
        "no counterpart: QuIPModifier: it rotates each layer's inputs",
    ),
    "rotations of neither stream nor values": (
        stage(SpinQuantModifier={"rotations": ["R4"]}, QuantizationModifier={"scheme": "FP8", "ignore": ["lm_head"]}),
        [{"technique": "rtn", "scheme": "FP8"}],
        "rotations without R1 and R2 have no step",
    ),
    "learned rotations in blocks": (
        stage(
            SpinQuantModifier={"transform_type": "random-matrix", "learnable": True, "transform_block_size": 64},
            QuantizationModifier={"scheme": "W4A8", "ignore": ["lm_head"]},
        ),
        [{"technique": "rotation"}, {"technique": "rtn", "scheme": "W4A8"}],
        "differs: SpinQuantModifier: transform_type 'random-matrix' has no counterpart",
    ),
    "gptq with static inputs": (
        gptq(config_groups=group({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "tensor"})),
        [{"technique": "rtn", "bits": 8, "group_size": None, "activations": "int8", "dynamic": False}],
        "gptq cannot write this format; rounding to nearest (rtn)",
    ),
    "nvfp4": (quantization(scheme="NVFP4"), [], "NVFP4: inputs of 4-bit floats"),
    "blocks": (
        quantization(config_groups=group({**FP8_CHANNEL, "strategy": "block", "block_structure": [128, 128]})),
        [],
        "weights with a scale per 'block'",
    ),
    "inputs of 6 bits": (
        quantization(config_groups=group(W4, {**INT8_TOKEN, "num_bits": 6})),
        [],
        "dynamic inputs of 6 bits with a scale per 'token'",
    ),
    "a cache": (
        gptq(scheme="W4A16", kv_cache_scheme={"num_bits": 8}),
        [{"technique": "gptq", "scheme": "W4A16"}],
        "differs: GPTQModifier: kv_cache_scheme",
    ),
    "two groups": (
        quantization(scheme={"W4A16": ["re:.*mlp.*"], "W8A8": ["re:.*attn.*"]}),
        [{"technique": "rtn", "targets": ["re:.*mlp.*"], "scheme": "W4A16"}],
        "a second group of quantized layers (re:.*attn.*: W8A8)",
    ),
    "regrouped columns": (
        gptq(scheme="W4A16", actorder="group"),
        [{"technique": "gptq", "scheme": "W4A16"}],
        "actorder: group also regroups the columns",
    ),
    "the output head": (
        stage(GPTQModifier={"scheme": "W4A16"}),
        [{"technique": "gptq", "scheme": "W4A16"}],
        "it also takes the output head",
    ),
    "sparsegpt without a structure": (
        stage(SparseGPTModifier={"sparsity": 0.5, "ignore": ["lm_head"]}),
        [],
        "unstructured sparsity (mask_structure 0:0)",
    ),
    "owl": (
        stage(
            WandaPruningModifier={
                "sparsity": 0.5,
                "mask_structure": "2:4",
                "sparsity_profile": "owl",
                "owl_m": 5,
                "owl_lmbda": 0.05,
                "ignore": ["lm_head"],
            }
        ),
        [{"technique": "nm", "score": "activation", "keep": 2, "group": 4}],
        "sparsity_profile: owl has no counterpart",
    ),
    "a schedule in epochs": (
        stage(
            MagnitudePruningModifier={
                "init_sparsity": 0.1,
                "final_sparsity": 0.8,
                "start": 0.0,
                "end": 10.0,
                "update": 0.5,
                "targets": ["re:.*mlp.*weight"],
            }
        ),
        [{"technique": "gmp", "sparsity": 0.8, "initial": 0.1, "targets": ["re:.*mlp.*"]}],
        "are epochs, and were left out",
    ),
    "zeros of the checkpoint": (
        stage(ConstantPruningModifier={"targets": ["re:.*weight"]}),
        [],
        "zeros that the checkpoint already has",
    ),
    "a field that nobody knows": (
        gptq(scheme="W4A16", turbo=3),
        [{"technique": "gptq", "scheme": "W4A16"}],
        "turbo: 3 has no counterpart",
    ),
    "no format at all": (stage(QuantizationModifier={"ignore": ["lm_head"]}), [], "it names no format"),
    "log equalization": (
        stage(
            LogarithmicEqualizationModifier={"mappings": []},
            SmoothQuantModifier={"algorithm": "log_equalization"},
            QuantizationModifier={"scheme": "W8A8", "ignore": ["lm_head"]},
        ),
        [{"technique": "rtn", "scheme": "W8A8"}],
        "log_equalization is not among hf_optim's techniques",
    ),
}


@pytest.mark.parametrize("what", PARTIAL)
def test_what_has_no_counterpart_is_named_and_makes_the_translation_incomplete(what):
    source, steps, message = PARTIAL[what]
    found = translate(source)
    assert found.steps == steps
    assert not found.notes.complete
    assert any(message in line for line in found.notes.lines())
    assert message in found.to_yaml("r.yaml").replace("\n", "")
    if steps:
        OptimConfig.parse(yaml.safe_load(found.to_yaml("r.yaml"))).check()


def test_a_translated_gptq_recipe_gives_the_codes_of_ours():
    theirs = gptq(
        config_groups=group({**W4, "group_size": 32, "actorder": "static", "observer": "mse"}), dampening_frac=0.05
    )
    ours = [{"technique": "gptq", "bits": 4, "group_size": 32, "observer": "mse", "damp": 0.05}]
    translated = optimize(tiny_llama(), yaml.safe_load(translate(theirs).to_yaml("r.yaml")), IDS)
    by_hand = optimize(tiny_llama(), ours, IDS)
    other = optimize(tiny_llama(), [{**ours[0], "damp": 0.01}], IDS)
    one, two, three = (model.state_dict() for model in (translated, by_hand, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is a mapping, not"),
        ({}, "no modifier found"),
        ({"steps": [{"technique": "rtn"}]}, "'steps' is neither a stage nor a group of modifiers"),
        (stage(GPTQModifier=[1]), "GPTQModifier must be a mapping of fields"),
        (gptq(scheme="W4A16", config_groups=group()), "has both scheme and config_groups"),
        (gptq(scheme="W9A16"), "no scheme 'W9A16'"),
        (gptq(scheme="W4A16", dampening_frac="much"), "dampening_frac must be a number"),
        (gptq(scheme="W4A16", dampening_frac=-1), "damp must be > 0"),
        (gptq(scheme="W4A16", actorder="sideways"), "actorder must be static, weight or null"),
        (gptq(config_groups=[1]), "config_groups must be a mapping"),
        (quantization(config_groups=group({"num_bits": "4"})), "num_bits must be a number"),
        (quantization(config_groups=group({**W4, "symmetric": "no"})), "symmetric must be true or false"),
        (quantization(scheme="W4A16", targets={"Linear": 1}), "targets must be a list of names"),
        (stage(WandaPruningModifier={"mask_structure": "4:4"}), "leaves no weights"),
        (stage(WandaPruningModifier={"mask_structure": [2, 4]}), "must be written N:M"),
        ({"a_stage": {"a_modifiers": {"GPTQModifier": {"scheme": "W4A16", "ignore": ["re:(a+)+b"]}}}}, "repeat"),
    ],
)
def test_wrong_files_are_refused_in_words(data, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        translate(data)


def test_a_file_is_read_as_plain_yaml_only(tmp_path):
    (tmp_path / "r.yaml").write_text("quant_stage: !!python/object/apply:os.system ['echo no']")
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        translate_file(tmp_path / "r.yaml")
    with pytest.raises(RecipeError):
        translate_file(tmp_path / "missing.yaml")
    (tmp_path / "deep.yaml").write_text("{a_stage: " * 5000 + "1" + "}" * 5000)
    with pytest.raises(RecipeError):
        translate_file(tmp_path / "deep.yaml")


def test_text_of_a_stranger_cannot_leave_its_comment():
    evil = "x\nsteps: [{technique: rtn}]\n\x1b[2J"
    found = translate(stage(**{f"{evil}Modifier": {evil: 1}}, GPTQModifier={"scheme": "W4A16", evil: evil}))
    text = found.to_yaml(evil)
    assert yaml.safe_load(text) == {"steps": [{"technique": "gptq", "scheme": "W4A16"}]}
    assert text.replace("\n", "").isprintable()


def test_mutated_recipes_raise_recipe_errors_only():
    values = [None, True, -1, 0, 1.5, "", "x", "Linear", [], ["a"], {}, {"a": 1}, [[1]], 10**400, "W4A16", float("nan")]

    def mutate(data, rng):
        if isinstance(data, dict):
            made = {key: mutate(value, rng) for key, value in data.items()}
            if made and rng.random() < 0.15:
                made[rng.choice(list(made))] = rng.choice(values)
            return made
        if isinstance(data, list):
            return [mutate(item, rng) for item in data]
        return rng.choice(values) if rng.random() < 0.15 else data

    rng = random.Random(0)
    sources = [source for source, *_ in (*COMPLETE.values(), *PARTIAL.values())]
    translated, refused = 0, []
    for _ in range(1500):
        try:
            translate(mutate(rng.choice(sources), rng)).to_yaml("r.yaml")
            translated += 1
        except RecipeError as error:
            refused.append(str(error))
    assert max(map(len, refused)) < 3000
    assert 300 < translated < 1500

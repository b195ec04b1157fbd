"""A model gets its own configurations before anything is written into them: the caller's stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from renamed_families import IDS, build_family
from tiny_models import tiny_gpt2, tiny_llama, tiny_t5
from transformers import GenerationConfig, PreTrainedConfig

import hf_optim
from hf_optim.recipes.catalogue import catalogue
from hf_optim.toolkit.checkpoint.model_config import own_configs

SMALL = {"input_ids": IDS % 60}
MODELS = {
    "llama": (tiny_llama, SMALL),
    "t5": (tiny_t5, {**SMALL, "decoder_input_ids": IDS % 60}),
    "llava": (lambda: build_family("llava")[0], build_family("llava")[1]),
    "clip": (lambda: build_family("clip")[0], build_family("clip")[1]),
    "whisper": (lambda: build_family("whisper")[0], build_family("whisper")[1]),
}
RECIPES = {
    "w4": [{"technique": "rtn", "bits": 4, "group_size": 16}],
    "w8a8": [{"technique": "rtn", "bits": 8, "activations": "int8"}],
    "magnitude": [{"technique": "magnitude", "sparsity": 0.5}],
}


def parts(config):
    """Return a configuration and the ones inside it."""
    found = [config]
    for value in vars(config).values():
        found += parts(value) if isinstance(value, PreTrainedConfig) else []
    return found


def snapshot(config):
    return [(type(part), part.to_dict(), set(vars(part))) for part in parts(config)]


@pytest.mark.many
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_second_model_of_the_same_configuration_is_compressed(name, recipe):
    build, inputs = MODELS[name]
    original = build()
    config, kind = original.config, type(original)
    generation = copy.deepcopy(original.generation_config) if original.can_generate() else None
    before = snapshot(config)
    built = [kind(config) for _ in range(2)]
    done = [hf_optim.optimize(model, RECIPES[recipe], calibration=[inputs]) for model in built]
    assert snapshot(config) == before
    assert snapshot(original.config) == before
    held = [part for model in done for module in model.modules() for part in configs_of(module)]
    assert not {id(part) for part in parts(config)} & {id(part) for part in held}
    if generation is not None:
        assert original.generation_config.to_dict() == generation.to_dict()
        assert done[0].generation_config is not done[1].generation_config
    # A third model, without a recipe, saves and computes as an ordinary one.
    assert not hasattr(kind(config).config, "quantization_config")


def configs_of(module):
    return [v for v in vars(module).values() if isinstance(v, (PreTrainedConfig, GenerationConfig))]


@pytest.mark.parametrize("name", MODELS)
def test_configurations_that_were_one_object_still_are(name):
    model = MODELS[name][0]()
    before = [part for module in model.modules() for part in configs_of(module)]
    own_configs(model)
    after = [part for module in model.modules() for part in configs_of(module)]
    pairing = {id(one): id(other) for one, other in zip(before, after, strict=True)}
    assert [pairing[id(one)] for one in before] == [id(other) for other in after]
    assert len(set(pairing.values())) == len(pairing)
    assert not pairing.keys() & set(pairing.values())


@pytest.mark.many(every=4)
@pytest.mark.parametrize("technique", ["structured", "upcycle", "local", "mixed_precision", "nm", "peg"])
def test_steps_that_write_into_the_configuration_write_into_a_copy(technique):
    """They change sizes, classes, or implementations."""
    model = tiny_gpt2() if technique == "local" else tiny_llama()
    config, before = model.config, snapshot(model.config)
    hf_optim.optimize(model, [catalogue().get(technique).for_testing()], calibration=[SMALL])
    assert snapshot(config) == before
    assert type(config) is before[0][0]


@pytest.mark.parametrize("door", ["recipe", "auto"])
def test_a_configuration_given_to_from_pretrained(door, tmp_path):
    model = tiny_llama()
    if door == "auto":
        hf_optim.optimize(model, RECIPES["w4"])
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    before = snapshot(config)
    loaded = [
        type(model).from_pretrained(tmp_path, config=config, optim_config="auto" if door == "auto" else RECIPES["w4"])
        for _ in range(2)
    ]
    assert snapshot(config) == before
    with torch.no_grad():
        assert torch.equal(loaded[0](**SMALL).logits, loaded[1](**SMALL).logits)

"""Which layers patterns select, by their roles, and why a pattern without effect has none."""

from __future__ import annotations

import pytest
import torch
from renamed_families import FAMILIES, build_family
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from torch import nn
from transformers import BertModel

from hf_optim.toolkit import topology
from hf_optim.toolkit.topology.towers import media_of, media_parts, towers


def takes_tables(module):
    return isinstance(module, nn.Embedding) or topology.default_takes(module)


@pytest.fixture(scope="module")
def llava():
    return build_family("llava")[0]


def parts(model, *targets, **options):
    """Return the parts of LLaVA in which a selection has layers."""
    names = topology.select_layers(model, targets, **options)
    return {".".join(name.split(".")[:2]).removesuffix(".weight") for name in names}


TEXT, TOWER, PROJECTOR = "model.language_model", "model.vision_tower", "model.multi_modal_projector"


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        (["Linear"], {TEXT}),
        (["*"], {TEXT}),
        (["*_proj"], {TEXT}),  # the tower has layers of that name too
        (["*vision_tower*"], {TOWER}),
        (["re:.*vision_tower.*"], {TOWER}),
        (["*.fc1"], {TOWER}),  # the text has none of that name
        (["Linear", "*vision_tower*", "re:.*multi_modal_projector.*"], {TEXT, TOWER, PROJECTOR}),
        (["Linear", "model.multi_modal_projector.linear_1"], {TEXT, PROJECTOR}),
        (["*", "lm_head"], {TEXT, "lm_head"}),
        (["*lm_head"], set()),
    ],
)
def test_what_patterns_select_in_a_multimodal_model(llava, targets, selected):
    assert parts(llava, *targets) == selected


def test_skip_takes_layers_out_of_a_tower(llava):
    names = topology.select_layers(llava, ["*vision_tower*"], ["*.fc1"])
    assert len(names) == 10
    assert not any(name.endswith("fc1") for name in names)


def test_embeddings_are_selected_by_their_names_alone():
    model = tiny_llama()
    assert "model.embed_tokens" not in topology.select_layers(model, ["*"], embeddings=True)
    assert "model.embed_tokens" not in topology.select_layers(model, ["model.*"], embeddings=True)
    for pattern in ("*embed_tokens*", "model.embed_tokens", "Embedding", "re:.*embed"):
        names = topology.select_layers(model, ["Linear", pattern], embeddings=True)
        assert len(names) == 15
        assert "model.embed_tokens" in names
    skipped = topology.select_layers(model, ["Linear", "Embedding"], ["*embed*"], embeddings=True)
    assert "model.embed_tokens" not in skipped


def why(model, targets, skip=(), takes=topology.default_takes):
    return topology.ineffective_pattern(model, targets, skip, takes)


@pytest.mark.parametrize(
    ("targets", "skip", "message"),
    [
        (["*lm_hea*"], [], "in targets matches 1 layer with the role output head (lm_head), which only an exact"),
        (["Linear", "*norm*"], [], "matches 5 LlamaRMSNorm modules (model.layers.0.input_layernorm"),
        (["*embed_tokens*"], [], "matches 1 Embedding module (model.embed_tokens), which this technique does not work"),
        (["model.layers.0"], [], "write 'model.layers.0.*' for the layers in it"),
        (["Linear"], ["*norm*"], "'*norm*' in skip matches 5 LlamaRMSNorm modules"),
        (["Linear"], ["model.layers.1"], "write 'model.layers.1.*' for the layers in it"),
        (["Linear"], ["lm_head"], ""),  # left alone anyway, as it was asked
        (["Linear"], [], ""),
        (["*mlp*", "lm_head"], ["*down_proj"], ""),
    ],
)
def test_patterns_without_effect(targets, skip, message):
    found = why(tiny_llama(), targets, skip)
    assert message in found
    assert bool(found) == bool(message)


def test_a_class_that_only_layers_with_a_role_have_says_how_to_take_them(llava):
    class Special(nn.Linear):
        pass

    model = build_family("llava")[0]
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp.fc1.__class__ = Special
    text = why(model, ["Special"])
    assert "matches 2 layers with the role vision tower" in text
    assert "such as '*vision_tower*', to include them" in text
    pattern = text.split("such as '")[1].split("'")[0]
    assert topology.select_layers(model, [pattern])  # the remedy works


def test_routers_may_be_skipped_by_a_pattern_and_are_not_taken_by_one():
    model = tiny_mixtral()
    assert why(model, ["Linear"], ["*mlp.gate", "lm_head"]) == ""
    assert not any(name.endswith("gate") for name in topology.select_layers(model, ["*gate*", "*"], experts=True))


def test_a_tied_table_is_refused():
    text = why(tiny_llama(tie_word_embeddings=True), ["*embed_tokens*"], takes=takes_tables)
    assert "model.embed_tokens, which is tied to lm_head.weight" in text
    assert "tie_word_embeddings=False" in text
    assert why(tiny_llama(), ["*embed_tokens*"], takes=takes_tables) == ""


def test_nothing_matched_is_an_error_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"nothing matches 're:\.\*up_prj'"):
        why(tiny_llama(), ["re:.*up_prj"])


def test_roles_of_poolers_projectors_and_towers():
    roles = topology.roles(BertModel(tiny_bert().config))
    assert roles == {"pooler.dense": topology.Role.POOLER}
    assert topology.is_output_head(BertModel(tiny_bert().config), "pooler.dense")  # it lies outside the blocks
    clip = topology.roles(FAMILIES["clip"][0]())
    assert set(clip.values()) == {topology.Role.PROJECTOR}
    assert set(topology.roles(tiny_gpt2()).values()) == {topology.Role.OUTPUT_HEAD}


def test_towers_and_what_runs_before_the_blocks(llava):
    main = [block.name for block in topology.blocks(llava)]
    assert towers(llava, main) == {TOWER: "vision"}
    layers = [f"{TOWER}.encoder.layers.{index}" for index in (0, 1)]
    assert media_parts(llava, main) == {layers[0]: [], layers[1]: [], TOWER: layers, PROJECTOR: []}
    assert media_of(llava) == ""
    for name in ("clip", "whisper", "vit"):  # their encoders are blocks of the model itself
        model = build_family(name)[0]
        assert towers(model, [block.name for block in topology.blocks(model)]) == {}


def test_roles_are_those_on_the_meta_device(llava):
    with torch.device("meta"):
        model = FAMILIES["llava"][0]()
    assert topology.roles(model) == topology.roles(llava)

"""Speech models and pairs of text and images: compressed, saved and loaded like text models; what data they need."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

import hf_optim
from hf_optim import DataError, ModelError
from hf_optim.runs.run import run_of
from hf_optim.toolkit import topology

SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128, "max_target_positions": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = {**SIZES, "num_mel_bins": 16, "max_source_positions": 30}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embedding_groups": 4}
BUILDS = {
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
    "whisper classifier": lambda: WhisperForAudioClassification(WhisperConfig(**WHISPER)),
    "speech2text": lambda: Speech2TextForConditionalGeneration(
        Speech2TextConfig(**SIZES, input_feat_per_channel=16, max_source_positions=60)
    ),
    "wav2vec2": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**BODY, **WAVES, vocab_size=32, num_feat_extract_layers=2)),
    "ast": lambda: ASTForAudioClassification(ASTConfig(**BODY, num_mel_bins=32, max_length=64)),
}
RECIPES = {
    "w4a16": [{"technique": "rtn", "bits": 4, "group_size": 16}],
    "w8a8": [{"technique": "rtn", "bits": 8, "activations": "int8"}],
    "gptq": [{"technique": "gptq", "group_size": 16}],
    "magnitude": [{"technique": "magnitude", "sparsity": 0.5}],
}


def build(kind):
    torch.manual_seed(0)
    return BUILDS[kind]().eval()


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs).to_tuple()[0]


@pytest.mark.many
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", BUILDS)
def test_speech_models_are_compressed_saved_and_loaded(kind, recipe, tmp_path):
    model = build(kind)
    inputs = topology.dummy_inputs(model)
    before = output(model, inputs)
    model = hf_optim.optimize(model, RECIPES[recipe], calibration=[inputs])
    assert run_of(model).record.stages[0]["driver"] == "blockwise"
    found = output(model, inputs)
    assert not torch.equal(found, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path).eval(), inputs), found)
    auto = output(type(model).from_pretrained(tmp_path, optim_config="auto").eval(), inputs)
    assert float((auto - found).norm() / found.norm()) < 0.05


@pytest.mark.many(every=4)
@pytest.mark.parametrize("driver", ["auto", "whole_model", "blockwise"])
@pytest.mark.parametrize("recipe", ["magnitude", "w4a16"])
def test_steps_that_read_no_inputs_need_none(recipe, driver):
    model = build("whisper")
    hf_optim.optimize(model, {"steps": RECIPES[recipe], "driver": driver})
    assert run_of(model).covered(run_of(model).recipe.steps[0])[0]


@pytest.fixture
def unknown_inputs(monkeypatch):
    """A model whose main input has no dummy."""
    monkeypatch.setattr(WhisperForConditionalGeneration, "main_input_name", "waves")
    return build("whisper")


@pytest.mark.parametrize("recipe", ["magnitude", "w4a16"])
def test_a_model_with_unknown_inputs_is_treated_as_one_without_blocks(unknown_inputs, recipe, caplog):
    with pytest.raises(topology.NoInputsError, match=r"'waves'.*pass calibration batches"):
        topology.dummy_inputs(unknown_inputs)
    hf_optim.optimize(unknown_inputs, RECIPES[recipe])
    assert "treated as a model without blocks" in caplog.text


def test_its_blocks_are_found_on_the_batches_of_the_caller(unknown_inputs):
    batch = {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": torch.randint(3, 128, (2, 6))}
    hf_optim.optimize(unknown_inputs, RECIPES["gptq"], calibration=[batch])
    assert run_of(unknown_inputs).record.stages[0]["blocks"] == 4
    with pytest.raises(ModelError, match="no sequence of blocks"):
        hf_optim.optimize(build("whisper"), {"steps": RECIPES["w4a16"], "driver": "blockwise"})


def test_a_pair_of_text_and_images_needs_both():
    torch.manual_seed(0)
    text = {**BODY, "vocab_size": 64, "max_position_embeddings": 16}
    vision = {**BODY, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    inputs = topology.dummy_inputs(model)
    with pytest.raises(DataError, match="CLIPModel also reads pixel_values: calibration batch 0 has input_ids only"):
        hf_optim.optimize(model, RECIPES["gptq"], calibration=[{"input_ids": inputs["input_ids"]}])
    hf_optim.optimize(model, RECIPES["gptq"], calibration=[inputs])


def test_dummy_inputs_have_the_dtype_of_the_model():
    model: PreTrainedModel = build("whisper").bfloat16()
    inputs = topology.dummy_inputs(model)
    assert inputs["input_features"].dtype == torch.bfloat16
    assert inputs["input_features"].shape == (1, 16, 60)
    assert inputs["decoder_input_ids"].shape == (1, 4)

"""Encoder-decoders in ``hf_optim.generate``: the encoder runs once, its keys and values have fixed addresses."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from simulated_graphs import simulated_graphs
from tiny_models import tiny_t5
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_optim
from hf_optim.generation import sessions

SIZES = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "pad_token_id": 0,
}  # fmt: skip


def whisper():
    config = WhisperConfig(
        **SIZES, max_source_positions=20, max_target_positions=64, num_mel_bins=8, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


MAKE = {
    "t5": tiny_t5,
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=64)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES, max_position_embeddings=64, decoder_start_token_id=0)),
    "whisper": whisper,
}


def inputs_of(name, rows=3, length=9):
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40)}
    ids = torch.randint(3, 50, (rows, length))
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0  # encoders are padded on the right
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def made(name):
    torch.manual_seed(2)
    return MAKE[name]().eval(), inputs_of(name)


def run(model, inputs, mode="eager", **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        generate = partial(hf_optim.generate, mode=mode)
        return model.generate(**inputs, max_new_tokens=12, custom_generate=generate, **settings)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 20}, {"no_repeat_ngram_size": 2}], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_they_get_the_tokens_of_transformers(name, settings):
    model, inputs = made(name)
    torch.manual_seed(4)
    expected = model.generate(**inputs, max_new_tokens=12, **settings)
    torch.manual_seed(4)
    assert torch.equal(run(model, inputs, **settings), expected)
    assert len(sessions._MODELS[model]) == 1


def test_what_is_returned_is_what_transformers_returns():
    model, inputs = made("bart")
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = model.generate(**inputs, max_new_tokens=12, **asked), run(model, inputs, **asked)
    assert type(found) is type(expected)
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_a_step_asks_the_host_for_nothing(name):
    model, inputs = made(name)
    with simulated_graphs() as graphs:
        assert torch.equal(run(model, inputs, mode="captured"), model.generate(**inputs, max_new_tokens=12))
        assert len(graphs.captured) == 1


def test_another_length_of_the_encoder_captures_nothing():
    model, inputs = made("t5")
    with simulated_graphs() as graphs:
        run(model, inputs, mode="captured")
        assert len(graphs.captured) == 1
        for length in (20, 5):
            other = inputs_of("t5", rows=3, length=length)
            assert torch.equal(run(model, other, mode="captured"), model.generate(**other, max_new_tokens=12))
        assert len(graphs.captured) == 1
        longer = inputs_of("t5", rows=3, length=70)
        assert torch.equal(run(model, longer, mode="captured"), model.generate(**longer, max_new_tokens=12))
        assert len(graphs.captured) == 2


def test_a_decoder_that_starts_with_tokens_of_its_own():
    model, inputs = made("bart")
    inputs["decoder_input_ids"] = torch.tensor([[2, 5, 9]] * 3)
    assert torch.equal(run(model, inputs), model.generate(**inputs, max_new_tokens=12))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["captured", "auto"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_captured_on_a_device(name, mode):
    model, inputs = made(name)
    model, inputs = model.cuda(), {key: value.cuda() for key, value in inputs.items()}
    assert torch.equal(run(model, inputs, mode=mode), model.generate(**inputs, max_new_tokens=12))

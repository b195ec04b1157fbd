"""Tokenizers with damaged files: named in a warning, or in an error where they are needed."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from tiny_tokenizer import tiny_tokenizer

from hf_optim import DataError, optimize
from hf_optim.checkpoints.source import ModelSource, load_processor
from hf_optim.data.calibration_set import build_calibration_data
from hf_optim.recipes.config import DataConfig
from hf_optim.testing.models import tiny_bert, tiny_llama


def test_a_tokenizer_that_cannot_be_read_is_named_in_a_warning(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": 3}}')
    with caplog.at_level(logging.WARNING):
        assert load_processor(ModelSource(str(tmp_path)), transformers.LlamaForCausalLM) is None
    assert f"the tokenizer or processor in {tmp_path} is not used: " in caplog.text


@pytest.mark.parametrize("value", ["many", [3], True, -1, float("nan")])
def test_a_length_that_is_not_a_number_of_tokens(value, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = value
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the cat sat on the mat " * 20}))
    for model in (tiny_llama(), tiny_bert()):
        with pytest.raises(DataError, match=r"model_max_length of .* not a number of tokens|cannot read the data"):
            build_calibration_data(
                None,
                model_config=model.config,
                tokenizer=tokenizer,
                data=DataConfig(dataset=str(tmp_path / "data.jsonl"), samples=1),
            )


IDS = torch.arange(20).reshape(2, 10)
UNUSUAL = {
    "sparse": IDS.to_sparse(),
    "without values": IDS.to("meta"),
    "complex": IDS.to(torch.complex64),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_tensors_that_are_not_ordinary_are_refused(what):
    recipe = [{"technique": "gptq", "bits": 4, "group_size": 16}]
    for data in (UNUSUAL[what], [{"input_ids": UNUSUAL[what]}]):
        with pytest.raises(DataError, match=r"pass an ordinary tensor|pass whole numbers"):
            optimize(tiny_llama(), recipe, data)


def test_what_a_callers_data_raises_is_an_error_of_the_data():
    def batches():
        yield {"input_ids": IDS}
        raise KeyError("row 1")

    with pytest.raises(DataError, match="cannot be made into batches: KeyError: 'row 1'"):
        optimize(tiny_llama(), [{"technique": "gptq", "bits": 4, "group_size": 16}], batches())


def test_inputs_of_different_lengths_are_named_by_every_driver():
    batch = {"input_ids": torch.arange(20).reshape(2, 10), "position_ids": torch.arange(10).reshape(2, 5)}
    for driver in ("whole_model", "blockwise"):
        recipe = {"steps": [{"technique": "gptq", "bits": 4, "group_size": 16}], "driver": driver}
        with pytest.raises(DataError, match=r"cannot run on a batch of input_ids \[2, 10\], position_ids \[2, 5\]"):
            optimize(tiny_llama(), recipe, [batch])

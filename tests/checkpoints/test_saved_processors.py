"""The tokenizer of the original goes with what is saved, also after a recipe that read no data."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim

RTN = {"steps": [{"technique": "rtn", "bits": 4, "group_size": 16}]}


@pytest.fixture
def dense(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_tokenizer_of_the_folder_is_written_and_named_on_the_card(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, optim_config=RTN)
    model.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    assert "AutoTokenizer.from_pretrained(checkpoint)" in (tmp_path / "out" / "README.md").read_text()


def test_one_that_is_there_stays(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, optim_config=RTN)
    own = tiny_tokenizer()
    own.add_tokens(["<mine>"])
    own.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert "<mine>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_model_that_was_loaded_from_nowhere_has_none(tmp_path):
    model = hf_optim.optimize(tiny_llama(), RTN)
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_no_reference_to_code_is_copied(dense, tmp_path):
    path = dense / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    model = AutoModelForCausalLM.from_pretrained(dense, optim_config=RTN)
    model.save_pretrained(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()

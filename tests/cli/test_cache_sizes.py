"""``hf-optim check --kv``: the bytes of a key/value cache."""

from __future__ import annotations

import json

import pytest
from patterned import patterned, registered
from tiny_models import tiny_llama, tiny_t5
from tiny_tokenizer import tiny_tokenizer

from hf_optim import KeyValueScheme, RecipeError, cache_size
from hf_optim.cli import main
from hf_optim.evaluation.cache_sizes import cache_report, parse_batch_length


@pytest.fixture
def home(tmp_path):
    tiny_llama(vocab_size=259).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_check_prints_both_caches(home, capsys):
    assert main(["check", "kv_cache", "--model", home, "--kv", "512x2048"]) == 0
    out = capsys.readouterr().out
    assert "cache of 512 x 2048 tokens, 16 bits" in out
    assert "times the weights" in out
    assert "the same, 8 bits" in out


def test_json_has_the_figures(home, capsys):
    config = tiny_llama(vocab_size=259).config
    assert main(["check", "kv_cache", "--model", home, "--kv", "4x300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kv"]
    assert found["bytes_16_bits"] == cache_size(config, 4, 300).total
    assert found["bytes"] == cache_size(config, 4, 300, KeyValueScheme()).total
    assert found["bytes"] == found["code_bytes"] + found["scale_bytes"] + found["full_precision_bytes"]
    assert found["scheme"]["bits"] == 8
    assert (found["batch"], found["length"]) == (4, 300)


def test_a_recipe_without_the_technique_counts_16_bits(home, capsys):
    assert main(["check", "gmp50", "--model", home, "--kv", "4X300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kv"]
    assert "bytes" not in found
    assert found["bytes_16_bits"] > 0


def test_the_setting_of_a_checkpoint_counts(home):
    config = tiny_llama(vocab_size=259).config
    config.hf_optim_key_values = {"bits": 4, "residual": 0}
    assert cache_report(config, 2, 640)["scheme"]["bits"] == 4


def test_what_an_attention_pattern_saves_is_told():
    with registered():
        found = cache_report(patterned(tiny_llama(max_position_embeddings=4096), "window").config, 2, 4096)
    full = cache_size(tiny_llama().config, 2, 4096).total
    assert found["bytes_16_bits"] < full / 50
    assert found["bytes_of_full_attention"] == full
    assert "the same, under full attention" in found["readable"]
    assert "bytes_of_full_attention" not in cache_report(tiny_llama().config, 2, 4096)


@pytest.mark.parametrize("text", ["", "5", "x", "0x5", "5x0", "-1x5", "1e3x5", "9999999999x1", "3 x", "4x5x6"])
def test_wrong_sizes(text):
    with pytest.raises(RecipeError, match=r"--kv takes BATCHxLENGTH"):
        parse_batch_length(text)


def test_it_needs_a_model(capsys):
    assert main(["check", "kv_cache", "--kv", "1x1"]) == 2
    assert "give --model too" in capsys.readouterr().err


def test_a_model_without_such_a_cache(tmp_path, capsys):
    tiny_t5().save_pretrained(tmp_path)
    assert main(["check", "rtn", "--model", str(tmp_path), "--kv", "1x1"]) == 2
    assert "has an encoder" in capsys.readouterr().err

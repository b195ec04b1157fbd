"""Models beside each other: quality, agreement, bytes and time, and models that cannot be compared."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim.errors import DataError, ModelError
from hf_optim.evaluation.evaluate import compare, evaluate
from hf_optim.evaluation.side_by_side import compare_models, require_same_tokens
from hf_optim.recipes.config import DataConfig

WORDS = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    path.write_text('{"text": "the cat sat on the mat, and the dog saw it all the time"}\n' * 8)
    return DataConfig(dataset=str(path), samples=None, seq_len=16)


@pytest.fixture(scope="module")
def models():
    other = tiny_llama(vocab_size=WORDS)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    return {"dense": tiny_llama(vocab_size=WORDS), "pruned": other}


def test_each_model_has_its_metrics_and_those_against_the_reference(models, data):
    tokenizer = tiny_tokenizer()
    found = compare_models(models, tokenizer, data, speed=False)
    assert list(found) == ["dense", "pruned"]
    for name, model in models.items():
        assert found[name]["perplexity"] == evaluate(model, tokenizer, data, speed=False)["perplexity"]
    expected = compare(models["pruned"], models["dense"], tokenizer, data)
    assert {key: found["pruned"][key] for key in expected} == expected
    assert "kl" not in found["dense"]
    turned = compare_models(models, tokenizer, data, reference="pruned", speed=False)
    assert "kl" not in turned["pruned"]
    assert turned["dense"]["kl"] != found["pruned"]["kl"]


def test_models_are_loaded_when_it_is_their_turn_and_freed(models, data):
    alive, most = [], []

    def loader(seed):
        def load():
            model = tiny_llama(seed, vocab_size=WORDS)
            alive.append(weakref.ref(model))
            most.append(sum(ref() is not None for ref in alive))
            return model

        return load

    compare_models({f"m{seed}": loader(seed) for seed in range(4)}, tiny_tokenizer(), data, speed=False)
    assert most == [1, 2, 2, 2]


def test_times_are_those_of_the_same_rounds(models, data):
    found = compare_models(models, tiny_tokenizer(), data)
    assert found["pruned"]["ms_per_token"] > 0
    assert found["dense"]["time_rounds"] == found["pruned"]["time_rounds"] >= 5
    ratio = found["pruned"]["ms_per_token"] / found["dense"]["ms_per_token"]
    assert found["pruned"]["relative_time"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (lambda: tiny_llama(vocab_size=WORDS + 1), "vocabularies"),
        (lambda: tiny_bert(), "text-generation and text-classification|text-classification and text-generation"),
    ],
)
def test_a_model_that_cannot_be_compared(other, word, models, data):
    with pytest.raises(ModelError, match=word):
        compare_models({"dense": models["dense"], "other": other()}, tiny_tokenizer(), data, speed=False)


@pytest.mark.parametrize("given", [{}, {"a": None}])
def test_fewer_than_two_models(given, data):
    with pytest.raises(ModelError, match="at least two"):
        compare_models(given, None, data)


def test_tokenizers_that_number_tokens_differently():
    class Other:
        def get_vocab(self):
            return {**tiny_tokenizer().get_vocab(), "another": 3}

    require_same_tokens("b", tiny_tokenizer(), "a", tiny_tokenizer())
    require_same_tokens("b", None, "a", tiny_tokenizer())
    with pytest.raises(DataError, match="'another'"):
        require_same_tokens("b", Other(), "a", tiny_tokenizer())

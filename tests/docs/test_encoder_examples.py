"""What the examples on sparse attention make by themselves: documents, positions, claims."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT
from tiny_models import tiny_bert

HOME = ROOT / "examples" / "attention"


@pytest.fixture
def load(monkeypatch):
    """Import an example of examples/attention by name."""

    def found(name):
        monkeypatch.syspath_prepend(str(HOME))
        spec = importlib.util.spec_from_file_location(name, HOME / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return found


class Words:
    """A tokenizer whose ids are the positions of words in a list."""

    cls_token_id, sep_token_id = 0, 1
    words = ("[CLS]", "[SEP]", "bad", "good", "other", "a", "b", "c", "d", "e")

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [self.words.index(word) for word in text.split()]}


@pytest.fixture
def data(tmp_path):
    rows = [f"{word} a b c d e\t{label}" for label, word in enumerate(("bad", "good")) for _ in range(20)]
    (tmp_path / "sst2").mkdir()
    (tmp_path / "stsb").mkdir()
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    (tmp_path / "stsb" / "dev.tsv").write_text("sentence1\tsentence2\tscore\nother a b\tother c d e\t1.0\n")
    return tmp_path


def test_documents_hold_sentences_of_their_label_among_others(load, data):
    example = load("encoders")
    documents = example.Documents(Words(), data, "dev", 40, 3)
    batches = documents.batches(6, 300, 4)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    for ids, label in zip(torch.cat([batch["input_ids"] for batch in batches]), labels, strict=True):
        assert len(ids) == 300
        assert (int(ids[0]), int(ids[-1])) == (0, 1)
        assert not (ids == (2, 3)[1 - int(label)]).any()
        sentences, marked = int((ids == 1).sum()), int((ids == (2, 3)[int(label)]).sum())
        assert abs(sentences / marked - example.EVERY) < 1.5


def test_positions_are_copied(load):
    model = tiny_bert()
    before = model.bert.embeddings.position_embeddings.weight.clone()
    ids = torch.randint(3, 50, (1, 20))
    short = model(ids).logits
    model = load("encoders").with_positions(model, 150)
    table = model.bert.embeddings.position_embeddings.weight
    assert torch.equal(table, before.repeat(3, 1)[:150])
    assert torch.equal(model(ids).logits, short)
    assert model(torch.randint(3, 50, (1, 150))).logits.shape == (1, 3)


def test_the_page_and_the_claims_are_what_the_figures_give(load):
    page, cards = load("encoders_page"), ROOT / "model_cards"
    results = json.loads((cards / "attention" / "encoders.json").read_text(encoding="utf-8"))
    assert (cards / "attention" / "encoders.md").read_text(encoding="utf-8") == page.page(results)
    stored = json.loads((cards / "claims" / "attention_of_encoders.json").read_text(encoding="utf-8"))
    assert stored == page.claims(results)

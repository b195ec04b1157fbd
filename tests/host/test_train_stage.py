"""Training a stage on named data, for each kind of model that has a ready training."""

from __future__ import annotations

import io
import json

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit
from tiny_tokenizer import tiny_tokenizer

import hf_optim
from hf_optim.config import DataConfig
from hf_optim.errors import DataError, RecipeError
from hf_optim.run import run_of
from hf_optim.train_stage import train_stage, training_rows

STEPS = [{"technique": "gmp", "sparsity": 0.5, "begin": 0.0, "end": 0.5, "every": 1}]
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(dataset=str(path), samples=None)


def texts(tmp_path):
    data = jsonl(tmp_path / "texts.jsonl", [{"text": "what the cat saw on the mat " * 4}] * 6)
    return tiny_llama(vocab_size=259), tiny_tokenizer(), data


def labelled(tmp_path):
    rows = [{"sentence": "a cat " * n, "label": n % 2} for n in range(1, 7)]
    return tiny_bert(vocab_size=259), tiny_tokenizer(), jsonl(tmp_path / "labelled.jsonl", rows)


def translations(tmp_path):
    rows = [{"source": "a cat " * n, "target": "un chat " * n} for n in range(1, 7)]
    return tiny_t5(vocab_size=259), tiny_tokenizer(), jsonl(tmp_path / "pairs.jsonl", rows)


def pictures(tmp_path):
    from datasets import Dataset
    from PIL import Image
    from transformers import ViTImageProcessor

    model = tiny_vit()
    rows = []
    for n in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * n, 10, 90)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": n % 2})
    Dataset.from_list(rows).to_parquet(tmp_path / "pictures.parquet")
    side = model.config.image_size
    processor = ViTImageProcessor(size={"height": side, "width": side})
    return model, processor, DataConfig(dataset=str(tmp_path / "pictures.parquet"), samples=None)


@pytest.mark.parametrize("make", [texts, labelled, translations, pictures])
def test_each_kind_of_model_is_trained(tmp_path, make):
    model, processor, data = make(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = hf_optim.optimize(model, STEPS, tokenizer=processor)
    trained = train_stage(model, processor, data, TRAINING)
    run = run_of(trained)
    assert run.finished
    assert run.record.stages[-1]["training_steps"] == 3
    weights = dict(trained.named_parameters())
    assert run.masks
    for name, mask in run.masks.items():
        assert not weights[name][~mask].any()
        assert 0.4 < mask.float().mean() < 0.6
    assert any(not torch.equal(weights[n][m], before[n][m]) for n, m in run.masks.items())


def test_rows_are_not_padded_before_they_are_batched(tmp_path):
    model, tokenizer, data = translations(tmp_path)
    rows, collator = training_rows(model, tokenizer, data)
    assert [len(row["labels"]) for row in rows] == [
        len(tokenizer(f"{'un chat ' * n}")["input_ids"]) for n in range(1, 7)
    ]
    batch = collator(rows[:2])
    assert batch["labels"][0, -1] == -100
    assert batch["attention_mask"][0, -1] == 0


def test_a_wrong_value_of_a_training_argument(tmp_path):
    model, tokenizer, data = texts(tmp_path)
    model = hf_optim.optimize(model, STEPS, tokenizer=tokenizer)
    with pytest.raises(RecipeError, match=r"training: .*sideways"):
        train_stage(model, tokenizer, data, {"lr_scheduler_type": "sideways"})


def test_a_model_without_a_ready_training(tmp_path):
    _, tokenizer, data = texts(tmp_path)
    with pytest.raises(DataError, match=r"BertModel.*OptimTrainer"):
        training_rows(tiny_bert(vocab_size=259).bert, tokenizer, data)


def test_texts_without_a_tokenizer(tmp_path):
    model, _, data = texts(tmp_path)
    with pytest.raises(DataError, match="tokenizer"):
        training_rows(model, None, data)

"""Training a stage on named data, for each kind of model that has a ready training."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import BertForMaskedLM

import hf_optim
from hf_optim.calibration.block_journal import BlockJournal
from hf_optim.errors import CheckpointError, DataError, RecipeError
from hf_optim.recipes.config import DataConfig
from hf_optim.runs.run import run_of
from hf_optim.training.fit import train_stage, training_rows
from hf_optim.training.trainer import OptimTrainer

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


class Stop(Exception):
    """Stands for a kill."""


def masked_texts(tmp_path):
    data = jsonl(tmp_path / "masked.jsonl", [{"text": "what the cat saw on the mat " * 4}] * 12)
    config = tiny_bert(vocab_size=259, hidden_dropout_prob=0.1).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = BertForMaskedLM(config), tiny_tokenizer()
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(258)
    return model, tokenizer, data


NINE = {**TRAINING, "max_steps": 9, "learning_rate": 1e-2, "dataloader_num_workers": 0}
RAMP = [{"technique": "gmp", "sparsity": 0.5, "begin": 0.2, "end": 0.8, "every": 1}]
TICKET = [{"technique": "lottery_ticket", "sparsity": 0.5, "rounds": 2, "rewind_to": 1}]


def journaled(tmp_path, make, steps, training, monkeypatch, resume=False, stop_before=None):
    """Train with a journal, up to the optimizer step ``stop_before``. Returns the model and the steps taken."""
    model, processor, data = make(tmp_path)
    taken = []
    stock = OptimTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == stop_before:
            raise Stop
        taken.append(self.state.global_step)
        return stock(self, *args, **kwargs)

    journal = BlockJournal(tmp_path / ".out.journal", resume)
    model = hf_optim.optimize(model, steps, tokenizer=processor, journal=journal)
    with monkeypatch.context() as patch:
        patch.setattr(OptimTrainer, "training_step", step)
        return train_stage(model, processor, data, training), taken


def assert_same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert run_of(one).masks.keys() == run_of(other).masks.keys()
    for name, mask in run_of(one).masks.items():
        assert torch.equal(mask, run_of(other).masks[name]), name


@pytest.mark.many
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (texts, RAMP),
        (masked_texts, RAMP),
        (texts, [*RAMP, {"technique": "logit_kd"}]),
        (texts, TICKET),
        (texts, [{"technique": "upcycle", "experts": 2}, *RAMP]),  # whose checkpoints name experts one by one
    ],
    ids=["causal", "masked", "distilled", "rewound", "experts"],
)
def test_a_training_that_was_killed_goes_on_with_the_same_bits(tmp_path, monkeypatch, make, steps):
    unbroken, _ = journaled(tmp_path, make, steps, NINE, monkeypatch)
    with pytest.raises(Stop):
        journaled(tmp_path, make, steps, NINE, monkeypatch, stop_before=7)
    resumed, taken = journaled(tmp_path, make, steps, NINE, monkeypatch, resume=True)
    assert taken == [6, 7, 8]  # a checkpoint every second step
    assert_same(resumed, unbroken)
    assert run_of(resumed).record.stages[-1]["training_steps"] == 9
    kept = sorted(path.name for path in (tmp_path / ".out.journal/training-1/trainer").glob("checkpoint-*"))
    assert kept == ["checkpoint-8", "checkpoint-9"]
    again, taken = journaled(tmp_path, make, steps, NINE, monkeypatch, resume=True)
    assert taken == []  # it was finished, and in the midst of an epoch
    assert_same(again, unbroken)


@pytest.mark.slow
def test_a_calibration_behind_a_training_goes_on_too(tmp_path, monkeypatch):
    steps = [*RAMP, {"technique": "gptq", "group_size": 16}]
    calibration = {"dataset": str(tmp_path / "texts.jsonl"), "samples": 4, "seq_len": 16}

    def run(resume=False, blocks=None):
        model, processor, data = texts(tmp_path)
        kept, stock = [], BlockJournal.save

        def keep(self, *args):
            stock(self, *args)
            kept.append(args)
            if len(kept) == blocks:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(BlockJournal, "save", keep)
            journal = BlockJournal(tmp_path / ".out.journal", resume)
            recipe = {"steps": steps, "calibration": calibration}
            model = hf_optim.optimize(model, recipe, tokenizer=processor, journal=journal)
            return train_stage(model, processor, data, NINE), len(kept)

    unbroken, all_blocks = run()
    with pytest.raises(Stop):
        run(blocks=1)
    resumed, blocks = run(resume=True)
    assert blocks == all_blocks - 1
    assert_same(resumed, unbroken)


@pytest.mark.slow
def test_a_checkpoint_in_pieces_is_left_alone(tmp_path, monkeypatch):
    unbroken, _ = journaled(tmp_path, texts, RAMP, NINE, monkeypatch)
    with pytest.raises(Stop):
        journaled(tmp_path, texts, RAMP, NINE, monkeypatch, stop_before=5)
    pieces = tmp_path / ".out.journal/training-1/trainer/checkpoint-6"
    pieces.mkdir()
    (pieces / "model.safetensors").write_bytes(b"half")
    resumed, taken = journaled(tmp_path, texts, RAMP, NINE, monkeypatch, resume=True)
    assert taken == [4, 5, 6, 7, 8]
    assert_same(resumed, unbroken)


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("checkpoint-6/model.safetensors", [4, 5, 6, 7, 8]),
        ("checkpoint-6/optimizer.pt", [4, 5, 6, 7, 8]),
        ("../progress.json", [*range(9)]),
    ],
)
def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path, monkeypatch, caplog, file, taken):
    unbroken, _ = journaled(tmp_path, texts, RAMP, NINE, monkeypatch)
    with pytest.raises(Stop):
        journaled(tmp_path, texts, RAMP, NINE, monkeypatch, stop_before=7)
    damaged = tmp_path / ".out.journal/training-1/trainer" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    resumed, done = journaled(tmp_path, texts, RAMP, NINE, monkeypatch, resume=True)
    assert done == taken
    assert "damaged" in caplog.text
    assert_same(resumed, unbroken)


def test_without_resume_it_begins_anew(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        journaled(tmp_path, texts, RAMP, NINE, monkeypatch, stop_before=7)
    assert journaled(tmp_path, texts, RAMP, NINE, monkeypatch)[1] == list(range(9))


def test_another_training_cannot_go_on_with_it(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        journaled(tmp_path, texts, RAMP, NINE, monkeypatch, stop_before=7)
    other = [{**RAMP[0], "sparsity": 0.6}]
    with pytest.raises(CheckpointError, match=r"training of \[gmp\] .* another recipe; start without --resume"):
        journaled(tmp_path, texts, other, NINE, monkeypatch, resume=True)

    def other_texts(tmp_path):
        return (*texts(tmp_path)[:2], jsonl(tmp_path / "other.jsonl", [{"text": "the dog " * 20}] * 6))

    with pytest.raises(CheckpointError, match="another training data"):
        journaled(tmp_path, other_texts, RAMP, NINE, monkeypatch, resume=True)


def test_the_recipe_s_own_folder_is_used_and_kept(tmp_path, monkeypatch):
    own = {**NINE, "output_dir": str(tmp_path / "own")}
    (tmp_path / "own" / "checkpoint-99").mkdir(parents=True)  # of another training
    with pytest.raises(Stop):
        journaled(tmp_path, texts, RAMP, own, monkeypatch, stop_before=7)
    resumed, taken = journaled(tmp_path, texts, RAMP, own, monkeypatch, resume=True)
    assert taken == [6, 7, 8]
    run_of(resumed).journal.remove()
    assert {path.name for path in (tmp_path / "own").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8, 9, 99)
    }


def test_no_room_for_checkpoints_is_told(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("hf_optim.training.resume.shutil.disk_usage", lambda path: usage._replace(free=1000))
    journaled(tmp_path, texts, RAMP, TRAINING, monkeypatch)
    assert "no room for training checkpoints" in caplog.text
    assert not list(tmp_path.glob(".out.journal/**/checkpoint-*"))


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

"""Distillation on logits: the term for every kind of model, the teacher, its cache, and that it helps."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from toy_training import arguments, begin, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimConfig, RecipeError
from hf_optim.masking import stray_weights
from hf_optim.training import OptimTrainer
from hf_optim_plugins.distillation.logit_kd import LogitKD

T = 3.0
SEED = 0


def batch(model, ragged: bool = True) -> dict[str, torch.Tensor]:
    rows = sentences(4, ragged=ragged)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    if model.config.is_encoder_decoder:
        inputs["labels"] = inputs["labels"][:, :5].contiguous()
    elif not model.can_generate():
        inputs["labels"] = torch.tensor([0, 1, 2, 1])
    return inputs


def hooked(step: LogitKD, student, teacher, inputs):
    run = begin(student, step)
    run.state(step).teacher = teacher
    outputs = student(**inputs)
    (terms,) = run.call("training_loss", model=student, inputs=inputs, outputs=outputs)
    return terms, outputs


@pytest.mark.parametrize("builder", [tiny_llama, tiny_bert, tiny_t5], ids=["causal", "classifier", "seq2seq"])
def test_the_term_is_the_papers(builder):
    student, teacher = builder(), builder(seed=1)
    inputs = batch(student)
    terms, outputs = hooked(LogitKD(teacher=None, temperature=T, alpha=0.7), student, teacher, inputs)
    z_s, z_t, labels = outputs.logits, teacher(**inputs).logits, inputs["labels"]
    if builder is tiny_llama:
        z_s, z_t, labels = z_s[:, :-1], z_t[:, :-1], labels[:, 1:]
    scored = labels != -100
    p, log_q = (z_t[scored] / T).softmax(-1), (z_s[scored] / T).log_softmax(-1)
    expected = 0.7 * T**2 * (p * (p.log() - log_q)).sum(-1).mean()
    assert 0 < scored.sum() <= labels.numel()
    torch.testing.assert_close(terms["kd"], expected)
    assert terms["task_scale"] == pytest.approx(0.3)
    terms["kd"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_padding_is_left_out_where_there_are_no_labels():
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    inputs = {"input_ids": batch(student)["input_ids"], "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    inputs["attention_mask"][:, 7:] = 0
    terms, _ = hooked(LogitKD(teacher=None), student, teacher, inputs)
    short = {name: value[:, :7] for name, value in inputs.items()}
    expected, _ = hooked(LogitKD(teacher=None), student, teacher, short)
    torch.testing.assert_close(terms["kd"], expected["kd"])


def test_the_teacher_is_asked_in_evaluation_mode_and_frozen():
    student, teacher = tiny_bert(), tiny_bert(seed=1).train()
    step = LogitKD(teacher=None)
    one, _ = hooked(step, student, teacher, batch(student))
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    two, _ = hooked(LogitKD(teacher=None), student, teacher, batch(student))
    assert torch.equal(one["kd"], two["kd"])


# -- the teacher -----------------------------------------------------------------------------------------------------
def test_self_is_the_model_before_its_stage(tmp_path):
    recipe = OptimConfig.parse([{"technique": "nm"}, {"technique": "logit_kd"}])
    assert len(recipe.stages) == 1
    dense = tiny_llama()
    model = hf_optim.optimize(copy.deepcopy(dense), recipe)
    run = hf_optim.run_of(model)
    assert not run.finished
    teacher = run.state(recipe.steps[1]).teacher
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), dense.parameters(), strict=True))
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    args = arguments(tmp_path, max_steps=8, logging_strategy="steps", logging_steps=4)
    trainer = OptimTrainer(model=model, args=args, train_dataset=sentences())
    trainer.train()
    assert run.finished
    assert stray_weights(run) == []
    assert all(trait.holds(run) for trait in run.traits)
    assert {str(trait) for trait in run.traits} == {"float-weights", "sparse", "sparse-nm"}
    first, last = (entry for entry in trainer.state.log_history if "kd" in entry)
    assert last["kd"] < first["kd"]
    assert not hasattr(run.state(recipe.steps[1]), "teacher")  # its memory is free again
    assert run.record.steps["1"]["teacher"] == "self"


def test_a_teacher_that_is_the_student_is_noticed(caplog):
    model = hf_optim.optimize(tiny_llama(), [LogitKD()])
    run = hf_optim.run_of(model)
    inputs = batch(model)
    run.call("training_loss", model=model, inputs=inputs, outputs=model(**inputs))
    run.call("training_loss", model=model, inputs=inputs, outputs=model(**inputs))
    assert caplog.text.count("gave the same distribution on the first batch") == 1


def test_a_teacher_from_a_folder(tmp_path):
    teacher = tiny_llama(seed=1, hidden_size=16, num_hidden_layers=1)
    teacher.save_pretrained(tmp_path / "teacher")
    student = tiny_llama()
    inputs = batch(student)
    loaded, _ = hooked(LogitKD(teacher=str(tmp_path / "teacher")), student, None, inputs)
    given, _ = hooked(LogitKD(teacher=None), tiny_llama(), teacher, inputs)
    torch.testing.assert_close(loaded["kd"], given["kd"])


def trained(student, step: LogitKD, folder, teacher=None, **changes):
    run = begin(student, step)
    if teacher is not None:
        run.state(step).teacher = teacher
    args = arguments(folder, **changes)
    trainer = OptimTrainer(model=student, args=args, train_dataset=sentences(8, ragged=True))
    trainer.train()
    return trainer


def test_teachers_that_cannot_teach_are_refused_before_training(tmp_path):
    with pytest.raises(ModelError, match=r"step 1 \(logit_kd\) has no teacher.*state\(step\)\.teacher"):
        trained(tiny_llama(), LogitKD(teacher=None), tmp_path)
    with pytest.raises(ModelError, match="the teacher predicts 72 classes and the student 64"):
        trained(tiny_llama(), LogitKD(teacher=None), tmp_path, tiny_llama(vocab_size=72))
    with pytest.raises(ModelError, match="predicts 5 classes and the student 3"):
        trained(tiny_bert(), LogitKD(teacher=None), tmp_path, tiny_bert(num_labels=5))
    with pytest.raises(ModelError, match="nowhere' cannot be loaded"):
        trained(tiny_llama(), LogitKD(teacher=str(tmp_path / "nowhere")), tmp_path)


def test_another_tokenizer_is_refused(tmp_path, shared_models):
    teacher = AutoModelForCausalLM.from_pretrained(shared_models / "babyllama-1m")
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "babyllama-1m")
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    step = LogitKD(teacher=str(tmp_path / "teacher"))
    run = begin(teacher, step)
    vocabulary = tokenizer.get_vocab()
    one, other = sorted(vocabulary)[:2]
    swapped = {**vocabulary, one: vocabulary[other], other: vocabulary[one]}
    run.tokenizer = SimpleNamespace(get_vocab=lambda: swapped)
    (keeper,) = run.call("training_callbacks")[0]
    with pytest.raises(ModelError, match="different tokenizers"):
        keeper.on_train_begin(SimpleNamespace(process_index=0), None, None)
    run.tokenizer = tokenizer
    keeper.on_train_begin(SimpleNamespace(process_index=0), None, None)


def test_models_without_logits_are_refused():
    student = tiny_llama()
    step = LogitKD(teacher=None)
    run = begin(student, step)
    with pytest.raises(ModelError, match=r"step 1 \(logit_kd\): LlamaForCausalLM has no `logits`"):
        run.call("training_loss", model=student, inputs={}, outputs=SimpleNamespace(logits=None))


# -- the cache -------------------------------------------------------------------------------------------------------
def cached(folder, k: int | None, **fields) -> LogitKD:
    return LogitKD(teacher=None, top_k=k, cache=str(folder), **fields)


@pytest.mark.parametrize("k", [5, 64])
def test_a_cache_stands_for_the_teacher(tmp_path, k: int):
    logging = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 8}  # two epochs

    def losses(trainer):
        return [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]

    live = trained(tiny_llama(), LogitKD(teacher=None, top_k=k), tmp_path / "a", tiny_llama(seed=1), **logging)
    first = trained(tiny_llama(), cached(tmp_path / "cache", k), tmp_path / "b", tiny_llama(seed=1), **logging)
    assert losses(first) == losses(live)
    shards = list((tmp_path / "cache").iterdir())
    assert [shard.name for shard in shards] == ["teacher-0-00000.safetensors"]
    report = first.run.record.steps["0"]
    assert report["cache_samples"] == 8
    assert report["cache_bytes"] == shards[0].stat().st_size
    if k == 64:
        full = trained(tiny_llama(), LogitKD(teacher=None), tmp_path / "d", tiny_llama(seed=1), **logging)
        assert losses(first) == pytest.approx(losses(full), rel=1e-4)


def test_a_complete_cache_needs_no_teacher(tmp_path, monkeypatch):
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    step = LogitKD(teacher=str(tmp_path / "teacher"), top_k=5, cache=str(tmp_path / "cache"))
    one, two = tiny_llama(), tiny_llama()
    trained(one, step, tmp_path / "a")
    monkeypatch.setattr("hf_optim.toolkit.teachers.load", lambda *args: pytest.fail("the teacher was loaded"))
    trained(two, step, tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_killed_run_goes_on_with_what_was_written(tmp_path, monkeypatch):
    teacher = tiny_llama(seed=1)
    trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "a", teacher, max_steps=2)  # half of an epoch
    calls = []
    stock = hf_optim.toolkit.teachers.logits
    monkeypatch.setattr("hf_optim.toolkit.teachers.logits", lambda *args: calls.append(1) or stock(*args))
    trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "b", teacher, max_steps=4)
    assert len(calls) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_of_other_settings_is_refused(tmp_path):
    trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "a", tiny_llama(seed=1), max_steps=1)
    for step, teacher in (
        (cached(tmp_path / "cache", 6), tiny_llama(seed=1)),
        (cached(tmp_path / "cache", 5, temperature=1.0), tiny_llama(seed=1)),
        (cached(tmp_path / "cache", 5), tiny_llama(seed=2)),
    ):
        with pytest.raises(CheckpointError, match="give another directory"):
            trained(tiny_llama(), step, tmp_path / "b", teacher, max_steps=1)
    shard = next((tmp_path / "cache").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no readable shard"):
        trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "b", tiny_llama(seed=1), max_steps=1)


def test_a_sample_is_found_in_any_batch_and_padding():
    from hf_optim.toolkit.logit_cache import sample_keys

    row, other = [5, 6, 7], [8, 9]

    def keys(*rows, width):
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        return sample_keys({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})

    short, long = keys(row, width=3), keys(other, row, width=6)
    assert short[0] == long[1]
    assert long[0] != long[1]
    assert sample_keys({"input_ids": torch.tensor([row])}) != short


def test_a_cache_needs_top_k():
    with pytest.raises(RecipeError, match="say how many with top_k"):
        LogitKD(cache="somewhere")


def test_the_shipped_recipe():
    recipe = OptimConfig.parse("kd")
    recipe.check()
    assert [stage.trains for stage in recipe.stages] == [True]
    assert {"max_steps", "learning_rate"} <= set(recipe.training)
    assert OptimConfig.parse(recipe.to_dict()).to_dict() == recipe.to_dict()


# -- a real model ----------------------------------------------------------------------------------------------------
@pytest.fixture
def one_thread():
    """Matrices this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stories(folder, name: str, tokenizer, count: int) -> list[dict[str, torch.Tensor]]:
    """The first 48 tokens of stories, after bos."""
    rows = []
    for line in (folder / "tinystories" / name).read_text(encoding="utf-8").splitlines()[:count]:
        ids = [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids][:48]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)})
    return rows


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_student_of_half_the_depth_learns_more_from_the_teacher(tmp_path, shared_models, shared_data):
    """Layers 0, 2, 4 of five. Over seeds 0, 1, 2 the gain in evaluation loss is 0.38, 0.42 and 0.33 nats."""
    home = shared_models / "babyllama-1m"
    tokenizer, teacher = AutoTokenizer.from_pretrained(home), AutoModelForCausalLM.from_pretrained(home)
    train = stories(shared_data, "train.jsonl", tokenizer, 320)
    held_out = stories(shared_data, "eval.jsonl", tokenizer, 32)
    losses = {}
    for alpha in (0.0, 0.9):
        student = AutoModelForCausalLM.from_pretrained(home, num_hidden_layers=3)
        for i, layer in enumerate((0, 2, 4)):
            student.model.layers[i].load_state_dict(teacher.model.layers[layer].state_dict())
        run = begin(student, step := LogitKD(teacher=None, alpha=alpha))
        run.state(step).teacher = teacher
        schedule = {"max_steps": 40, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "seed": SEED}
        args = arguments(tmp_path, per_device_train_batch_size=8, **schedule)
        trainer = OptimTrainer(model=student, args=args, train_dataset=train, eval_dataset=held_out)
        trainer.train()
        losses[alpha] = trainer.evaluate()["eval_loss"]
    assert losses[0.9] < losses[0.0] - 0.15

"""Distillation on logits: the term for every kind of model, the teacher, its cache, and its effect."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from real_stories import beginnings
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from toy_training import arguments, begin, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hf_optim
from hf_optim import CheckpointError, DataConfig, ModelError, OptimConfig, RecipeError, run_of
from hf_optim.runs.masking import stray_weights
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit import topology
from hf_optim.toolkit.distillation import teachers
from hf_optim.toolkit.distillation.hidden_states import RecorderCallback
from hf_optim.toolkit.distillation.logit_cache import LogitCache
from hf_optim.toolkit.distillation.losses import TopK
from hf_optim.training.fit import training_rows
from hf_optim.training.trainer import OptimTrainer
from hf_optim_kernels.kd_loss import op
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


LABELS = {
    "regression": ({"num_labels": 1}, torch.tensor([0.3, -100.0, 2.0, -1.0])),
    "several numbers": ({"num_labels": 3, "problem_type": "regression"}, torch.zeros(4, 3)),
    "labels": ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(4, 3)),
    "labels by the batch": ({"num_labels": 3}, torch.eye(4, 3)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_the_term_of_a_head_without_classes(kind):
    fields, labels = LABELS[kind]
    student, teacher = tiny_bert(**fields), tiny_bert(seed=1, **fields)
    inputs = {**batch(student), "labels": labels}
    terms, outputs = hooked(LogitKD(teacher=None, temperature=T, alpha=0.7), student, teacher, inputs)
    z_s, z_t = outputs.logits, teacher(input_ids=inputs["input_ids"]).logits
    p, q = (z_t / T).sigmoid(), (z_s / T).sigmoid()
    expected = {
        "labels": T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(),
        "regression": (z_s - z_t).square().mean(),
    }["labels" if kind.startswith("labels") else "regression"]
    torch.testing.assert_close(terms["kd"], 0.7 * expected)
    assert terms["kd"] > 0
    terms["kd"].backward()
    assert student.classifier.weight.grad.abs().sum() > 0


def test_a_regression_learns_from_the_model_before_it_was_pruned(tmp_path):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hf_optim.optimize(
        tiny_bert(num_labels=1, **quiet),
        [{"technique": "magnitude", "sparsity": 0.9}, {"technique": "logit_kd", "alpha": 1.0}],
    )
    rows = [{"input_ids": row["input_ids"], "labels": torch.tensor(0.5)} for row in sentences()]
    args = arguments(tmp_path, max_steps=16, logging_strategy="steps", logging_steps=4)
    trainer = OptimTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    terms = [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]
    assert 0 < terms[-1] < terms[0]
    assert run_of(model).record.notes == []


@pytest.mark.parametrize("kind", ["regression", "labels"])
def test_a_head_without_classes_has_no_top_k(kind, tmp_path):
    fields, _ = LABELS[kind]
    step = LogitKD(teacher=None, top_k=2, cache=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"step 1 \(logit_kd\): Bert\w+ predicts .*: leave out top_k and cache"):
        hf_optim.optimize(tiny_bert(**fields), [step])
    with pytest.raises(ModelError, match="leave out top_k and cache"):
        trained(tiny_bert(**fields), step, tmp_path / "out", tiny_bert(seed=1, **fields))
    assert not (tmp_path / "cache").exists()


def test_padding_is_left_out_where_there_are_no_labels():
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    inputs = {"input_ids": batch(student)["input_ids"], "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    inputs["attention_mask"][:, 7:] = 0
    terms, _ = hooked(LogitKD(teacher=None), student, teacher, inputs)
    short = {name: value[:, :7] for name, value in inputs.items()}
    expected, _ = hooked(LogitKD(teacher=None), student, teacher, short)
    torch.testing.assert_close(terms["kd"], expected["kd"])


def test_the_teacher_is_frozen_and_runs_in_evaluation_mode():
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
    assert all(holds(trait, run) for trait in run.traits)
    assert {str(trait) for trait in run.traits} == {"float-weights", "sparse", "sparse-nm"}
    first, last = (entry for entry in trainer.state.log_history if "kd" in entry)
    assert last["kd"] < first["kd"]
    assert not hasattr(run.state(recipe.steps[1]), "teacher")  # its memory is free again
    assert run.record.steps["1"]["teacher"] == "self"


@pytest.mark.parametrize(
    "other",
    [
        {"technique": "distilbert", "alpha_ce": 0.0},
        {"technique": "upcycle", "experts": 2, "noise": 0.1},
        {"technique": "structured", "neurons": 0.25, "score": "magnitude"},
    ],
    ids=lambda step: step["technique"],
)
def test_self_is_the_model_before_another_step_replaced_it(other, tmp_path):
    recipe = OptimConfig.parse([other, {"technique": "logit_kd", "alpha": 1.0}])
    assert len(recipe.stages) == 1
    dense = tiny_llama(num_hidden_layers=4)
    model = hf_optim.optimize(copy.deepcopy(dense), recipe)
    run = run_of(model)
    teacher = run.state(recipe.steps[1]).teacher
    assert type(teacher) is type(dense)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), dense.parameters(), strict=True))
    args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
    trainer = OptimTrainer(model=model, args=args, train_dataset=sentences())
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 1e-3
    assert run.record.notes == []


def test_a_student_that_would_learn_from_itself_is_refused(tmp_path):
    def train(model, rows=None):
        args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
        trainer = OptimTrainer(model=model, args=args, train_dataset=rows or sentences())
        trainer.train()
        return [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]

    message = r"step 1 \(logit_kd\): with teacher: self, another step of.* must change.*put the step.*or name a teacher"
    with pytest.raises(RecipeError, match=message):
        train(hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0)]))
    with pytest.raises(RecipeError, match=message):
        train(hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0), {"technique": "distilbert"}]))
    unlabelled = [{"input_ids": row["input_ids"]} for row in sentences()]
    with pytest.raises(RecipeError, match=message):
        train(hf_optim.optimize(tiny_llama(), [LogitKD()]), unlabelled)
    # Labels teach, or a step that changes the model while it trains, or its owner changed it.
    assert train(hf_optim.optimize(tiny_llama(), [LogitKD()]))[-1] > 0
    assert train(hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0), {"technique": "gmp", "end": 1}]))
    model = hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0)])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 5:] = 0
    assert train(model)[0] > 0
    model = hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0)])
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert train(model)[0] > 0
    model = hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0)])
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output / 2)
    assert train(model)[0] > 0


def test_adapters_may_learn_from_the_model_without_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = hf_optim.optimize(tiny_llama(), [LogitKD(alpha=1.0)])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = arguments(tmp_path, max_steps=4, logging_strategy="steps", logging_steps=1)
    trainer = OptimTrainer(model=adapted, args=args, train_dataset=sentences())
    trainer.train()
    assert [entry["kd"] for entry in trainer.state.log_history if "kd" in entry][-1] > 0


def test_a_teacher_identical_to_the_student_is_reported_once(caplog):
    model = hf_optim.optimize(tiny_llama(), [LogitKD()])
    run = hf_optim.run_of(model)
    inputs = batch(model)
    run.call("training_loss", model=model, inputs=inputs, outputs=model(**inputs))
    run.call("training_loss", model=model, inputs=inputs, outputs=model(**inputs))
    assert caplog.text.count("gave the same outputs on the first batch") == 1


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
    for place in (str(tmp_path / "nowhere"), "/nowhere", "./nowhere", "../nowhere", "~/nowhere", "a/b/nowhere"):
        with pytest.raises(ModelError, match=r"step 1 \(logit_kd\): .*nowhere' cannot be loaded: no such folder"):
            trained(tiny_llama(), LogitKD(teacher=place), tmp_path)
    with pytest.raises(ModelError, match=r"'org/nowhere' cannot be loaded: (?!no such folder)"):
        trained(tiny_llama(), LogitKD(teacher="org/nowhere"), tmp_path)


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


def test_a_module_teacher_with_another_tokenizer_is_refused_and_an_unknown_one_noted(tmp_path, shared_models):
    home = shared_models / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    teacher, student = (AutoModelForCausalLM.from_pretrained(home) for _ in range(2))

    def begun(tokenizer):
        run = begin(student, step := LogitKD(teacher=None))
        run.state(step).teacher, run.tokenizer = teacher, tokenizer
        run.call("training_callbacks")[0][0].on_train_begin(SimpleNamespace(process_index=0), None, None)
        return run

    vocabulary = tokenizer.get_vocab()
    one, other = sorted(vocabulary)[:2]
    swapped = {**vocabulary, one: vocabulary[other], other: vocabulary[one]}
    with pytest.raises(ModelError, match="different tokenizers"):
        begun(SimpleNamespace(get_vocab=lambda: swapped))
    assert begun(tokenizer).record.notes == []
    teacher.config._name_or_path = ""
    (note,) = begun(tokenizer).record.notes
    assert "could not be compared" in note


def test_unavailable_devices_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"logit_kd: device must be 'same', 'offload', or a device"):
        LogitKD(device="nowhere")
    with pytest.raises(ModelError, match="the teacher cannot be put on device 'cuda:77'"):
        trained(tiny_llama(), LogitKD(teacher=None, device="cuda:77"), tmp_path, tiny_llama(seed=1))
    spread = tiny_llama(seed=1)
    spread.hf_device_map = {"": 0}
    with pytest.raises(ModelError, match="dispatched over devices by its device_map"):
        trained(tiny_llama(), LogitKD(teacher=None, device="cpu"), tmp_path, spread)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["same", "offload", "cpu"])
def test_a_teacher_on_another_device_gives_the_same_term(device):
    student = tiny_llama().cuda()
    inputs = {name: value.cuda() for name, value in batch(student).items()}
    near, _ = hooked(LogitKD(teacher=None), student, tiny_llama(seed=1), inputs)
    teacher = tiny_llama(seed=1)
    far, _ = hooked(LogitKD(teacher=None, device=device), student, teacher, inputs)
    torch.testing.assert_close(far["kd"], near["kd"])
    far["kd"].backward()
    where = "cuda" if device == "same" else "cpu"
    assert {p.device.type for p in teacher.model.layers.parameters()} == {where}


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_the_kernel_replaces_the_chunks(direction, monkeypatch):
    """Its operator runs the specification on a CPU; the teacher's logits are overwritten in the backward."""
    student, step = tiny_llama(), {"teacher": None, "temperature": T, "direction": direction, "beta": 0.3}
    inputs = batch(student)
    chunks, _ = hooked(LogitKD(**step), student, tiny_llama(seed=1), inputs)
    chunks["kd"].backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    monkeypatch.setattr("hf_optim_plugins.distillation._fused_kd._kernel_supports", lambda *logits: True)
    called, stock = [], op.kd_loss
    monkeypatch.setattr(op, "kd_loss", lambda *given, **options: called.append(options) or stock(*given, **options))
    kernel, _ = hooked(LogitKD(**step), student, tiny_llama(seed=1), inputs)
    assert called[0]["overwrite_teacher"]
    torch.testing.assert_close(kernel["kd"], chunks["kd"])
    kernel["kd"].backward()
    for ours, wanted in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, wanted, rtol=1e-4, atol=1e-6)


# -- data without labels ---------------------------------------------------------------------------------------------
STILL = {
    tiny_llama: {},
    tiny_bert: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    tiny_t5: {"dropout_rate": 0.0},
}


@pytest.mark.parametrize("builder", STILL, ids=["causal", "classifier", "seq2seq"])
def test_without_labels_the_loss_is_the_teachers_term(builder, tmp_path):
    """On random tokens."""
    student = builder(**STILL[builder])
    run = begin(student, step := LogitKD(teacher=None, alpha=0.7))
    run.state(step).teacher = builder(seed=1)
    settings = {"max_steps": 24, "learning_rate": 3e-3, "logging_steps": 8, "logging_strategy": "steps"}
    found = {}

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            found.setdefault("logs", []).append(logs)

    data = DataConfig("random", samples=16, seq_len=8, batch_size=4)
    rows, collator = training_rows(student, None, data)
    assert not any("labels" in row for row in rows)
    args = arguments(tmp_path, **settings)
    OptimTrainer(model=student, args=args, train_dataset=rows, data_collator=collator, callbacks=[Watch()]).train()
    first, _, last = (logs for logs in found["logs"] if "kd" in logs)
    assert first["task_loss"] == last["task_loss"] == 0
    assert first["loss"] == pytest.approx(first["kd"], abs=2e-4)
    assert last["kd"] < first["kd"]
    assert run.finished


def test_padding_of_a_decoder_is_left_out_by_its_own_mask():
    """The encoder's mask may have the decoder's shape."""
    student, teacher = tiny_t5(), tiny_t5(seed=1)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}
    inputs["attention_mask"][:, 4:] = 0
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    whole, _ = hooked(LogitKD(teacher=None), student, teacher, inputs)
    short, _ = hooked(LogitKD(teacher=None), student, teacher, {**inputs, "decoder_attention_mask": mask})
    cut = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :5]}
    expected, _ = hooked(LogitKD(teacher=None), student, teacher, cut)
    torch.testing.assert_close(short["kd"], expected["kd"])
    assert whole["kd"] != short["kd"]


# -- hidden states ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("builder", STILL, ids=["causal", "classifier", "seq2seq"])
def test_squarehead_is_the_papers(builder):
    """The sum over blocks of the mean square difference over the teacher's mean square, without padding."""
    student, teacher = builder(**STILL[builder]), builder(seed=1).eval()
    inputs = batch(student)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1:, 4:] = 0
    run = begin(student, step := LogitKD(teacher=None, alpha_states=0.5))
    run.state(step).teacher = teacher
    recorder = run_callbacks(run, RecorderCallback)[0]
    recorder.on_step_begin(None, None, None)
    (terms,) = run.call("training_loss", model=student, inputs=inputs, outputs=student(**inputs))
    recorder.on_step_end(None, None, None)
    expected = 0.0
    for ours, theirs, mask in zip(block_outputs(student, inputs), block_outputs(teacher, inputs),
                                  block_masks(student, inputs), strict=True):  # fmt: skip
        expected += ((ours - theirs)[mask] ** 2).mean() / (theirs[mask] ** 2).mean()
    torch.testing.assert_close(terms["states"].sum(), 0.5 * expected)
    terms["states"].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    first = topology.blocks(student)[0].module
    assert all(p.grad is not None and p.grad.any() for p in first.parameters() if p.dim() == 2)
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


@pytest.mark.parametrize("again", [False, True], ids=["in this run", "before the checkpoint"])
def test_hidden_states_are_compared_channel_by_channel_after_a_permutation(tmp_path, again):
    """A permuted model has the same function, so the terms are zero before the first step."""
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    kd = {"technique": "logit_kd", "alpha_states": 1.0}
    permuted = hf_optim.optimize(dense, [{"technique": "channel_permutation"}, *([] if again else [kd])])
    embedding = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").get_input_embeddings().weight
    assert not torch.equal(permuted.get_input_embeddings().weight, embedding)
    if again:
        permuted.save_pretrained(tmp_path / "permuted")
        recipe = [{**kd, "teacher": str(tmp_path / "dense")}]
        permuted = hf_optim.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "permuted"), recipe)
    run = run_of(permuted)
    for callback in (c for found in run.call("training_callbacks") for c in found):
        callback.on_train_begin(None, None, None)
        callback.on_step_begin(None, None, None)
    inputs = batch(permuted)
    (terms,) = run.call("training_loss", model=permuted, inputs=inputs, outputs=permuted(**inputs))
    assert abs(float(terms["kd"].detach())) < 1e-6
    assert float(terms["states"].detach().sum()) < 1e-6


def run_callbacks(run, kind):
    return [c for found in run.call("training_callbacks") for c in found if isinstance(c, kind)]


def block_outputs(model, inputs) -> list[torch.Tensor]:
    """Return the outputs of the blocks, before any final norm."""
    found = []
    handles = [
        block.module.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in topology.blocks(model)
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def block_masks(model, inputs) -> list[torch.Tensor]:
    encoder = inputs["attention_mask"].bool()
    if not model.config.is_encoder_decoder:
        return [encoder] * len(topology.blocks(model))
    decoder = inputs["labels"] != -100
    return [decoder if "decoder" in block.name else encoder for block in topology.blocks(model)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_train_with_accumulation_and_gradient_checkpointing(tmp_path, checkpointing):
    student, step = tiny_llama(), LogitKD(teacher=None, alpha=1.0, alpha_states=1.0)
    settings = {"max_steps": 12, "learning_rate": 3e-3, "gradient_accumulation_steps": 2, "logging_steps": 4,
                "logging_strategy": "steps", "activation_checkpointing": checkpointing}  # fmt: skip
    trainer = trained(student, step, tmp_path, tiny_llama(seed=1), **settings)
    terms = [logs["states"] for logs in trainer.state.log_history if "states" in logs]
    assert terms[-1] < 0.9 * terms[0]
    assert not any(block.module._forward_hooks for block in topology.blocks(student))


def test_hidden_states_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="a cache keeps no hidden states"):
        LogitKD(top_k=4, cache="somewhere", alpha_states=1.0)
    step = LogitKD(teacher=None, alpha_states=1.0)
    deeper = tiny_llama(seed=1, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"the teacher has 3 of width \d+ and the student 2 of width \d+"):
        trained(tiny_llama(), step, tmp_path / "depth", deeper)
    wider = tiny_llama(seed=1, hidden_size=64)
    with pytest.raises(ModelError, match="the teacher has 2 of width 64 and the student 2 of width 32"):
        trained(tiny_llama(), step, tmp_path / "width", wider)
    frozen = tiny_llama().requires_grad_(False)
    frozen.lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="no gradient reaches the last block"):
        trained(frozen, step, tmp_path / "frozen", tiny_llama(seed=1))


# -- the cache -------------------------------------------------------------------------------------------------------
def cached(folder, k: int | None, **fields) -> LogitKD:
    return LogitKD(teacher=None, top_k=k, cache=str(folder), **fields)


@pytest.mark.parametrize("k", [5, 64])
def test_a_cache_replaces_the_teacher(tmp_path, k: int):
    logging = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 8}  # two epochs

    def losses(trainer):
        return [entry["kd"] for entry in trainer.state.log_history if "kd" in entry]

    live = trained(tiny_llama(), LogitKD(teacher=None, top_k=k), tmp_path / "a", tiny_llama(seed=1), **logging)
    first = trained(tiny_llama(), cached(tmp_path / "cache", k), tmp_path / "b", tiny_llama(seed=1), **logging)
    assert losses(first) == losses(live)
    shards = list((tmp_path / "cache").iterdir())
    assert [shard.name for shard in shards] == ["teacher-0-00000.safetensors"]
    report = first.run.record.steps["0"]
    first.model.save_pretrained(tmp_path / "saved")
    assert f"in {shards[0].stat().st_size:,} bytes" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
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
    monkeypatch.setattr(
        "hf_optim.toolkit.distillation.teachers.load", lambda *args: pytest.fail("the teacher was loaded")
    )
    trained(two, step, tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_killed_run_continues_with_the_cached_entries(tmp_path, monkeypatch):
    teacher = tiny_llama(seed=1)
    trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "a", teacher, max_steps=2)  # half of an epoch
    calls = []
    stock = hf_optim.toolkit.distillation.teachers.forward_logits
    monkeypatch.setattr(
        "hf_optim.toolkit.distillation.teachers.forward_logits", lambda *args: calls.append(1) or stock(*args)
    )
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
        with pytest.raises(CheckpointError, match="use another directory"):
            trained(tiny_llama(), step, tmp_path / "b", teacher, max_steps=1)
    shard = next((tmp_path / "cache").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable shard"):
        trained(tiny_llama(), cached(tmp_path / "cache", 5), tmp_path / "b", tiny_llama(seed=1), max_steps=1)


def test_a_cache_of_a_teacher_that_changed_at_its_path_is_refused(tmp_path, monkeypatch):
    step = LogitKD(teacher=str(tmp_path / "teacher"), top_k=5, cache=str(tmp_path / "cache"))
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    trained(tiny_llama(), step, tmp_path / "a", max_steps=1)
    trained(tiny_llama(), step, tmp_path / "b", max_steps=1)
    tiny_llama(seed=2).save_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="use another directory"):
        trained(tiny_llama(), step, tmp_path / "c", max_steps=1)
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    trained(tiny_llama(), step, tmp_path / "d", max_steps=1)
    changed = json.loads((tmp_path / "teacher" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**changed, "rope_theta": 77.0}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="use another directory"):
        trained(tiny_llama(), step, tmp_path / "e", max_steps=1)


def test_a_cache_without_a_hash_of_its_teachers_files_is_refused(tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    step = LogitKD(teacher=str(tmp_path / "teacher"), top_k=5, cache=str(tmp_path / "cache"))
    settings = {"teacher": step.teacher, "temperature": step.temperature, "top_k": 5, "classes": 64}
    cache = LogitCache(tmp_path / "cache", settings)
    cache.put("some sample", TopK(torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 5), torch.zeros(1)))
    cache.flush()
    with pytest.raises(CheckpointError, match="use another directory"):
        trained(tiny_llama(), step, tmp_path / "out", max_steps=1)


def test_training_continues_after_a_failure_with_the_loaded_teacher(tmp_path):
    """The module that was loaded from a path does not count as another teacher."""
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    step = LogitKD(teacher=str(tmp_path / "teacher"), top_k=5, cache=str(tmp_path / "cache"))
    run = begin(tiny_llama(), step)
    (keeper,) = run.call("training_callbacks")[0]
    inputs = batch(run.model)
    for _ in range(2):
        keeper.on_train_begin(SimpleNamespace(process_index=0), None, None)
        run.call("training_loss", model=run.model, inputs=inputs, outputs=run.model(**inputs))
        keeper.on_save(None, None, None)


def test_the_files_of_a_teacher(tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    tiny_llama().save_pretrained(folder)
    weights = folder / "model.safetensors"
    found = {teachers.hash_files(str(folder))}
    assert {teachers.hash_files(str(folder))} == found
    raw = weights.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for place in (header, len(raw) - 1):
        weights.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        found.add(teachers.hash_files(str(folder)))
    weights.rename(folder / "other.safetensors")
    found.add(teachers.hash_files(str(folder)))
    assert len(found) == 4
    # Of a Hub id the commit, where one is on this machine.
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("ab" * 20, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert teachers.hash_files("org/model") == "ab" * 20
    assert teachers.hash_files("org/other") == "org/other"


def test_a_sample_is_found_in_any_batch_and_padding():
    from hf_optim.toolkit.distillation.logit_cache import sample_keys

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
    with pytest.raises(RecipeError, match="set their number with top_k"):
        LogitKD(cache="somewhere")


def test_the_shipped_recipe():
    recipe = OptimConfig.parse("kd")
    recipe.check()
    assert [stage.trains for stage in recipe.stages] == [True]
    assert {"max_steps", "learning_rate"} <= set(recipe.training)
    assert OptimConfig.parse(recipe.to_dict()).to_dict() == recipe.to_dict()


# -- a real model ----------------------------------------------------------------------------------------------------
@pytest.mark.real_model
def test_a_student_of_half_the_depth_learns_more_from_the_teacher(tmp_path, shared_models, shared_data):
    """Layers 0, 2, 4 of five. Over seeds 0, 1, 2 the gain in evaluation loss is 0.38, 0.42 and 0.33 nats."""
    home = shared_models / "babyllama-1m"
    tokenizer, teacher = AutoTokenizer.from_pretrained(home), AutoModelForCausalLM.from_pretrained(home)
    train = beginnings(shared_data, "train.jsonl", tokenizer, 320)
    held_out = beginnings(shared_data, "eval.jsonl", tokenizer, 32)
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

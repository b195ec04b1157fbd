"""DistilBERT: the student's layers and ties, each term against its formula, and the effect on a student."""

from __future__ import annotations

import pytest
import torch
from real_stories import beginnings
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2, tiny_t5, tiny_vit
from toy_training import arguments, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import hf_optim
from hf_optim import ModelError, OptimConfig, OptimError, RecipeError
from hf_optim.lifecycle.stages import start_run
from hf_optim.runs.run import run_of
from hf_optim.toolkit.distillation import students
from hf_optim.toolkit.distillation.hidden_states import Recorder, base_models
from hf_optim.training.trainer import OptimTrainer
from hf_optim_plugins.distillation.distilbert import DistilBERT

T = 2.0
DEEP = {
    tiny_llama: {"num_hidden_layers": 4},
    tiny_qwen2: {"num_hidden_layers": 4},
    tiny_gpt2: {"n_layer": 4},
    tiny_opt: {"num_hidden_layers": 4},
    tiny_bert: {"num_hidden_layers": 4},
    tiny_vit: {"num_hidden_layers": 4},
    tiny_t5: {"num_layers": 4, "num_decoder_layers": 4},
    tiny_mixtral: {"num_hidden_layers": 4},
}


def deep(builder, **changes):
    return builder(**DEEP[builder], **changes)


def bert(cls, **changes):
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


# -- the student -----------------------------------------------------------------------------------------------------
@pytest.mark.many(every=4)
@pytest.mark.parametrize("builder", DEEP, ids=lambda builder: builder.__name__)
def test_the_student_is_every_other_layer_of_its_teacher(builder):
    teacher = deep(builder)
    weights = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    student = hf_optim.optimize(teacher, DistilBERT())
    assert type(student) is type(teacher)
    for stack in students.block_indices(teacher):
        assert len(student.get_submodule(stack)) == 2
        for name, ours in student.get_submodule(stack).named_parameters(prefix=stack):
            index, rest = name.removeprefix(stack + ".").split(".", 1)
            assert torch.equal(ours, weights[f"{stack}.{(0, 3)[int(index)]}.{rest}"])
    inside = tuple(stack + "." for stack in students.block_indices(teacher))
    outside = {name: p for name, p in student.named_parameters() if not name.startswith(inside)}
    assert outside
    assert all(torch.equal(p, weights[name]) for name, p in outside.items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    if teacher.get_output_embeddings() is not None and teacher.config.tie_word_embeddings:
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    figures = run_of(student).record.steps["0"]
    assert figures["layer_parameters_after"] < 0.6 * figures["layer_parameters_before"]


def test_the_student_is_what_its_saved_config_builds(tmp_path):
    student = hf_optim.optimize(deep(tiny_qwen2, layer_types=["full_attention"] * 4), DistilBERT(layers=(0, 2)))
    assert student.config.layer_types == ["full_attention"] * 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    hf_optim.release(student).save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)
        assert torch.equal(student.generate(ids, max_new_tokens=3), again.generate(ids, max_new_tokens=3))


def test_every_other_layer_is_that_of_the_papers_code():
    assert students.evenly_spaced(12, 6) == (0, 2, 4, 7, 9, 11)
    assert students.evenly_spaced(6, 3) == (0, 2, 5)
    assert students.evenly_spaced(5, 3) == (0, 2, 4)
    assert students.evenly_spaced(3, 1) == (0,)
    step = DistilBERT(every=3)
    assert len(hf_optim.optimize(deep(tiny_llama), step).model.layers) == 2


def test_impossible_students_are_refused():
    for layers in ([2, 1], [-1, 1], [], [0, 0]):
        with pytest.raises(RecipeError, match=r"distilbert: layers are the indices .* in ascending order, not \["):
            OptimConfig.parse([{"technique": "distilbert", "layers": layers}])
    with pytest.raises(RecipeError, match="all four weights are 0"):
        DistilBERT(alpha_ce=0.0, alpha_task=0.0, alpha_cos=0.0, alpha_pool=0.0)
    with pytest.raises(ModelError, match=r"step 1 \(distilbert\): layers must be indices below 4, .* not \[0, 4\]"):
        hf_optim.optimize(deep(tiny_llama), DistilBERT(layers=(0, 4)))
    with pytest.raises(ModelError, match=r"all 4 layers of model\.layers are kept"):
        hf_optim.optimize(deep(tiny_llama), DistilBERT(layers=(0, 1, 2, 3)))
    with pytest.raises(ModelError, match=r"layer 0 of encoder\.block has parameters that other layers do not have"):
        hf_optim.optimize(deep(tiny_t5), DistilBERT(layers=(1, 3)))
    with pytest.raises(RecipeError, match="distilbert: device must be"):
        DistilBERT(device="moon")


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_token_types_and_pooler_can_be_dropped(cls, tmp_path):
    teacher = bert(cls)
    kept = hf_optim.optimize(bert(cls), DistilBERT())
    plain = hf_optim.optimize(teacher, step := DistilBERT(token_types=False))
    assert step.reload() is hf_optim.Reload.STOCK_ARCH
    assert type(plain).__name__ == cls.__name__.replace("Bert", "DistilBert")
    inputs = {"input_ids": torch.arange(3, 11).repeat(2, 1), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs)[0], kept(**inputs)[0])
    assert not [name for name, _ in plain.named_parameters() if "token_type" in name or "pooler" in name]
    if cls is BertForMaskedLM:
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    hf_optim.release(plain).save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], plain(**inputs)[0])


def test_others_keep_their_token_types():
    with pytest.raises(ModelError, match=r"step 1 \(distilbert\): BertForSequenceClassification has no counterpart"):
        hf_optim.optimize(deep(tiny_bert), DistilBERT(token_types=False))


def test_masks_follow_their_layers():
    teacher = deep(tiny_llama)
    recipe = [{"technique": "magnitude", "sparsity": 0.5}, {"technique": "distilbert"}]
    student = hf_optim.optimize(teacher, recipe)
    run = run_of(student)
    assert [len(stage.steps) for stage in run.stages] == [1, 1]
    assert {name.split(".")[2] for name in run.masks} == {"0", "1"}
    for name, mask in run.masks.items():
        assert ((student.get_parameter(name) != 0) == mask).all()


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    "first",
    [
        {"technique": "magnitude"},
        {"technique": "nm"},
        {"technique": "gmp", "end": 1},
        {"technique": "lr_rewinding", "rounds": 1},
    ],
    ids=lambda step: step["technique"],
)
def test_a_pruned_teacher_gives_a_student_whose_card_names_its_own_layers(first, tmp_path):
    recipe = OptimConfig.parse([{**first, "skip": ["*.3.mlp.*"]}, {"technique": "distilbert"}])
    model = hf_optim.optimize(deep(tiny_llama), recipe)
    settings = {"save_strategy": "no", "max_steps": 2, "learning_rate": 1e-4}
    if recipe.steps[0].spec.trains:
        OptimTrainer(model=model, args=arguments(tmp_path / "a", **settings), train_dataset=sentences()).train()
        model = hf_optim.advance(model)
    run = run_of(model)
    projections = {name for name, _ in model.named_modules() if name.endswith("_proj")}
    assert run.covered(recipe.steps[0])[0] == {n for n in projections if not n.startswith("model.layers.1.mlp")}
    OptimTrainer(model=model, args=arguments(tmp_path / "b", **settings), train_dataset=sentences()).train()
    model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| model.layers.*.self_attn.q_proj | 2 | 2,048 |" in card
    assert "| model.layers.*.mlp.up_proj | 1 | 1,536 |" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, mask in run.masks.items():
        assert not again.get_parameter(name)[~mask].any()


def test_masks_and_coverage_follow_to_the_class_without_token_types(tmp_path):
    recipe = OptimConfig.parse([{"technique": "nm"}, {"technique": "distilbert", "token_types": False}])
    student = hf_optim.optimize(bert(BertForMaskedLM), recipe)
    run = run_of(student)
    names = run.covered(recipe.steps[0])[0]
    assert "distilbert.transformer.layer.1.attention.q_lin" in names
    assert {f"{name}.weight" for name in names} == set(run.masks) == set(run.nm_patterns)
    OptimTrainer(model=student, args=arguments(tmp_path, max_steps=1), train_dataset=sentences()).train()
    student.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{len(names)} linear layers keep at most 2 of every 4" in card


def test_assigned_bits_follow_their_layers():
    run = start_run(OptimConfig.parse([{"technique": "distilbert"}]), deep(tiny_llama).config)
    run.model = deep(tiny_llama)
    run.bit_plan = {f"model.layers.{i}.mlp.up_proj": 2 + i for i in range(4)}
    run.call("transform_model")
    assert run.bit_plan == {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 5}


# -- the loss --------------------------------------------------------------------------------------------------------
def terms_of(teacher, inputs, **fields):
    """Return the hook's terms, the student's outputs with hidden states, and the teacher's."""
    student = hf_optim.optimize(teacher, step := DistilBERT(**fields))
    run = run_of(student)
    with Recorder(base_models(student)) as run.state(step).states:
        outputs = student(**inputs, output_hidden_states=True)
        (terms,) = run.call("training_loss", model=student, inputs=inputs, outputs=outputs)
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    return terms, outputs, theirs, student


def cosine(ours, theirs, keep):
    dot = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    return (1 - dot)[keep].mean()


def kl(ours, theirs, keep):
    p, q = (theirs / T).softmax(-1), (ours / T).softmax(-1)
    return T**2 * (p * (p / q).log()).sum(-1)[keep].mean()


@pytest.mark.parametrize("kind", ["masked", "causal", "causal gpt2"])
def test_each_term_is_its_formula(kind):
    teacher = {
        "masked": lambda: bert(BertForMaskedLM),
        "causal": lambda: deep(tiny_llama),
        "causal gpt2": lambda: deep(tiny_gpt2),
    }[kind]()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.8, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    terms, ours, theirs, student = terms_of(teacher, inputs, alpha_ce=5.0, alpha_task=2.0, alpha_cos=1.5)
    keep = mask.bool()
    torch.testing.assert_close(terms["kd"], 5.0 * kl(ours.logits, theirs.logits, keep))
    torch.testing.assert_close(
        terms["cosine"].sum(), 1.5 * cosine(ours.hidden_states[-1], theirs.hidden_states[-1], keep)
    )
    assert terms["task_scale"] == 2.0
    (terms["kd"] + terms["cosine"].sum()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_an_encoder_decoder_compares_both_halves():
    teacher = deep(tiny_t5)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :4].clone()
    labels[0, 3:] = -100
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    terms, ours, theirs, _ = terms_of(teacher, inputs)
    encoder = cosine(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state, mask.bool())
    decoder = cosine(ours.decoder_hidden_states[-1], theirs.decoder_hidden_states[-1], labels != -100)
    torch.testing.assert_close(terms["cosine"].sum(), (encoder + decoder) / 2)
    torch.testing.assert_close(terms["kd"], 5.0 * kl(ours.logits, theirs.logits, labels != -100))


def test_a_classifier_and_a_bare_encoder():
    inputs = {"input_ids": torch.arange(3, 11)[None].repeat(2, 1), "attention_mask": torch.ones(2, 8)}
    inputs["attention_mask"][1, 5:] = 0
    terms, ours, theirs, _ = terms_of(deep(tiny_bert), inputs)
    torch.testing.assert_close(terms["kd"], 5.0 * kl(ours.logits, theirs.logits, torch.ones(2, dtype=torch.bool)))
    terms, ours, theirs, _ = terms_of(bert(BertModel), inputs, alpha_pool=3.0)
    assert set(terms) == {"cosine", "pooled", "task_scale"}
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(terms["cosine"].sum(), cosine(ours.last_hidden_state, theirs.last_hidden_state, keep))
    states = [o.last_hidden_state for o in (ours, theirs)]
    vectors = [torch.stack([h[k].mean(0) for h, k in zip(each, keep, strict=True)]) for each in states]
    torch.testing.assert_close(terms["pooled"].sum(), 3.0 * cosine(*vectors, torch.ones(2, dtype=torch.bool)))


@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_a_classifier_without_classes(fields):
    inputs = {"input_ids": torch.arange(3, 11)[None].repeat(2, 1), "attention_mask": torch.ones(2, 8)}
    terms, ours, theirs, _ = terms_of(deep(tiny_bert, **fields), inputs)
    p, q = (theirs.logits / T).sigmoid(), (ours.logits / T).sigmoid()
    binary = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    expected = (ours.logits - theirs.logits).square().mean() if "num_labels" in fields else binary
    assert expected > 0
    torch.testing.assert_close(terms["kd"], 5.0 * expected)


def test_a_model_without_recorded_states_is_refused():
    student = hf_optim.optimize(deep(tiny_llama), DistilBERT())
    inputs = {"input_ids": torch.arange(3, 11)[None]}
    with pytest.raises(ModelError, match="set alpha_cos: 0"):
        run_of(student).call("training_loss", model=student, inputs=inputs, outputs=student(**inputs))


# -- training --------------------------------------------------------------------------------------------------------
def trainer_for(folder, teacher, rows, **changes):
    student = hf_optim.optimize(teacher, DistilBERT())
    return OptimTrainer(model=student, args=arguments(folder, **changes), train_dataset=rows)


def test_a_bare_encoder_learns_without_labels_and_keeps_no_hooks(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in sentences()]
    changes = {"max_steps": 16, "logging_strategy": "steps", "logging_steps": 4, "learning_rate": 3e-3}
    trainer = trainer_for(tmp_path, bert(BertModel), rows, **changes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "cosine" in entry]
    assert logs[-1]["cosine"] < logs[0]["cosine"]
    assert all(entry["task_loss"] == 0 for entry in logs)
    run = trainer.run
    assert run.finished
    assert not hasattr(run.state(run.recipe.steps[0]), "teacher")  # its memory is free again
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "50 % fewer" in card
    assert "encoder.layer: 0, 3" in card


def test_a_batch_that_gives_no_loss_is_refused(tmp_path):
    student = hf_optim.optimize(deep(tiny_llama), DistilBERT(alpha_ce=0.0, alpha_cos=0.0))
    rows = [{"input_ids": row["input_ids"]} for row in sentences()]
    trainer = OptimTrainer(model=student, args=arguments(tmp_path), train_dataset=rows)
    with pytest.raises(OptimError, match="a batch of input_ids gives no loss: it has no labels"):
        trainer.train()


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    through = trainer_for(tmp_path / "a", deep(tiny_llama), sentences(), **changes)
    through.train()
    again = trainer_for(tmp_path / "b", deep(tiny_llama), sentences(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.state.global_step == 6
    pairs = zip(through.model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), (_, q) in pairs)


def test_evaluation_has_only_the_task_loss(tmp_path):
    rows = sentences(4)
    trainer = trainer_for(tmp_path, deep(tiny_llama), rows)
    loss = trainer.evaluate(rows)["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        expected = trainer.model(ids, labels=ids).loss
    assert loss == pytest.approx(float(expected), rel=1e-5)


# -- a real model ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.smoke
def test_a_student_of_half_the_depth_is_better_than_without_its_teacher(shared_models, shared_data, tmp_path):
    """Layers 0, 2, 4 of five, 40 steps; the gain in evaluation loss is 0.42 nats."""
    home = shared_models / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    train = beginnings(shared_data, "train.jsonl", tokenizer, 320)
    held_out = beginnings(shared_data, "eval.jsonl", tokenizer, 32)
    found = {}
    for name, weights in (("kd", {}), ("alone", {"alpha_ce": 0.0, "alpha_task": 1.0, "alpha_cos": 0.0})):
        student = hf_optim.optimize(AutoModelForCausalLM.from_pretrained(home), DistilBERT(**weights))
        schedule = {"max_steps": 40, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "seed": 0}
        args = arguments(tmp_path, per_device_train_batch_size=8, **schedule)
        trainer = OptimTrainer(model=student, args=args, train_dataset=train, eval_dataset=held_out)
        trainer.train()
        found[name] = trainer.evaluate()["eval_loss"]
    assert found["kd"] < found["alone"] - 0.2, found

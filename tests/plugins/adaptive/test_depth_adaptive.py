"""Losses, oracles and classifiers of depth_adaptive against their equations, and its way through training and files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    TrainingArguments,
)

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimTrainer, RecipeError
from hf_optim.cli import main
from hf_optim.testing.tiny_runs import training_examples
from hf_optim.toolkit.exits import (
    FILE,
    ExitSettings,
    attach_exits,
    exits_of,
    forward_with_exits,
    record_states,
    run_held,
    run_to_exit,
    save_exits,
)
from hf_optim_plugins.adaptive._exit_oracles import (
    exit_weights,
    log_probabilities,
    quality,
    smooth,
    targets,
)
from hf_optim_plugins.adaptive._exit_training import balanced, mixed_loss

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def arguments(folder, steps=3, **more):
    given = {"save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 2, **more}
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **given,
    )


def optimized(model, **fields):
    return hf_optim.optimize(model, [{"technique": "depth_adaptive", **fields}])


def trained(model, folder, steps=3, **fields):
    model = optimized(model, **fields)
    OptimTrainer(model=model, args=arguments(folder, steps), train_dataset=training_examples(model)).train()
    return hf_optim.run_of(model).model.eval()


def terms_of(model, inputs, **fields):
    """Return the terms of the loss of one batch, and the task's loss, as a training step sees them."""
    model = optimized(model, **fields)  # in evaluation mode: no dropout
    run = hf_optim.run_of(model)
    step = run.recipe.steps[0]
    split = balanced(exits_of(model).count) if fields.get("gradient_scaling") else None
    with record_states(model, split) as states:
        outputs = model(**inputs)
        run.state(step).states = states
        terms = step.training_loss(run=run, model=model, inputs=inputs, outputs=outputs)
    return model, terms, outputs


# -- the equations ----------------------------------------------------------------------------------------------------
def test_weights_of_exits_are_those_of_the_paper():
    assert exit_weights("uniform", 4) == [0.25] * 4
    assert exit_weights("linear", 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert exit_weights("inverse", 2) == pytest.approx([2 / 3, 1 / 3])
    roots = [math.sqrt(n) for n in (1, 2, 3)]
    assert exit_weights("sqrt", 3) == pytest.approx([r / sum(roots) for r in roots])
    assert exit_weights("inverse_sqrt", 3) == pytest.approx([(1 / r) / sum(1 / r for r in roots) for r in roots])


def test_laws_against_loops_in_float64():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = log_probabilities(logits, "geometric")
    for row in range(5):
        stays = 1.0
        for exit_index in range(4):
            stop = 1 / (1 + math.exp(-float(logits[row, exit_index]))) if exit_index < 3 else 1.0
            assert float(found[row, exit_index]) == pytest.approx(math.log(stays * stop), abs=1e-12)
            stays *= 1 - stop
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(log_probabilities(logits, "multinomial"), logits.log_softmax(-1))


def test_smoothing_and_targets_against_loops_in_float64():
    scores = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sigma, penalty = 2.5, 0.3
    found = smooth(scores, sigma)
    for row in range(2):
        for token in range(6):
            sums = [
                sum(math.exp(-((token - t) ** 2) / sigma) * float(scores[row, t, n]) for t in range(6))
                for n in range(3)
            ]
            assert found[row, token].tolist() == pytest.approx(sums)
            best = max(range(3), key=lambda n: sums[n] - penalty * n)
            assert int(targets(found, penalty)[row, token]) == best
    assert torch.equal(smooth(scores, 0.0), scores)
    torch.testing.assert_close(smooth(scores, 1e-4), scores)


def test_quality_by_likelihood_and_by_correctness():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([int(logits[0].argmax()), (int(logits[1].argmax()) + 1) % 5, 2, -100])
    right = quality(logits, labels, "correctness")
    assert right[:2].tolist() == [1.0, 0.0]
    assert float(right[3]) == 0.0
    likely = quality(logits, labels, "likelihood")
    torch.testing.assert_close(likely[:3], -functional.cross_entropy(logits[:3], labels[:3], reduction="none"))
    assert float(likely[3]) == 0.0


def test_equal_exits_and_a_penalty_choose_the_shallowest():
    equal = torch.zeros(3, 4)
    assert targets(equal, 0.0).tolist() == [0, 0, 0]
    rising = torch.tensor([[0.0, 0.5, 1.0]])
    assert [int(targets(rising, penalty)) for penalty in (0.0, 0.4, 0.6)] == [2, 2, 0]


# -- losses on models -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["uniform", "inverse"])
@pytest.mark.parametrize("make", [lambda: tiny_llama(num_hidden_layers=3), lambda: tiny_gpt2(n_layer=3)])
def test_the_aligned_loss_and_its_gradient_are_those_of_models_cut_off_at_each_exit(make, weights):
    inputs = {"input_ids": IDS, "labels": IDS}
    model, terms, outputs = terms_of(make().double(), inputs, weights=weights)
    loss = terms["task_scale"] * outputs.loss + terms["exits"]
    loss.backward()
    reference = make().double()
    attach_exits(reference, ExitSettings((0, 1)))
    shares = exit_weights(weights, 3)
    expected = sum(w * run_to_exit(reference, n, **inputs).output.loss for n, w in enumerate(shares))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # transformers takes the loss in float32
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_gradient_scaling_gives_each_block_the_mean_of_the_gradients_above_it():
    """A chain of three scalars: the exit after n adds w_n to the gradient of all before it."""
    split, x = balanced(3), torch.ones(1, requires_grad=True)
    first, passed = split(0, x * 1.0)
    second, passed = split(1, passed * 1.0)
    third, _ = split(2, passed * 1.0)
    (2.0 * first + 3.0 * second + 7.0 * third).sum().backward()
    assert x.grad.item() == pytest.approx((2 + 3 + 7) / 3)
    y = torch.ones(1, requires_grad=True)
    a, through = split(1, y * 1.0)
    (3.0 * a + 7.0 * split(2, through)[0]).sum().backward()
    assert y.grad.item() == pytest.approx((3 + 7) / 2)


def test_gradient_scaling_changes_gradients_and_no_value():
    inputs = {"input_ids": IDS, "labels": IDS}
    found = []
    for scaling in (False, True):
        model, terms, outputs = terms_of(tiny_llama(num_hidden_layers=3).double(), inputs, gradient_scaling=scaling)
        loss = terms["task_scale"] * outputs.loss + terms["exits"]
        loss.backward()
        found.append((loss.item(), [layer.mlp.up_proj.weight.grad for layer in model.model.layers]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1][2], found[1][1][2], atol=1e-12, rtol=1e-9)  # the last block: one loss
    assert not torch.allclose(found[0][1][0], found[1][1][0])


@pytest.mark.parametrize("training", ["aligned", "mixed"])
def test_smoothed_labels_reach_every_exit(training, tmp_path):
    def step(**more):
        torch.manual_seed(0)
        model = optimized(tiny_llama(num_hidden_layers=3), training=training)
        args = arguments(tmp_path / str(more), 1, **more)
        trainer = OptimTrainer(model=model, args=args, train_dataset=training_examples(model))
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]

    plain, barely, smoothed = (step(label_smoothing_factor=factor) for factor in (0.0, 1e-6, 0.3))
    assert barely == pytest.approx(plain, abs=1e-4)
    assert abs(smoothed - plain) > 1e-3


def test_exits_are_trained_in_mixed_precision(tmp_path):
    def after(**more):
        model = optimized(tiny_llama(num_hidden_layers=3), heads="own", classifier="token")
        args = arguments(tmp_path / str(more), 2, **more)
        trainer = OptimTrainer(model=model, args=args, train_dataset=training_examples(model))
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]

    assert after(bf16=True) == pytest.approx(after(), rel=1e-2)


def test_mixed_training_is_the_loss_of_tokens_that_stop_where_they_are_drawn():
    model = tiny_llama(num_hidden_layers=3).double()
    exits = attach_exits(model, ExitSettings((0, 1)))
    torch.manual_seed(5)
    found = mixed_loss(exits, {"input_ids": IDS, "labels": IDS}, 1, "step")
    torch.manual_seed(5)
    drawn = torch.randint(3, IDS.shape)
    expected = run_held(model, lambda index, hidden: drawn == index, input_ids=IDS, labels=IDS).output.loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert all(p.grad is not None for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("law", ["multinomial", "geometric"])
def test_the_classifier_learns_its_oracle_and_leaves_the_model_alone(law):
    inputs = {"input_ids": IDS, "labels": IDS}
    model, terms, _ = terms_of(
        tiny_llama(num_hidden_layers=3).double(), inputs, classifier="token", law=law, depth_penalty=0.05, smoothing=1.5
    )
    exits = exits_of(model)
    with torch.no_grad():
        logits = [run_to_exit(model, n, input_ids=IDS).output.logits for n in range(3)]
    padded = functional.pad(IDS[:, 1:], (0, 1), value=-100)
    scores = torch.stack([quality(each, padded, "likelihood") for each in logits], -1)
    wanted = targets(smooth(scores, 1.5), 0.05)[:, :-1]
    count = 3  # the classifier starts at zero: all exits are equally probable, or stop with probability a half
    chance = [1 / count] * 3 if law == "multinomial" else [0.5, 0.25, 0.25]
    expected = -torch.tensor(chance, dtype=torch.float64).log()[wanted].mean()
    assert terms["exit_classifier"].item() == pytest.approx(expected.item(), rel=1e-5)
    terms["exit_classifier"].backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in exits.classifier.parameters())


def test_padding_and_unlabelled_tokens_are_in_no_term():
    mask = torch.ones_like(IDS)
    mask[0, -3:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    fields = {"classifier": "token", "smoothing": 2.0, "heads": "own"}
    found = []
    for filler in (7, 11):
        ids = IDS.masked_fill(mask == 0, filler)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        _, terms, _ = terms_of(tiny_llama(num_hidden_layers=3).double(), inputs, **fields)
        found.append([terms["exits"].item(), terms["exit_classifier"].item()])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# -- training and files -----------------------------------------------------------------------------------------------
def test_training_makes_exits_better_and_the_checkpoint_is_the_stock_model(tmp_path):
    before = tiny_llama(num_hidden_layers=3)
    attach_exits(before, ExitSettings((0, 1)))
    examples = torch.stack([each["input_ids"] for each in training_examples(before)])
    with torch.no_grad():
        losses = [float(run_to_exit(before, n, input_ids=examples, labels=examples).output.loss) for n in range(3)]
    model = trained(tiny_llama(num_hidden_layers=3), tmp_path / "t", 20)
    with torch.no_grad():
        now = [float(run_to_exit(model, n, input_ids=examples, labels=examples).output.loss) for n in range(3)]
    assert all(a < b - 0.3 for a, b in zip(now, losses, strict=True))
    model.save_pretrained(tmp_path / "m")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert exits_of(stock) is None
    with torch.no_grad():
        assert torch.equal(stock(input_ids=IDS).logits, model(input_ids=IDS).logits)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "2 early exits, after blocks 0, 1 of 3" in card
    assert "Quality, memory and times in the results, where there are any, are those of all blocks." in card


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: tiny_llama(num_hidden_layers=3), {"heads": "own", "classifier": "token", "law": "geometric"}),
        (lambda: tiny_llama(num_hidden_layers=3), {"training": "mixed", "classifier": "sequence"}),
        (lambda: tiny_bert(num_hidden_layers=3), {"heads": "own", "classifier": "sequence", "oracle": "correctness"}),
    ],
)
def test_auto_brings_exits_back_also_after_saving_again(make, fields, tmp_path):
    model = trained(make(), tmp_path / "t", **fields)
    model.save_pretrained(tmp_path / "m")
    auto = AutoModelForSequenceClassification if "Bert" in type(model).__name__ else AutoModelForCausalLM
    found = auto.from_pretrained(tmp_path / "m", optim_config="auto")
    expected = forward_with_exits(model, rule="classifier", input_ids=IDS)
    got = forward_with_exits(found, rule="classifier", input_ids=IDS)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.exits, expected.exits)
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "m" / FILE).read_bytes()
    hf_optim.release(model)
    model.save_pretrained(tmp_path / "released")
    assert (tmp_path / "released" / FILE).exists()
    (tmp_path / "m" / FILE).unlink()
    with pytest.raises(CheckpointError, match=FILE):
        auto.from_pretrained(tmp_path / "m", optim_config="auto")


def test_exits_outlive_quantization_and_are_trained_over_quantized_weights(tmp_path):
    model = trained(tiny_llama(num_hidden_layers=3), tmp_path / "t", heads="own", classifier="token")
    model.save_pretrained(tmp_path / "m")
    rtn = [{"technique": "rtn", "bits": 4, "group_size": 16}]
    for number, load in enumerate(
        (
            lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "m", optim_config=rtn),
            lambda: hf_optim.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), rtn),
        )
    ):
        quantized = load()
        assert exits_of(quantized) is not None
        quantized.save_pretrained(tmp_path / f"q{number}")
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / f"q{number}", optim_config="auto")
        with torch.no_grad():
            found = run_to_exit(packed, 1, input_ids=IDS)
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / f"q{number}")
            full = stock(input_ids=IDS).logits
            torch.testing.assert_close(run_to_exit(packed, 2, input_ids=IDS).output.logits, full, atol=1e-4, rtol=1e-4)
            assert torch.equal(exits_of(packed).logits(1, found.hidden), found.output.logits)
    over = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q0",
        optim_config=[{"technique": "depth_adaptive", "heads": "own", "train_model": False, "layers": [1]}],
    )
    before = {name: value.clone() for name, value in over.state_dict().items()}
    OptimTrainer(model=over, args=arguments(tmp_path / "o"), train_dataset=training_examples(over)).train()
    over = hf_optim.run_of(over).model.eval()
    assert all(torch.equal(value, before[name]) for name, value in over.state_dict().items())
    over.save_pretrained(tmp_path / "over")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "over", optim_config="auto")
    assert exits_of(back).settings == ExitSettings((1,), "own")


def test_training_resumes_to_the_same_exits(tmp_path):
    fields = {"heads": "own", "classifier": "token"}
    whole = trained(tiny_llama(num_hidden_layers=3), tmp_path / "whole", 4, **fields)
    model = optimized(tiny_llama(num_hidden_layers=3), **fields)
    args = arguments(tmp_path / "cut", 4, save_strategy="steps", save_steps=2)
    OptimTrainer(model=model, args=args, train_dataset=training_examples(model)).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert not (checkpoint / FILE).exists()
    assert "hf_optim_exits" not in json.loads((checkpoint / "config.json").read_text())
    again = optimized(tiny_llama(num_hidden_layers=3), **fields)
    OptimTrainer(model=again, args=args, train_dataset=training_examples(again)).train(str(checkpoint))
    again = hf_optim.run_of(again).model
    for name, value in exits_of(whole).state_dict().items():
        torch.testing.assert_close(exits_of(again).state_dict()[name], value)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_exits_of_a_checkpoint_are_trained_on(tmp_path):
    model = trained(tiny_llama(num_hidden_layers=3), tmp_path / "t", heads="own")
    model.save_pretrained(tmp_path / "m")
    step = {"technique": "depth_adaptive", "heads": "own", "train_model": False}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", optim_config=[step])
    for name, value in exits_of(model).state_dict().items():
        assert torch.equal(exits_of(found).state_dict()[name], value)


def test_own_heads_of_a_frozen_encoder_learn_the_vectors_of_the_last_exit(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    before = copy.deepcopy(model.state_dict())
    rows = [
        {"input_ids": torch.randint(3, 60, (9,)), "attention_mask": torch.ones(9, dtype=torch.int64)} for _ in range(16)
    ]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def distances(model):
        with torch.no_grad():
            vectors = [forward_with_exits(model, rule="fixed", exit_index=n, **inputs) for n in range(3)]
        last = vectors[-1].last_hidden_state.mean(1)
        return [
            float((1 - functional.cosine_similarity(each.last_hidden_state.mean(1), last)).mean()) for each in vectors
        ]

    model = optimized(model, heads="own", train_model=False)
    start = distances(model)
    OptimTrainer(model=model, args=arguments(tmp_path, 40, learning_rate=3e-3), train_dataset=rows).train()
    model = hf_optim.run_of(model).model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    end = distances(model)
    assert end[0] < 0.7 * start[0]
    assert end[2] == start[2]


def test_figures_by_exit_are_measured_on_an_evaluation_set(tmp_path):
    model = optimized(tiny_llama(num_hidden_layers=3), classifier="sequence")
    examples = training_examples(model)
    trainer = OptimTrainer(
        model=model,
        args=arguments(tmp_path / "t", 2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8),
        train_dataset=examples,
        eval_dataset=examples,
    )
    trainer.train()
    model = hf_optim.run_of(model).model.eval()
    figures = hf_optim.run_of(model).record.steps["0"]
    ids = torch.stack([each["input_ids"] for each in examples])
    with torch.no_grad():
        losses = [float(run_to_exit(model, n, input_ids=ids, labels=ids).output.loss) for n in range(3)]
    assert figures["loss_by_exit"] == pytest.approx(losses, rel=1e-4)
    used = forward_with_exits(model, rule="classifier", input_ids=ids).mean_layers()
    assert figures["mean_layers"] == pytest.approx(used)
    model.save_pretrained(tmp_path / "m")
    assert "Loss by exit" in (tmp_path / "m" / "README.md").read_text()


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"training": "mixed", "heads": "own"}, "one head reads"),
        ({"training": "mixed", "train_model": False, "classifier": "token"}, "trains the model"),
        ({"train_model": False}, "nothing to train"),
        ({"smoothing": 1.0}, "smoothing is over tokens"),
        ({"law": "geometric"}, "law is that of a classifier"),
        ({"gradient_scaling": True, "training": "mixed"}, "gradient_scaling"),
        ({"layers": [1, 0]}, "ascend"),
        ({"layers": [-1]}, "counted from 0"),
        ({"heads": "none"}, "heads"),
        ({"paths": 0}, "paths"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, match):
    with pytest.raises(RecipeError, match=match):
        hf_optim.OptimConfig.parse([{"technique": "depth_adaptive", **fields}])


@pytest.mark.parametrize(
    ("make", "fields", "match"),
    [
        (tiny_t5, {}, "encoder-decoder"),
        (tiny_llama, {"layers": [1]}, "layers can name blocks up to 0, not 1"),
        (tiny_llama, {"layers": [0, 9]}, "blocks 0 to 1"),
        (lambda: tiny_llama(num_hidden_layers=1), {}, "one block"),
        (tiny_bert, {"classifier": "token"}, "does not read each token alone"),
        (lambda: BertModel(tiny_bert().config), {"classifier": "sequence"}, "does not predict classes"),
        (
            lambda: BertForSequenceClassification(BertConfig(**{**tiny_bert().config.to_dict(), "num_labels": 1})),
            {"classifier": "sequence"},
            "does not predict classes",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_work(make, fields, match):
    with pytest.raises(ModelError, match=match) as caught:
        optimized(make(), **fields)
    assert "(depth_adaptive)" in str(caught.value)


def test_data_without_labels_is_refused(tmp_path):
    model = optimized(tiny_llama(num_hidden_layers=3))
    rows = [{"input_ids": each["input_ids"]} for each in training_examples(model)]
    with pytest.raises(ModelError, match="needs labels"):
        OptimTrainer(model=model, args=arguments(tmp_path), train_dataset=rows).train()


@pytest.mark.parametrize("driver", ["streamed", "blockwise"])
def test_compress_keeps_the_exits_of_a_checkpoint(driver, tmp_path):
    model = tiny_llama(num_hidden_layers=3)
    attach_exits(model, ExitSettings((0, 1), "own", "token"))
    (tmp_path / "m").mkdir()
    save_exits(model, tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    output = tmp_path / "out"
    main(["compress", str(tmp_path / "m"), "--recipe", "rtn", "--output", str(output), "--driver", driver, "--quiet"])
    found = AutoModelForCausalLM.from_pretrained(output, optim_config="auto")
    assert exits_of(found).settings == exits_of(model).settings
    assert (output / FILE).read_bytes() == (tmp_path / "m" / FILE).read_bytes()


def test_exits_that_are_not_beside_the_weights_are_dropped_with_a_warning(tmp_path, caplog):
    model = tiny_llama(num_hidden_layers=3)
    attach_exits(model, ExitSettings((0, 1)))
    save_exits(model, tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    found = hf_optim.optimize(AutoModelForCausalLM.from_pretrained(tmp_path), [{"technique": "rtn"}])
    assert any(FILE in record.getMessage() for record in caplog.records)
    found.save_pretrained(tmp_path / "q")
    assert "hf_optim_exits" not in json.loads((tmp_path / "q" / "config.json").read_text())

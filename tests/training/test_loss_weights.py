"""The gradient of an optimizer step does not depend on how its batch is cut, for any head and any loss term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from helpers.toy_training import arguments
from torch import nn

import hf_optim
from hf_optim.training import OptimTrainer
from hf_optim.training.loss_weights import TASK_KEY, count_items, step_weights

ROWS, LENGTH, VOCABULARY, CLASSES = 8, 10, 48, 3
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(cls: type, **changes: Any) -> nn.Module:
    return cls(tf.BertConfig(**{**TEXT, **changes}, classifier_dropout=0.0))


def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH))


def uneven(labels: torch.Tensor) -> torch.Tensor:
    """Rows with 9, 1, 5, 0, 2, 8, 0 and 3 labels, so that some micro-batches have none."""
    for row, kept in enumerate((9, 1, 5, 0, 2, 8, 0, 3)):
        labels[row, : LENGTH - kept] = -100
    return labels


def padded(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    for row, kept in enumerate((10, 3, 7, 10, 2, 9, 5, 4)):
        mask[row, kept:] = 0
    return mask


def causal() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = tf.LlamaConfig(**{key: TEXT[key] for key in list(TEXT)[:5]})
    tokens = ids()
    return tf.LlamaForCausalLM(config), {
        "input_ids": tokens,
        "attention_mask": padded(tokens),
        "labels": uneven(tokens.clone()),
    }


def seq2seq() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    tokens = ids()
    labels = uneven(ids())
    return tf.T5ForConditionalGeneration(config), {
        "input_ids": tokens,
        "attention_mask": padded(tokens),
        "labels": labels,
        "decoder_input_ids": ids(),
    }


def masked() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = ids()
    return bert(tf.BertForMaskedLM), {
        "input_ids": tokens,
        "attention_mask": padded(tokens),
        "labels": uneven(tokens.clone()),
    }


def sequence() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = ids()
    return bert(tf.BertForSequenceClassification), {
        "input_ids": tokens,
        "attention_mask": padded(tokens),
        "labels": torch.tensor([0, 1, 2, -100, -100, 1, -100, 0]),
    }


def regression() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = ids()
    return bert(tf.BertForSequenceClassification, num_labels=1), {"input_ids": tokens, "labels": torch.randn(ROWS)}


def independent() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = bert(tf.BertForSequenceClassification, problem_type="multi_label_classification")
    return model, {"input_ids": ids(), "labels": torch.randint(0, 2, (ROWS, CLASSES)).float()}


def token() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = ids()
    return bert(tf.BertForTokenClassification), {
        "input_ids": tokens,
        "attention_mask": padded(tokens),
        "labels": uneven(torch.randint(0, CLASSES, (ROWS, LENGTH))),
    }


def choice() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = torch.randint(3, VOCABULARY, (ROWS, 2, LENGTH))
    return bert(tf.BertForMultipleChoice), {"input_ids": tokens, "labels": torch.randint(0, 2, (ROWS,))}


def answers() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return bert(tf.BertForQuestionAnswering, num_labels=2), {
        "input_ids": ids(),
        "start_positions": torch.tensor([0, 3, 99, 99, 1, 2, 0, 99]),
        "end_positions": torch.tensor([2, 4, 99, 99, 5, 2, 9, 99]),
    }


def image() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = tf.ViTConfig(**{**TEXT, "image_size": 8, "patch_size": 4})
    return tf.ViTForImageClassification(config), {
        "pixel_values": torch.randn(ROWS, 3, 8, 8, dtype=torch.float64),
        "labels": torch.randint(0, CLASSES, (ROWS,)),
    }


HEADS = (causal, seq2seq, masked, sequence, regression, independent, token, choice, answers, image)
KD = {"technique": "logit_kd", "teacher": None, "alpha": 0.5}
STEPS: dict[str, dict[str, Any]] = {
    "logit_kd": KD,
    "top_k": {**KD, "top_k": 5},
    "states": {**KD, "alpha_states": 0.5},
    "distilbert": {"technique": "distilbert", "alpha_pool": 1.0},
    "l0": {"technique": "l0", "weight": 3.0, "begin": 0, "end": 0, "on": "weights"},
    "variational_dropout": {"technique": "variational_dropout", "begin": 0, "end": 0, "weight": 5.0},
}
UNSUPPORTED = {("answers", "logit_kd"), ("answers", "top_k"), ("answers", "states")}
UNSUPPORTED |= {("regression", "top_k"), ("independent", "top_k")}
UNSUPPORTED |= {("choice", "states"), ("choice", "distilbert")}  # their graph is not traced


class InOrder(OptimTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def step_of(folder: Any, head: Any, recipe: dict[str, Any], size: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the change of the weights in a step of SGD on all rows, in micro-batches of ``size``, and the log."""
    torch.manual_seed(0)
    model, data = head()
    torch.manual_seed(7)
    teacher, _ = head()
    model = hf_optim.optimize(model.double(), [recipe])
    run = hf_optim.run_of(model)
    state = run.state(run.recipe.steps[0])
    if recipe.get("teacher", "") is None:
        state.teacher = teacher.double()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    rows = [{name: value[i] for name, value in data.items()} for i in range(ROWS)]
    settings = arguments(
        folder, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=ROWS // size, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer = InOrder(model=model, args=settings, train_dataset=rows)
    trainer.train()
    change = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    return change, trainer.state.log_history[0]


CASES = [
    (head, step)
    for head in HEADS
    for step in ("logit_kd", "top_k", "states", "distilbert")
    if (head.__name__, step) not in UNSUPPORTED
]


@pytest.mark.many
@pytest.mark.parametrize(("head", "step"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_step_does_not_depend_on_how_its_batch_is_cut(tmp_path, head, step: str):
    whole, log = step_of(tmp_path, head, STEPS[step], ROWS)
    assert whole.norm() > 0
    for size in (4, 2, 1):
        cut, parts = step_of(tmp_path, head, STEPS[step], size)
        # Losses of some heads are computed in float32.
        assert (cut - whole).norm() <= 1e-5 * whole.norm(), size
        for name in log.keys() & {"loss", "task_loss", "kd", "states", "cosine", "pooled"}:
            assert parts[name] == pytest.approx(log[name], rel=1e-4, abs=1e-6), (size, name)


def without_labels() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, data = causal()
    return model, {**data, "labels": torch.full((ROWS, LENGTH), -100)}


@pytest.mark.many(every=4)
@pytest.mark.parametrize(("step", "term"), [("l0", "l0"), ("variational_dropout", "kl")])
def test_a_penalty_counts_once_for_each_step(tmp_path, step: str, term: str):
    """Also in a step without labels, where no other term has a gradient."""
    recipe = STEPS[step] | ({"examples": 100} if step == "variational_dropout" else {})
    _, log = step_of(tmp_path, without_labels, recipe, ROWS)
    assert log["task_loss"] == 0.0
    assert log[term] > 0.0
    for size in (4, 1):
        _, parts = step_of(tmp_path, without_labels, recipe, size)
        assert parts[term] == pytest.approx(log[term], rel=1e-5)
        assert parts["loss"] == pytest.approx(log["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_divergence_of_variational_dropout_is_divided_by_the_examples_of_any_cut(tmp_path):
    logs = [step_of(tmp_path, causal, STEPS["variational_dropout"], size)[1]["kl"] for size in (8, 4, 1)]
    assert logs[1:] == [pytest.approx(logs[0], rel=1e-5)] * 2


@pytest.mark.many
@pytest.mark.parametrize("step", ["logit_kd", "top_k", "states", "distilbert"])
def test_a_step_without_labels_has_only_the_terms_that_need_none(tmp_path, step: str):
    for size in (8, 2):
        change, log = step_of(tmp_path, without_labels, STEPS[step], size)
        assert change.isfinite().all()
        assert log["task_loss"] == 0.0
        if step in ("logit_kd", "top_k"):
            assert change.norm() == 0.0
            assert log["loss"] == log["kd"] == 0.0
        else:
            assert change.norm() > 0.0


def test_weights_over_ranks_add_up_to_the_share_of_the_whole_batch():
    """Gradients are averaged over ranks: the weight of a batch is its share times the ranks."""
    counts = [[count_items([{"a": [n, 2 * n]}], task) for n, task in rank] for rank in ([(1, 0), (3, 2)], [(4, 6)] * 2)]
    totals = [torch.tensor([[2.0, 2.0, 4.0, 8.0]]), torch.tensor([[12.0, 2.0, 8.0, 16.0]])]
    found = [step_weights(rank, torch.device("cpu"), lambda own: torch.cat(totals).to(own), 2) for rank in counts]
    task = [[float(batch[TASK_KEY]) / 2 for batch in rank] for rank in found]
    assert task == [[0.0, pytest.approx(2 / 14)], [pytest.approx(6 / 14)] * 2]
    parts = torch.stack([batch[0, "a"] for rank in found for batch in rank])
    torch.testing.assert_close(parts.sum(0), torch.full((2,), 2.0, dtype=torch.float64))

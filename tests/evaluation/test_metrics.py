"""Metrics against their definitions, against each other's batching, and against evaluate's interface."""

from __future__ import annotations

import math

import evaluate
import pytest
import torch

from hf_optim.evaluation import metrics
from hf_optim.evaluation.metrics import (
    Accuracy,
    KLDivergence,
    Perplexity,
    Spearman,
    TopOneAgreement,
    average_ranks,
    metrics_for,
    spearman,
)
from hf_optim.evaluation.reported import REPORTED_METRICS


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ALL = (Accuracy, KLDivergence, Perplexity, Spearman, TopOneAgreement)


def test_every_metric_of_a_task_is_reported():
    assert metrics_for("fill-mask") == [Perplexity, Accuracy]
    assert metrics_for("token-classification") == []
    reported = {metric.key for metric in REPORTED_METRICS}
    assert {"perplexity", "accuracy", "spearman", "top1_agreement", "kl"} <= reported
    for metric in (kind() for task in ("text-generation", "image-classification") for kind in metrics_for(task)):
        found = metric.compute(predictions=logits(2, 5), references=torch.tensor([0, 1]))
        # Perplexity comes with its logarithm and the number of tokens.
        assert found.keys() - {"nll", "tokens"} <= reported


@pytest.mark.parametrize("kind", ALL)
def test_they_are_metrics_of_evaluate(kind, tmp_path):
    metric = kind(cache_dir=str(tmp_path / "cache"))
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    assert set(metric.features) == {"predictions", "references"}
    assert not (tmp_path / "cache").exists()


def test_perplexity_is_exp_of_the_mean_nll_of_scored_tokens():
    predictions, references = logits(3, 5, 7), torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    references[0, 2] = -100
    expected = torch.nn.functional.cross_entropy(predictions.double().flatten(0, 1), references.flatten())
    found = Perplexity().compute(predictions=predictions, references=references)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert found["tokens"] == 14
    assert Perplexity().compute(nll=6.0, tokens=3) == {"perplexity": math.exp(2), "nll": 2.0, "tokens": 3}
    assert Perplexity().compute(nll=1e6, tokens=1)["perplexity"] == math.inf


@pytest.mark.parametrize("kind", ALL)
def test_batches_add_up_and_compute_resets(kind):
    if kind is Perplexity or kind is Accuracy:
        first, second = logits(12, 5), torch.arange(12) % 5
    elif kind is Spearman:
        first, second = logits(12), logits(12, seed=1)
    else:
        first, second = logits(12, 5), logits(12, 5, seed=1)
    metric = kind()
    for part in range(3):
        metric.add_batch(predictions=first[part * 4 : part * 4 + 4], references=second[part * 4 : part * 4 + 4])
    batched = metric.compute()
    whole = metric.compute(predictions=first, references=second)
    single = kind()
    for one, other in zip(first, second, strict=True):
        single.add(prediction=one, reference=other)
    for key, value in single.compute().items():
        assert batched[key] == pytest.approx(value, rel=1e-12)
        assert whole[key] == pytest.approx(value, rel=1e-12)


def test_chunks_of_rows_change_nothing(monkeypatch):
    first, second = logits(40, 11), logits(40, 11, seed=3)
    whole = KLDivergence().compute(predictions=first, references=second)["kl"]
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 35)
    assert KLDivergence().compute(predictions=first, references=second)["kl"] == pytest.approx(whole, rel=1e-12)


def test_kl_is_reference_to_candidate():
    reference, candidate = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(0.9), math.log(0.1)]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = KLDivergence().compute(predictions=candidate, references=reference)["kl"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert KLDivergence().compute(predictions=candidate, references=candidate)["kl"] == 0
    # A tiny difference, below the rounding of float32.
    moved = reference.double() + torch.tensor([[1e-6, 0.0]])
    assert KLDivergence().compute(predictions=moved, references=reference)["kl"] == pytest.approx(1.25e-13, rel=1e-2)


def test_top_one_agreement_counts_positions():
    first = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    second = torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])
    assert TopOneAgreement().compute(predictions=first, references=second)["top1_agreement"] == 0.5
    assert TopOneAgreement().compute(predictions=first, references=torch.tensor([[1, 0]]))["top1_agreement"] == 1.0


def test_accuracy_of_labels_and_of_logits():
    assert Accuracy().compute(predictions=[1, 2, 0], references=[1, 1, -100])["accuracy"] == 0.5
    assert Accuracy().compute(predictions=torch.eye(3), references=[0, 1, 0])["accuracy"] == pytest.approx(2 / 3)


def test_spearman_shares_the_ranks_of_ties():
    assert average_ranks(torch.tensor([30.0, 10.0, 20.0, 20.0])).tolist() == [4.0, 1.0, 2.5, 2.5]
    # By hand: ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4), Pearson 4.5 / sqrt(4.5 * 5).
    found = Spearman().compute(predictions=[1, 2, 2, 3], references=[1, 3, 2, 4])["spearman"]
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5), rel=1e-12)
    assert spearman(torch.arange(9), torch.arange(9) ** 3) == pytest.approx(1.0, abs=1e-12)
    assert spearman(torch.arange(9), -torch.arange(9)) == pytest.approx(-1.0, abs=1e-12)
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))


def test_spearman_agrees_with_scipy_on_many_ties():
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randint(6, (200,), generator=generator) for _ in range(2))
    assert spearman(first, second) == pytest.approx(scipy.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_added_is_an_error_not_a_number(kind):
    with pytest.raises(ValueError):
        kind().compute()


@pytest.mark.parametrize("kind", [Accuracy, KLDivergence, TopOneAgreement, Spearman])
def test_shapes_must_agree(kind):
    with pytest.raises(ValueError, match="differ in shape"):
        kind().compute(
            predictions=logits(3, 4), references=torch.zeros(2, dtype=torch.long) if kind is Accuracy else logits(2, 4)
        )

"""Metrics that keep sums instead of predictions, with the interface of ``evaluate.Metric``.

Use them like any metric of evaluate: ``add_batch(predictions=..., references=...)`` once per batch, then ``compute()``;
or ``compute(predictions=..., references=...)`` at once. Predictions may be logits. Nothing is downloaded, and nothing
is written to a cache file: only float64 sums are kept.

To add a metric, write a subclass of ``StreamingMetric`` that names its ``tasks``, and add a row to
``reported.REPORTED_METRICS`` for each number that it computes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import datasets
import evaluate
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labelled_batches import IGNORE_INDEX

# Logits converted to float64 at a time, so that a long batch over a large vocabulary needs no float64 copy of itself.
CHUNK_ELEMENTS = 2**24

_METRICS_OF_TASK: dict[str, list[type[StreamingMetric]]] = {}


def metrics_for(task: str) -> list[type[StreamingMetric]]:
    """Return the metrics computed for a pipeline tag of the Hub, in the order of this module; empty for other tasks."""
    return list(_METRICS_OF_TASK.get(task, ()))


class StreamingMetric(evaluate.Metric):
    """Base of a metric that adds each batch to sums. Subclasses implement ``_update``, ``_result`` and ``_reset``.

    Attributes:
        tasks: pipeline tags of the models that ``evaluate.evaluate`` computes it for.
    """

    tasks: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for task in vars(cls).get("tasks", ()):
            _METRICS_OF_TASK.setdefault(task, []).append(cls)

    def _build_data_dir(self) -> str:
        # evaluate would create a cache folder here; there is nothing to cache.
        return str(self._data_dir_root)

    def __init__(self, **options: Any) -> None:
        evaluate.Metric.__init__(self, **options)
        self._reset()

    # evaluate copies the next three methods onto each instance without their closure: no super() in them.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **more: Any) -> None:
        """Add one batch."""
        self._update(predictions, references, **more)

    def add(self, *, prediction: Any = None, reference: Any = None, **more: Any) -> None:
        """Add one example."""
        self._update(_batch_of_one(prediction), _batch_of_one(reference), **more)

    def compute(self, *, predictions: Any = None, references: Any = None, **more: Any) -> dict[str, Any]:
        """Return the metric over everything added (including the arguments), and reset it.

        Raises ``ValueError`` if nothing was added.
        """
        if predictions is not None or references is not None or more:
            self._update(predictions, references, **more)
        try:
            return self._result()
        finally:
            self._reset()

    def _reset(self) -> None:
        raise NotImplementedError

    def _update(self, predictions: Any, references: Any) -> None:
        raise NotImplementedError

    def _result(self) -> dict[str, Any]:
        raise NotImplementedError

    def _compute(self, **inputs: Any) -> dict[str, Any]:
        self._update(**inputs)
        return self._result()


def _batch_of_one(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value)[None]


def _info(description: str, citation: str, predictions: str, references: str, inputs: str) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": _feature(predictions), "references": _feature(references)})
    return evaluate.MetricInfo(description=description, citation=citation, inputs_description=inputs, features=features)


def _feature(kind: str) -> Any:
    return datasets.Sequence(datasets.Value("float32")) if kind == "logits" else datasets.Value(kind)


def _to_float64(logits: Tensor) -> Tensor:
    # A small KL is a difference of nearly equal numbers. Apple's MPS has no float64.
    return logits.float() if logits.device.type == "mps" else logits.double()


def _chunks(*tensors: Tensor) -> Any:
    """Yield tensors ``[..., V]`` as chunks ``[n, V]`` in float64, with a bounded number of elements each."""
    width = tensors[0].shape[-1]
    flat = [t.reshape(-1, width) for t in tensors]
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, len(flat[0]), step):
        yield tuple(_to_float64(t[start : start + step]) for t in flat)


def token_nll(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the summed negative log-likelihood in nats, and the number of labels in the sum.

    Args:
        logits: ``[..., V]``, already aligned with the labels (they are not shifted here).
        labels: ``[...]``; -100 is ignored.
    """
    labels = labels.reshape(-1).to(logits.device)
    total, start = 0.0, 0
    for (chunk,) in _chunks(logits):
        part = labels[start : start + len(chunk)]
        total += F.cross_entropy(chunk, part, ignore_index=IGNORE_INDEX, reduction="sum").item()
        start += len(chunk)
    return total, int((labels != IGNORE_INDEX).sum())


def kl_divergence(reference: Tensor, candidate: Tensor) -> float:
    """Return KL(reference || candidate) in nats, summed over positions; both are logits ``[..., V]``."""
    total = 0.0
    for ref, cand in _chunks(reference, candidate.to(reference.device)):
        total += F.kl_div(cand.log_softmax(-1), ref.log_softmax(-1), log_target=True, reduction="sum").item()
    return total


def average_ranks(values: Tensor) -> Tensor:
    """Return ranks starting at 1, float64 ``[n]``; ties get the mean of their ranks."""
    values = values.double()
    _, group, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors ``[n]``: Pearson's of their ranks. NaN if one is constant."""
    x, y = average_ranks(first), average_ranks(second)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else math.nan


class Perplexity(StreamingMetric):
    """Perplexity: exp of the mean negative log-likelihood per token."""

    tasks = ("text-generation", "image-text-to-text", "text2text-generation", "fill-mask")

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Perplexity of a language model: exp of the mean negative log-likelihood (nats) of the scored tokens.",
            "@article{jelinek1977perplexity, title={Perplexity--a measure of the difficulty of speech recognition "
            "tasks}, author={Jelinek, F. and Mercer, R. L. and Bahl, L. R. and Baker, J. K.}, year={1977}, "
            "journal={The Journal of the Acoustical Society of America}}",
            "logits",
            "int64",
            "predictions: logits [..., vocabulary]; references: the token ids they predict [...], -100 is ignored. "
            "Or nll=<summed nats> and tokens=<count>.",
        )

    def _reset(self) -> None:
        self.nll, self.tokens = 0.0, 0

    def _update(
        self, predictions: Any = None, references: Any = None, *, nll: float | None = None, tokens: int | None = None
    ) -> None:
        if nll is None or tokens is None:
            if predictions is None or references is None:
                raise ValueError("perplexity needs predictions and references, or nll and tokens")
            nll, tokens = token_nll(torch.as_tensor(predictions), torch.as_tensor(references))
        self.nll += nll
        self.tokens += tokens

    def _result(self) -> dict[str, Any]:
        if self.tokens == 0:
            raise ValueError("perplexity of no tokens: add a batch first")
        mean = self.nll / self.tokens
        # math.exp overflows above 709 nats.
        return {"perplexity": math.exp(mean) if mean < 709 else math.inf, "nll": mean, "tokens": self.tokens}


class _Mean(StreamingMetric):
    """A mean over positions, returned under ``key``."""

    key = ""

    def _reset(self) -> None:
        self.total, self.count = 0.0, 0

    def _result(self) -> dict[str, Any]:
        if self.count == 0:
            raise ValueError(f"{self.key} of nothing: add a batch first")
        return {self.key: self.total / self.count}


class Accuracy(_Mean):
    """Fraction of correct labels."""

    key = "accuracy"
    tasks = ("fill-mask", "text-classification", "image-classification")

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Fraction of the predictions that equal their reference.",
            "",
            "int64",
            "int64",
            "predictions: labels [n] or logits [n, classes]; references: labels [n], -100 is ignored.",
        )

    def _update(self, predictions: Any, references: Any) -> None:
        references = torch.as_tensor(references)
        predictions = _argmax(torch.as_tensor(predictions)).to(references.device)
        _check_same_shape(predictions, references)
        counted = references != IGNORE_INDEX
        self.total += float(((predictions == references) & counted).sum())
        self.count += int(counted.sum())


class TopOneAgreement(_Mean):
    """Fraction of positions where two models have the same most likely token (or class)."""

    key = "top1_agreement"

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Fraction of positions where candidate and reference have the same most likely class.",
            "",
            "logits",
            "logits",
            "predictions, references: logits [..., classes] of the candidate and of the reference model, or class ids.",
        )

    def _update(self, predictions: Any, references: Any) -> None:
        predictions, references = (_argmax(torch.as_tensor(t)) for t in (predictions, references))
        _check_same_shape(predictions, references)
        self.total += float((predictions == references.to(predictions.device)).sum())
        self.count += predictions.numel()


class KLDivergence(_Mean):
    """Mean KL(reference || candidate), nats per position."""

    key = "kl"

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Mean Kullback-Leibler divergence from the reference model's distribution to the candidate's, nats per "
            "position: sum p_ref (log p_ref - log p_cand).",
            "@article{kullback1951information, title={On information and sufficiency}, author={Kullback, S. and "
            "Leibler, R. A.}, journal={The Annals of Mathematical Statistics}, year={1951}}",
            "logits",
            "logits",
            "predictions, references: logits [..., classes] of the candidate and of the reference model.",
        )

    def _update(self, predictions: Any, references: Any) -> None:
        predictions, references = torch.as_tensor(predictions), torch.as_tensor(references)
        _check_same_shape(predictions, references)
        self.total += kl_divergence(references, predictions)
        self.count += predictions.shape[:-1].numel()


class Spearman(StreamingMetric):
    """Spearman's rank correlation; ties get the mean of their ranks."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Spearman's rank correlation between predicted and true scores, with ties.",
            "@article{spearman1904proof, title={The proof and measurement of association between two things}, "
            "author={Spearman, C.}, journal={The American Journal of Psychology}, year={1904}}",
            "float64",
            "float64",
            "predictions, references: scores [n].",
        )

    def _reset(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def _update(self, predictions: Any, references: Any) -> None:
        first, second = (torch.as_tensor(t).detach().double().cpu().reshape(-1) for t in (predictions, references))
        _check_same_shape(first, second)
        self.pairs.append((first, second))

    def _result(self) -> dict[str, Any]:
        if sum(len(first) for first, _ in self.pairs) < 2:
            raise ValueError("a rank correlation needs at least two pairs")
        first, second = (torch.cat(side) for side in zip(*self.pairs, strict=True))
        return {"spearman": spearman(first, second)}


def _argmax(tensor: Tensor) -> Tensor:
    return tensor.argmax(-1) if tensor.is_floating_point() else tensor


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"predictions {list(first.shape)} and references {list(second.shape)} differ in shape")

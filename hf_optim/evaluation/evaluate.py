"""Evaluate a model: quality on data, agreement with another model, and time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import labelled_batches
from ..data.datasets import load_examples, load_texts, string_columns
from ..data.labelled_batches import IGNORE_INDEX, LabelledBatches
from ..data.processor_errors import data_errors
from ..data.tasks import task_of_model
from ..errors import DataError
from ..recipes.config import DataConfig
from ..runs.progress import progress, stage
from ..toolkit.experts import dropped_share, expert_load, routing_of
from ..toolkit.modules.modes import device_of, eval_mode
from .latency import measure_time
from .metrics import KLDivergence, Perplexity, Spearman, StreamingMetric, TopOneAgreement, metrics_for


def evaluate(model: Any, tokenizer: Any, data: DataConfig, *, speed: bool = True) -> dict[str, Any]:
    """Evaluate a model on data, with the metrics of its task.

    Language models give ``perplexity``, ``nll`` (nats per token), ``tokens`` and ``bits_per_byte``;
    masked ones also ``accuracy`` over the masked tokens; text and image classifiers ``accuracy``; any encoder on pairs
    with a ``score`` column gives ``spearman`` (of cosines of mean-pooled vectors or those of a
    pooling head, or of a one-label head). A mixture of
    experts with a capacity also gives ``dropped_share``: the pairs of token and expert that it did not compute.

    Args:
        model: on the device where it is to be evaluated.
        tokenizer: its tokenizer, or image processor.
        data: which data, and how much of it; ``samples=None`` takes all.
        speed: also time it: greedy generation if it generates text (``ms_per_token``), else a forward pass
            (``ms_per_example``), each with its spread (``..._iqr``).

    Raises ``DataError`` if the data does not fit the model.
    """
    task = task_of_model(model).tag
    with data_errors(data.dataset):
        scored_pairs = _load_scored_pairs(model, data)
    if scored_pairs is not None:
        similarity = _compute_similarity(model, tokenizer, scored_pairs)
        return {"task": "sentence-similarity", **similarity, **(measure_time(model) if speed else {})}
    if not metrics_for(task):
        raise DataError(
            f"no metric for {type(model).__name__} on {data.dataset}: load the model with the head of its task "
            "(language model, classifier), or use sentence pairs with a column `score`"
        )
    with data_errors(data.dataset), stage("reading data"):
        batches = _build_batches(task, model, tokenizer, data)
    measured = _compute_metrics(model, batches, metrics_for(task))
    return {"task": task, **measured, **(measure_time(model) if speed else {})}


def compare(model: Any, reference: Any, tokenizer: Any, data: DataConfig) -> dict[str, Any]:
    """Compare the predictions of two models on the same data.

    Returns ``top1_agreement`` (a fraction) and ``kl`` (nats per position, reference || model), or nothing for models
    without a vocabulary or classes. Raises ``DataError`` if their vocabularies or classes differ in number.
    """
    task = task_of_model(model).tag
    if not metrics_for(task) or _load_scored_pairs(model, data) is not None:
        return {}
    return _compute_agreement(model, reference, _build_batches(task, model, tokenizer, data))


def evaluate_lm(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    reference: Any = None,
    seq_len: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the perplexity of a causal language model on texts, and its agreement with a reference model.

    Each text is preceded by bos; all are joined and split into sequences of ``seq_len`` tokens (default: the model's
    context). Tokens 2..n of each sequence are scored; an incomplete sequence at the end is dropped.

    Returns ``perplexity``, ``nll`` (nats per token), ``tokens`` (scored), ``bits_per_byte`` (of the UTF-8 text), and
    with a ``reference`` also ``top1_agreement`` and ``kl``.
    """
    data = DataConfig(samples=samples, seq_len=seq_len, seed=seed)
    batches = labelled_batches.causal_lm_batches(texts, model, tokenizer, data)
    measured = _compute_metrics(model, batches, [Perplexity])
    return measured if reference is None else {**measured, **_compute_agreement(model, reference, batches)}


def perplexity(model: Any, ids: Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Compute ``perplexity``, ``nll`` and ``tokens`` over token ids ``[n, seq_len]``; tokens 2..n are scored."""
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)
    parts = zip(ids.split(batch_size), labels.split(batch_size), strict=True)
    batches = LabelledBatches([({"input_ids": inputs}, target) for inputs, target in parts])
    return _compute_metrics(model, batches, [Perplexity])


def _build_batches(task: str, model: Any, tokenizer: Any, data: DataConfig) -> LabelledBatches:
    if task in ("text-generation", "image-text-to-text"):
        return labelled_batches.causal_lm_batches(load_texts(data), model, tokenizer, data)
    if task == "fill-mask":
        return labelled_batches.masked_lm_batches(load_texts(data), model, tokenizer, data)
    examples = labelled_batches.sample_examples(data)
    if task == "text2text-generation":
        return labelled_batches.seq2seq_batches(examples, model, tokenizer)
    if task == "image-classification":
        return labelled_batches.image_classification_batches(examples, model, tokenizer, data)
    return labelled_batches.text_classification_batches(examples, model, tokenizer, data)


def _compute_metrics(model: Any, batches: LabelledBatches, classes: Sequence[type[StreamingMetric]]) -> dict[str, Any]:
    metrics = [cls() for cls in classes]
    capped = routing_of(model) is not None
    if capped:
        expert_load(model, reset=True)
    with eval_mode(model), progress(batches.batches, "evaluating", unit="batches") as shown:
        for inputs, labels in shown:
            logits, target = _scored_positions(model, inputs, labels)
            for metric in metrics:
                metric.add_batch(predictions=logits, references=target)
    measured: dict[str, Any] = {}
    for metric in metrics:
        measured |= metric.compute()
    if capped:
        measured["dropped_share"] = dropped_share(expert_load(model).values())
    if batches.tokens_per_byte is not None:
        measured["bits_per_byte"] = measured["nll"] / math.log(2) * batches.tokens_per_byte
    return measured


def _compute_agreement(model: Any, reference: Any, batches: LabelledBatches) -> dict[str, Any]:
    metrics = (TopOneAgreement(), KLDivergence())
    with ExitStack() as stack:
        for each in (model, reference):
            stack.enter_context(eval_mode(each))
        for inputs, labels in stack.enter_context(progress(batches.batches, "comparing", unit="batches")):
            logits, _ = _scored_positions(model, inputs, labels)
            expected, _ = _scored_positions(reference, inputs, labels)
            if logits.shape != expected.shape:
                raise DataError(
                    f"the models have {logits.shape[-1]} and {expected.shape[-1]} classes: they cannot be compared"
                )
            for metric in metrics:
                metric.add_batch(predictions=logits, references=expected.to(logits.device))
    return {**metrics[0].compute(), **metrics[1].compute()}


def _scored_positions(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits ``[n, V]`` of the positions with a label, and their labels ``[n]``."""
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    logits = model(**inputs).logits
    keep = (labels != IGNORE_INDEX).to(logits.device)
    return logits[keep], labels.to(logits.device)[keep]


# -- sentence pairs with a score --------------------------------------------------------------------------------------


def _load_scored_pairs(model: Any, data: DataConfig) -> list[dict[str, Any]] | None:
    """Return the examples if they are sentence pairs with a ``score`` and the model can be used as an encoder."""
    if task_of_model(model).tag in ("text-generation", "image-classification") or data.dataset is None:
        return None
    first = next(iter(load_examples(data, limit=1)), {})
    if "score" not in first or len(string_columns(first)) < 2 or not _is_encoder(model):
        return None
    return labelled_batches.sample_examples(data)


def _is_encoder(model: Any) -> bool:
    return task_of_model(model).tag == "feature-extraction" or getattr(model.config, "num_labels", 0) == 1


def _compute_similarity(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
    if tokenizer is None:
        raise labelled_batches.no_tokenizer("sentence pairs need")
    named = ["sentence1", "sentence2"]
    columns = named if set(named) <= set(examples[0]) else string_columns(examples[0])[:2]
    metric = Spearman()
    with eval_mode(model), progress(range(0, len(examples), 32), "evaluating", unit="batches") as shown:
        for start in shown:
            part = examples[start : start + 32]
            scores = torch.tensor([_to_float(example["score"]) for example in part], dtype=torch.float64)
            metric.add_batch(predictions=_predict_scores(model, tokenizer, part, columns), references=scores)
    return {**metric.compute(), "pairs": len(examples)}


def _predict_scores(model: Any, tokenizer: Any, examples: list[dict[str, Any]], columns: list[str]) -> Tensor:
    device = device_of(model)
    if getattr(model.config, "num_labels", 0) == 1 and task_of_model(model).tag == "text-classification":
        inputs = labelled_batches.tokenize(examples, columns, model, tokenizer)
        return model(**{k: v.to(device) for k, v in inputs.items()}).logits.squeeze(-1)
    first, second = (
        sentence_vectors(model, labelled_batches.tokenize(examples, [column], model, tokenizer)) for column in columns
    )
    return F.cosine_similarity(first, second, dim=-1)


def sentence_vectors(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the vectors of sentences, float32 ``[n, width]``: the model's own if it pools, else ``mean_pool``.

    A model with a pooling head has ``sentence_vectors: "pooler_output"`` in its configuration.
    """
    if getattr(model.config, "sentence_vectors", None) != "pooler_output":
        return mean_pool(model, inputs)
    inputs = {key: value.to(device_of(model)) for key, value in inputs.items()}
    return model(**inputs).pooler_output.float()


def mean_pool(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return sentence vectors ``[n, hidden]``: the mean of the last hidden states over the tokens, without padding."""
    inputs = {key: value.to(device_of(model)) for key, value in inputs.items()}
    states = model(**inputs).last_hidden_state.float()
    weight = inputs["attention_mask"][..., None].to(states)
    return (states * weight).sum(1) / weight.sum(1)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"score {value!r} is not a number") from error

"""Measuring a model: quality on data, agreement with another model, bytes, and milliseconds per token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..data import datasets, labelled_batches
from ..data.datasets import load_texts, string_columns
from ..data.labelled_batches import IGNORE_INDEX, LabelledBatches
from ..data.tasks import task_of_model
from ..errors import DataError, OptimError
from ..recipes.config import DataConfig
from ..runs.memory import PeakMemory
from ..toolkit.modules.modes import device_of, eval_mode
from .latency import milliseconds_per_token
from .metrics import Accuracy, KLDivergence, Perplexity, Spearman, StreamingMetric, TopOneAgreement
from .sizes import bytes_on_disk, parameter_bytes

__all__ = [
    "bytes_on_disk",
    "compare",
    "device_of",
    "evaluate",
    "evaluate_lm",
    "lm_eval_tasks",
    "mean_pooled",
    "milliseconds_per_token",
    "parameter_bytes",
    "peak_memory",
    "perplexity",
]

METRICS: dict[str, tuple[type[StreamingMetric], ...]] = {
    "text-generation": (Perplexity,),
    "image-text-to-text": (Perplexity,),
    "text2text-generation": (Perplexity,),
    "fill-mask": (Perplexity, Accuracy),
    "text-classification": (Accuracy,),
    "image-classification": (Accuracy,),
}


def evaluate(model: Any, tokenizer: Any, data: DataConfig, *, speed: bool = True) -> dict[str, Any]:
    """Measure a model on data, by what the model is for and what columns the data has.

    Language models give ``perplexity``, ``nll`` (nats per token), ``tokens``, ``bits_per_byte`` and ``ms_per_token``;
    masked ones also ``accuracy`` over the masked tokens; text and image classifiers ``accuracy``; any encoder on pairs
    with a ``score`` column gives ``spearman`` (of cosines of mean-pooled vectors, or of a one-label head).

    Args:
        model: on the device where it is to be measured.
        tokenizer: its tokenizer, or image processor.
        data: where the data is and how much of it to take; ``samples=None`` takes all.
        speed: also time greedy generation, where the model generates.

    Raises ``DataError`` when model and data do not go together.
    """
    task = task_of_model(model).tag
    scores = _score_rows(model, data)
    if scores is not None:
        return {"task": "sentence-similarity", **_similarity(model, tokenizer, scores)}
    if task not in METRICS:
        raise DataError(
            f"there is no measure for {type(model).__name__} on {data.dataset}: load it with its task's head "
            "(language model, classifier), or give sentence pairs with a column `score`"
        )
    batches = _examples(task, model, tokenizer, data)
    figures = _figures(model, batches, METRICS[task])
    if speed and task == "text-generation":
        figures["ms_per_token"] = milliseconds_per_token(model)
    return {"task": task, **figures}


def compare(model: Any, reference: Any, tokenizer: Any, data: DataConfig) -> dict[str, Any]:
    """``top1_agreement`` (share) and ``kl`` (nats per position, reference || model) of two models on the same data.

    Empty for models without a vocabulary or classes to compare over. Raises ``DataError`` when theirs differ.
    """
    task = task_of_model(model).tag
    if task not in METRICS or _score_rows(model, data) is not None:
        return {}
    return _agreement(model, reference, _examples(task, model, tokenizer, data))


def evaluate_lm(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    reference: Any = None,
    seq_len: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity of a causal language model on texts, and its agreement with a reference model.

    Every text is preceded by bos, all are joined and cut into windows of ``seq_len`` tokens (the model's context);
    tokens 2..n of each window are scored, and what does not fill a window at the end is left out.

    Returns ``perplexity``, ``nll`` (nats per token), ``tokens`` (scored), ``bits_per_byte`` (of the UTF-8 text), and
    with a ``reference`` also ``top1_agreement`` and ``kl``.
    """
    batches = labelled_batches.causal_lm_batches(
        texts, model, tokenizer, DataConfig(samples=samples, seq_len=seq_len, seed=seed)
    )
    figures = _figures(model, batches, (Perplexity,))
    return figures if reference is None else {**figures, **_agreement(model, reference, batches)}


def perplexity(model: Any, windows: Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Perplexity over windows of tokens ``[n, seq_len]``, tokens 2..n of each scored: ``perplexity, nll, tokens``."""
    labels = torch.cat([windows[:, 1:], torch.full_like(windows[:, :1], IGNORE_INDEX)], dim=1)
    parts = zip(windows.split(batch_size), labels.split(batch_size), strict=True)
    return _figures(model, LabelledBatches([({"input_ids": ids}, target) for ids, target in parts]), (Perplexity,))


def _examples(task: str, model: Any, tokenizer: Any, data: DataConfig) -> LabelledBatches:
    if task in ("text-generation", "image-text-to-text"):
        return labelled_batches.causal_lm_batches(load_texts(data), model, tokenizer, data)
    if task == "fill-mask":
        return labelled_batches.masked_lm_batches(load_texts(data), model, tokenizer, data)
    rows = labelled_batches.sample_examples(data)
    if task == "text2text-generation":
        return labelled_batches.seq2seq_batches(rows, model, tokenizer)
    if task == "image-classification":
        return labelled_batches.image_classification_batches(rows, model, tokenizer)
    return labelled_batches.text_classification_batches(rows, model, tokenizer, data)


def _figures(model: Any, batches: LabelledBatches, kinds: tuple[type[StreamingMetric], ...]) -> dict[str, Any]:
    metrics = [kind() for kind in kinds]
    with eval_mode(model):
        for inputs, labels in _progress(batches, "measuring"):
            logits, target = _scored(model, inputs, labels)
            for metric in metrics:
                metric.add_batch(predictions=logits, references=target)
    found: dict[str, Any] = {}
    for metric in metrics:
        found |= metric.compute()
    if batches.tokens_per_byte is not None:
        found["bits_per_byte"] = found["nll"] / torch.tensor(2.0).double().log().item() * batches.tokens_per_byte
    return found


def _agreement(model: Any, reference: Any, batches: LabelledBatches) -> dict[str, Any]:
    metrics = (TopOneAgreement(), KLDivergence())
    with ExitStack() as stack:
        for each in (model, reference):
            stack.enter_context(eval_mode(each))
        for inputs, labels in _progress(batches, "comparing"):
            ours, _ = _scored(model, inputs, labels)
            theirs, _ = _scored(reference, inputs, labels)
            if ours.shape != theirs.shape:
                raise DataError(
                    f"the models have {ours.shape[-1]} and {theirs.shape[-1]} classes: they cannot be compared"
                )
            for metric in metrics:
                metric.add_batch(predictions=ours, references=theirs.to(ours.device))
    return {**metrics[0].compute(), **metrics[1].compute()}


def _scored(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[n, V]`` of the positions that count, and their labels ``[n]``."""
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    logits = model(**inputs).logits
    keep = (labels != IGNORE_INDEX).to(logits.device)
    return logits[keep], labels.to(logits.device)[keep]


def _progress(batches: LabelledBatches, what: str) -> Iterator[labelled_batches.LabelledBatch]:
    # disable=None: no bar where nobody watches.
    yield from tqdm(batches.batches, desc=what, unit="batch", disable=None, leave=False)


# -- sentence pairs with a score --------------------------------------------------------------------------------------


def _score_rows(model: Any, data: DataConfig) -> list[dict[str, Any]] | None:
    """The rows, when the data has sentence pairs with a ``score`` and the model can be read as an encoder."""
    if task_of_model(model).tag in ("text-generation", "image-classification") or data.dataset is None:
        return None
    first = next(iter(datasets.load_examples(data, limit=1)), {})
    if "score" not in first or len(string_columns(first)) < 2 or not _encodes(model):
        return None
    return labelled_batches.sample_examples(data)


def _encodes(model: Any) -> bool:
    return task_of_model(model).tag == "feature-extraction" or getattr(model.config, "num_labels", 0) == 1


def _similarity(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if tokenizer is None:
        raise DataError("sentence pairs need the model's tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    pair = ["sentence1", "sentence2"] if {"sentence1", "sentence2"} <= set(rows[0]) else string_columns(rows[0])[:2]
    metric = Spearman()
    with eval_mode(model):
        for start in tqdm(range(0, len(rows), 32), desc="measuring", unit="batch", disable=None, leave=False):
            part = rows[start : start + 32]
            scores = torch.tensor([_number(row["score"]) for row in part], dtype=torch.float64)
            metric.add_batch(predictions=_pair_scores(model, tokenizer, part, pair), references=scores)
    return {**metric.compute(), "pairs": len(rows)}


def _pair_scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]], pair: list[str]) -> Tensor:
    device = device_of(model)
    if getattr(model.config, "num_labels", 0) == 1 and task_of_model(model).tag == "text-classification":
        inputs = labelled_batches.tokenize(rows, pair, model, tokenizer)
        return model(**{k: v.to(device) for k, v in inputs.items()}).logits.squeeze(-1)
    first, second = (mean_pooled(model, labelled_batches.tokenize(rows, [column], model, tokenizer)) for column in pair)
    return F.cosine_similarity(first, second, dim=-1)


def mean_pooled(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Sentence vectors ``[n, hidden]``: the mean of the last hidden states over the tokens that are no padding."""
    inputs = {key: value.to(device_of(model)) for key, value in inputs.items()}
    states = model(**inputs).last_hidden_state.float()
    weight = inputs["attention_mask"][..., None].to(states)
    return (states * weight).sum(1) / weight.sum(1)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"score {value!r} is no number") from error


# -- memory and speed --------------------------------------------------------------------------------------------------


def peak_memory(device: torch.device | None = None) -> PeakMemory:
    """``with peak_memory(device) as peak: ...``, then ``peak.bytes`` and ``peak.metrics()`` (see ``memory``)."""
    return PeakMemory(device)


def lm_eval_tasks(
    model: Any, tokenizer: Any, tasks: Iterable[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """Results of tasks of EleutherAI's lm-eval on the model in memory: ``{task: {metric: value}}``.

    Raises ``OptimError`` when the optional package is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise OptimError("tasks of lm-eval need the package: pip install 'hf-optim[lm-eval]'") from error
    with eval_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    return {task: dict(figures) for task, figures in results["results"].items()}

"""Time decoding and prefill of a model with random weights, under one scheme after another."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ...compressed.packed.layer_report import report
from ...runs.progress import stage
from . import decode, models, prefill
from .environment import Deadline, short_error, timing_tools
from .results import DecodeResult, PrefillResult, Results

log = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class ModelBenchSettings:
    """What is timed of each model.

    Attributes:
        modes: caches to decode with, of ``decode.MODES``.
        batches: batch sizes.
        new_tokens: tokens decoded by each ``generate``.
        prompts: lengths in tokens of the prompts whose prefill is timed.
        profiled: also measure how long the device computes in each decoding step.
    """

    modes: Sequence[str] = decode.MODES
    batches: Sequence[int] = (1,)
    new_tokens: int = decode.NEW_TOKENS
    prompts: Sequence[int] = ()
    profiled: bool = False


def run_models(
    results: Results,
    model: str,
    schemes: Sequence[str] = models.SCHEMES,
    settings: ModelBenchSettings | None = None,
    dtype: torch.dtype = torch.bfloat16,
    deadline: Deadline | None = None,
    keep: Callable[[], object] = lambda: None,
) -> None:
    """Append the rows of each scheme to ``results``; a failed measurement gives a row with the reason.

    ``keep`` is called after each scheme.
    """
    deadline = deadline or Deadline.after(None)
    for scheme in schemes:
        if deadline.has_passed():
            results.left_out.append(f"{model} under {scheme}")
            continue
        with _clean_device():
            _run_scheme(results, model, scheme, settings or ModelBenchSettings(), dtype, deadline)
        keep()


def _run_scheme(
    results: Results, model: str, scheme: str, settings: ModelBenchSettings, dtype: torch.dtype, deadline: Deadline
) -> None:
    try:
        with stage(f"building {model} under {scheme}"):
            built = models.build(model, scheme, dtype, timing_tools().device())
    except Exception as error:
        log.debug("building failed", exc_info=True)
        for row, _ in _measurements(model, scheme, settings):
            _append(results, replace(row, failure=short_error(error)))
        return
    weights = _weight_metrics(built, results.ceilings["copy"])
    for row, measure in _measurements(model, scheme, settings):
        if deadline.has_passed():
            results.left_out.append(row.name)
            continue
        if isinstance(row, DecodeResult):
            row = replace(row, **weights)
        try:
            _append(results, replace(row, **measure(built)))
        except Exception as error:
            log.debug("%s failed", row.name, exc_info=True)
            _append(results, replace(row, failure=short_error(error)))


def _measurements(
    model: str, scheme: str, settings: ModelBenchSettings
) -> Iterator[tuple[DecodeResult | PrefillResult, Measure]]:
    """Yield an empty row, and the function that measures it, for each combination of the settings."""
    for batch in settings.batches:
        for tokens in settings.prompts:
            yield PrefillResult(model, scheme, batch, tokens), partial(prefill.measure, batch=batch, tokens=tokens)
        for mode in settings.modes:
            options: dict[str, Any] = {
                "mode": mode,
                "batch": batch,
                "new_tokens": settings.new_tokens,
                "profiled": settings.profiled,
            }
            yield DecodeResult(model, scheme, mode, batch), partial(decode.measure, **options)


def _append(results: Results, row: DecodeResult | PrefillResult) -> None:
    log.info("%s: %s", row.name, row.failure or f"{row.ms:.2f} ms")
    if isinstance(row, DecodeResult):
        results.decode.append(row)
    else:
        results.prefill.append(row)


def _weight_metrics(model: PreTrainedModel, copy: float) -> dict[str, Any]:
    labels = Counter(row.kernel or "dense" for row in report(model))
    return {
        "weights_gb": models.tensor_bytes(model) / 1e9,
        "floor_ms": models.bytes_read_per_step(model) / copy / 1e3,
        "kernels": dict(labels),
    }


@contextmanager
def _clean_device() -> Iterator[None]:
    """Free what was allocated inside, compiled graphs included."""
    try:
        yield
    finally:
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

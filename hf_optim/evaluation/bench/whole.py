"""A whole model of random weights under one scheme after the other: decoding and prefill."""

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

from ...compressed.packed.accelerate import report
from . import decode, models, prefill
from .results import Decode, Prefill, Results
from .running import Deadline, benching, explain

log = logging.getLogger(__name__)

Figures = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """What is timed of each model.

    Attributes:
        modes: caches to decode with, of ``decode.MODES``.
        batches: sequences at a time.
        new_tokens: decoded in each ``generate``.
        prompts: tokens of the prompts whose prefill is timed.
        profiled: also tell how long the device computes in a step of decoding.
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
    asked: Asked | None = None,
    dtype: torch.dtype = torch.bfloat16,
    deadline: Deadline | None = None,
) -> None:
    """Append rows for each scheme to ``results``; what fails gives rows that say so."""
    deadline = deadline or Deadline.of(None)
    for scheme in schemes:
        if deadline.passed():
            results.left_out.append(f"{model} under {scheme}")
            continue
        with _clean_device():
            _run_scheme(results, model, scheme, asked or Asked(), dtype, deadline)


def _run_scheme(
    results: Results, model: str, scheme: str, asked: Asked, dtype: torch.dtype, deadline: Deadline
) -> None:
    try:
        built = models.build(model, scheme, dtype, benching().device())
    except Exception as error:
        log.debug("building failed", exc_info=True)
        for row, _ in _asked_of(model, scheme, asked):
            _keep(results, replace(row, failure=explain(error)))
        return
    about = _about(built, results.ceilings["copy"])
    for row, measure in _asked_of(model, scheme, asked):
        if deadline.passed():
            results.left_out.append(row.name)
            continue
        if isinstance(row, Decode):
            row = replace(row, **about)
        try:
            _keep(results, replace(row, **measure(built)))
        except Exception as error:
            log.debug("%s failed", row.name, exc_info=True)
            _keep(results, replace(row, failure=explain(error)))


def _asked_of(model: str, scheme: str, asked: Asked) -> Iterator[tuple[Decode | Prefill, Figures]]:
    """An empty row and how to fill it, for each thing asked."""
    for batch in asked.batches:
        for tokens in asked.prompts:
            yield Prefill(model, scheme, batch, tokens), partial(prefill.measure, batch=batch, tokens=tokens)
        for mode in asked.modes:
            options: dict[str, Any] = {
                "mode": mode,
                "batch": batch,
                "new_tokens": asked.new_tokens,
                "profiled": asked.profiled,
            }
            yield Decode(model, scheme, mode, batch), partial(decode.measure, **options)


def _keep(results: Results, row: Decode | Prefill) -> None:
    log.info("%s: %s", row.name, row.failure or f"{row.ms} ms")
    if isinstance(row, Decode):
        results.decode.append(row)
    else:
        results.prefill.append(row)


def _about(model: PreTrainedModel, copy: float) -> dict[str, Any]:
    labels = Counter(row.kernel or "dense" for row in report(model))
    return {
        "weights_gb": models.bytes_held(model) / 1e9,
        "floor_ms": models.bytes_read(model) / copy / 1e3,
        "kernels": dict(labels),
    }


@contextmanager
def _clean_device() -> Iterator[None]:
    """What was allocated inside is given back, compiled graphs too."""
    try:
        yield
    finally:
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

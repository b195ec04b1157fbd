"""Prefill end to end: milliseconds until the cache of a prompt is filled and the logits of its next token exist."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from .decode import synchronize

WARM_UPS, RUNS = 2, 7


@torch.inference_mode()
def measure(model: PreTrainedModel, batch: int, tokens: int) -> dict[str, Any]:
    """Measure one eager forward over prompts of random ids ``[batch, tokens]``: ``ms`` (a median) and ``peak_gb``.

    As in ``generate``, it fills a new cache, and the head computes logits for the last token only.
    """
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens), device=model.device)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UPS + RUNS):
        synchronize(model)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        synchronize(model)
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"ms": statistics.median(times[WARM_UPS:]), "peak_gb": peak}

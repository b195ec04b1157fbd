"""Prefill end to end: milliseconds until a prompt has its first token's logits and its cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from .decode import wait

WARM_UPS, RUNS = 2, 7


@torch.inference_mode()
def measure(model: PreTrainedModel, batch: int, tokens: int) -> dict[str, Any]:
    """``ms`` (a median) and ``peak_gb`` of one forward over prompts of random ids [batch, tokens], eager.

    As in ``generate``, a new cache is filled and the head computes the last token's logits alone.
    """
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens), device=model.device)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UPS + RUNS):
        wait(model)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        wait(model)
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"ms": statistics.median(times[WARM_UPS:]), "peak_gb": peak}

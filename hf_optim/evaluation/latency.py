"""Measure the latency of greedy generation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..toolkit.modules.modes import device_of, eval_mode

# Generation is repeated for a median, but no new run starts after this many seconds.
TIME_BUDGET_SECONDS = 60.0


def measure_ms_per_token(
    model: Any, vocabulary: Any = None, prompt: int = 32, new_tokens: int = 64, repeats: int = 3, seed: int = 0
) -> float:
    """Return the milliseconds per token of greedy ``generate``, batch 1: the median of ``repeats`` after a warm-up.

    The time to process the prompt is included; it is short compared with the generation.

    Args:
        model: a model that generates, on the device to be timed.
        vocabulary: its size, or a tokenizer; None uses the model's. The prompt is random tokens.
        prompt, new_tokens: lengths in tokens; halved together until they fit the model's context.
        repeats: number of timed runs; fewer for slow models, so that they take about a minute in all.
        seed: seed of the prompt.

    Raises ``ModelError`` for a model that cannot generate.
    """
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} does not generate, so it has no time per token")
    size = vocabulary if isinstance(vocabulary, int) else len(vocabulary) if vocabulary is not None else None
    size = size or model.config.get_text_config().vocab_size
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt + new_tokens
    while prompt + new_tokens > context and new_tokens > 1:
        prompt, new_tokens = max(1, prompt // 2), new_tokens // 2
    ids = torch.randint(size, (1, prompt), generator=torch.Generator().manual_seed(seed)).to(device_of(model))
    times: list[float] = []
    with eval_mode(model):
        _generate(model, ids, min(new_tokens, 8))
        begin = time.perf_counter()
        while len(times) < repeats and (not times or time.perf_counter() - begin < TIME_BUDGET_SECONDS):
            start = time.perf_counter()
            _generate(model, ids, new_tokens)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / new_tokens


def _generate(model: Any, ids: Tensor, new_tokens: int) -> None:
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    pad = (eos[0] if isinstance(eos, list) else eos) or 0
    # Exactly new_tokens tokens: an early eos would end the measurement.
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=eos
    )
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)

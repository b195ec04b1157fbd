"""Decoding end to end: milliseconds a token of stock ``generate``, greedy, eager and with a static cache."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from ...compressed.packed.accelerate import compile_config

# "unguarded": a static cache, compiled with ``hf_optim.compile_config()``.
MODES = ("dynamic", "static", "unguarded")
PROMPT = 32
NEW_TOKENS = 64
# Compilation happens in the first two, CUDA graphs are recorded in the next.
WARM_UPS = {"dynamic": 1, "static": 3, "unguarded": 3}
FIRST_STEADY = 4


class Clock(LogitsProcessor):
    """Notes when each step has its logits. It launches nothing and waits for nothing: the loop waits once a step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores

    def step_ms(self) -> float:
        """Median milliseconds between steps, the first ones left out."""
        times = self.times[min(FIRST_STEADY, len(self.times) - 2) :]
        return statistics.median((b - a) * 1e3 for a, b in pairwise(times))


def measure(model: PreTrainedModel, mode: str, batch: int, new_tokens: int, profiled: bool = False) -> dict[str, Any]:
    """``ms``, ``overall_ms``, ``warmup_s``, ``gpu_ms`` and ``peak_gb`` of one way to generate: the best of three."""
    torch.compiler.reset()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(WARM_UPS[mode]):
        generate(model, mode, batch, new_tokens)
    warmup = time.perf_counter() - start
    runs = [generate(model, mode, batch, new_tokens) for _ in range(3)]
    return {
        "ms": min(clock.step_ms() for clock, _ in runs),
        "overall_ms": min(whole for _, whole in runs) / new_tokens,
        "warmup_s": warmup,
        "gpu_ms": busy_ms(model, mode, batch, new_tokens) if profiled and cuda else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def generate(model: PreTrainedModel, mode: str, batch: int, new_tokens: int) -> tuple[Clock, float]:
    """One stock ``generate`` of random tokens; its clock, and the milliseconds of the whole call."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, PROMPT), device=model.device)
    clock = Clock()
    cache: dict[str, Any] = {} if mode == "dynamic" else {"cache_implementation": "static"}
    if mode == "unguarded":
        cache["compile_config"] = compile_config()
    wait(model)
    start = time.perf_counter()
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        logits_processor=[clock],
        **cache,
    )
    wait(model)
    return clock, (time.perf_counter() - start) * 1e3


def busy_ms(model: PreTrainedModel, mode: str, batch: int, new_tokens: int) -> float | None:
    """Milliseconds a token in which the device computes, over the last third of a profiled ``generate``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        clock, _ = generate(model, mode, batch, new_tokens)
    events = [e.time_range for e in profiler.events() or () if e.device_type.name == "CUDA"]
    if not events:
        return None
    spans = sorted((e.start, e.end) for e in events)
    first, last = spans[0][0], max(end for _, end in spans)
    begin = last - (last - first) / 3
    busy, reached = 0.0, begin
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (last - begin) * clock.step_ms()


def wait(model: PreTrainedModel) -> None:
    """Until the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()

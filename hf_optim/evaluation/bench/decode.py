"""Decoding end to end: milliseconds per token of greedy ``generate``: stock, eager or static cache, and captured."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from ...compressed.packed.accelerate import compile_config

# "unguarded": a static cache, compiled with ``hf_optim.compile_config()``; "graph": ``hf_optim.generate``.
MODES = ("dynamic", "static", "unguarded", "graph")
# transformers compiles nothing on a CPU, and there unguarded would be static.
CPU_MODES = ("dynamic", "static", "graph")
PROMPT = 32
NEW_TOKENS = 64
# The first two compile, the third records CUDA graphs.
WARM_UPS = {"dynamic": 1, "static": 3, "unguarded": 3, "graph": 1}
FIRST_STEADY = 4


class StepTimer(LogitsProcessor):
    """Records the time when each step has its logits. It launches nothing and does not wait for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores

    def step_ms(self) -> float:
        """Return the median milliseconds between steps, without the first ones."""
        times = self.times[min(FIRST_STEADY, len(self.times) - 2) :]
        return statistics.median((b - a) * 1e3 for a, b in pairwise(times))


def measure(model: PreTrainedModel, mode: str, batch: int, new_tokens: int, profiled: bool = False) -> dict[str, Any]:
    """Measure one way to generate, as the best of three calls.

    Returns the fields ``ms``, ``overall_ms``, ``warmup_s``, ``gpu_ms`` and ``peak_gb`` of ``DecodeResult``.
    """
    if mode == "graph":
        return measure_graph(model, batch, new_tokens)
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
        "ms": min(timer.step_ms() for timer, _ in runs),
        "overall_ms": min(total for _, total in runs) / new_tokens,
        "warmup_s": warmup,
        "gpu_ms": measure_busy_ms(model, mode, batch, new_tokens) if profiled and cuda else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def measure_graph(model: PreTrainedModel, batch: int, new_tokens: int) -> dict[str, Any]:
    """Measure ``hf_optim.generate``: as ``measure``, with ``first_ms``, the time of a call for one token.

    A captured step has no point in time at which the host sees it, so a step is what a long call takes more than a
    short one. Without CUDA it is transformers' loop, whose steps are timed as in ``measure``.
    """
    torch.compiler.reset()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    warmup, _ = _time_graph(model, batch, new_tokens)
    short = min(_time_graph(model, batch, 1)[0] for _ in range(3))
    runs = [_time_graph(model, batch, new_tokens) for _ in range(3)]
    whole = min(seconds for seconds, _ in runs)
    return {
        "ms": (whole - short) / (new_tokens - 1) * 1e3 if cuda else min(timer.step_ms() for _, timer in runs),
        "overall_ms": whole / new_tokens * 1e3,
        "warmup_s": warmup,
        "first_ms": short * 1e3,
        "gpu_ms": None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def _time_graph(model: PreTrainedModel, batch: int, new_tokens: int) -> tuple[float, StepTimer]:
    """Return the seconds of one call of ``hf_optim.generate``, and a timer, which sees the steps only on a CPU."""
    from ...generation.door import generate as generate_captured

    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, PROMPT), device=model.device)
    timer = StepTimer()
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new_tokens}
    if model.device.type != "cuda":
        inputs["logits_processor"] = [timer]
    synchronize(model)
    start = time.perf_counter()
    generate_captured(model, ids, **inputs)
    synchronize(model)
    return time.perf_counter() - start, timer


def generate(model: PreTrainedModel, mode: str, batch: int, new_tokens: int) -> tuple[StepTimer, float]:
    """Run stock ``generate`` on random tokens; return its timer, and the milliseconds of the whole call."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, PROMPT), device=model.device)
    timer = StepTimer()
    cache: dict[str, Any] = {} if mode == "dynamic" else {"cache_implementation": "static"}
    if mode == "unguarded":
        if model.device.type == "cpu":
            raise ValueError("transformers compiles no generation on a CPU: unguarded is the same as static")
        cache["compile_config"] = compile_config()
    synchronize(model)
    start = time.perf_counter()
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        logits_processor=[timer],
        **cache,
    )
    synchronize(model)
    return timer, (time.perf_counter() - start) * 1e3


def measure_busy_ms(model: PreTrainedModel, mode: str, batch: int, new_tokens: int) -> float | None:
    """Return the milliseconds per token in which the device computes, or None if the profiler recorded no kernels.

    This is measured over the last third of a profiled ``generate``.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        timer, _ = generate(model, mode, batch, new_tokens)
    events = [e.time_range for e in profiler.events() or () if e.device_type.name == "CUDA"]
    if not events:
        return None
    spans = sorted((e.start, e.end) for e in events)
    first, last = spans[0][0], max(end for _, end in spans)
    begin = last - (last - first) / 3
    busy, covered = 0.0, begin
    for start, end in spans:
        busy += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return busy / (last - begin) * timer.step_ms()


def synchronize(model: PreTrainedModel) -> None:
    """Wait until the device has finished."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()

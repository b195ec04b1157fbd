"""Attention by random features on a GPU, beside causal SDPA: plain PyTorch, and the kernel where it is installed.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/random_features.py [WORD ...]

With words, only the sections that have one of them in their names run: ``check`` (output and gradients in the dtype that
is timed, against float64), ``times`` (one row, 16 heads of 64, by length: forward, and a step with gradients) and
``decode`` (one token behind contexts of several lengths: time, and bytes of the state).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from sections import Sections
from torch import Tensor

from hf_optim_kernels.common import benchmark
from hf_optim_plugins.attention import _linear_kernel
from hf_optim_plugins.attention._feature_draws import gaussian_features, generator_for, orthogonal_features
from hf_optim_plugins.attention._performer_attention import performer_attention
from hf_optim_plugins.attention._rfa_attention import rfa_attention

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEADS, WIDTH = (16, 64) if CUDA else (2, 16)
LENGTHS = [1 << power for power in (range(10, 17) if CUDA else range(6, 9))]
LINEAR_FROM = 4096 if CUDA else 64
FEATURES = {"performer": 256, "rfa": 64}
TOLERANCE = 5e-2 if CUDA else 1e-3

WEIGHTS = {
    "performer": orthogonal_features(HEADS, FEATURES["performer"], WIDTH, generator_for(0), "chi").float().to(DEVICE),
    "rfa": gaussian_features(HEADS, FEATURES["rfa"], WIDTH, generator_for(0)).float().to(DEVICE),
}
SIGMA = torch.ones(HEADS, WIDTH, device=DEVICE)


def performer(q: Tensor, k: Tensor, v: Tensor, state: Any = None, keeps: bool = False) -> Any:
    weight = WEIGHTS["performer"].to(torch.promote_types(q.dtype, torch.float32))
    return performer_attention(q, k, v, weight, WIDTH**-0.5, True, state=state, keeps=keeps)


def rfa(q: Tensor, k: Tensor, v: Tensor, state: Any = None, keeps: bool = False) -> Any:
    weight = WEIGHTS["rfa"].to(torch.promote_types(q.dtype, torch.float32))
    return rfa_attention(q, k, v, weight, SIGMA, True, 0.01, state=state)


ATTENTIONS = {"performer": performer, "rfa": rfa}


@contextmanager
def by(way: str):
    """Compute by the installed kernel, or in plain PyTorch, while the body runs."""
    devices = _linear_kernel.LINEAR_KERNEL_DEVICES
    _linear_kernel.LINEAR_KERNEL_DEVICES = (DEVICE,) if way == "kernel" else ()
    try:
        yield
    finally:
        _linear_kernel.LINEAR_KERNEL_DEVICES = devices


WAYS = ("plain", "kernel") if _linear_kernel._linear_kernel() is not None else ("plain",)


def drawn(length: int, count: int = 4) -> list[Tensor]:
    random = torch.Generator(DEVICE).manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, device=DEVICE, generator=random).to(DTYPE) / 2 for _ in range(count)]


def step(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    inputs = [part.detach().requires_grad_() for part in (q, k, v)]
    out = call(*inputs)
    return out, *torch.autograd.grad(out, inputs, slope)


def microseconds(call: Callable[[], Any]) -> float:
    """Return the time of a call: replayed from a graph where it can be captured."""
    try:
        return benchmark.graph_time([call], 10).us
    except Exception as problem:
        if CUDA:
            torch.cuda.synchronize()
        print("   not captured:", type(problem).__name__, str(problem)[:100], flush=True)
        return benchmark.eager_time([call]).us


def exponent(times: dict[int, float]) -> float:
    """Return the slope of log time against log length, by least squares, from ``LINEAR_FROM`` on."""
    points = [(math.log(n), math.log(t)) for n, t in times.items() if n >= LINEAR_FROM]
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


section = Sections("random_features.json")


@section("check")
def check():
    """Relative errors of output and gradients against float64 on the same rounded inputs."""
    found = {}
    for name, attention in ATTENTIONS.items():
        parts = drawn(1000)
        with by("plain"):
            exact = step(lambda *given, f=attention: f(*given)[0], *(part.double() for part in parts))
        for way in WAYS:
            with by(way):
                own = step(lambda *given, f=attention: f(*given)[0], *parts)
            errors = [benchmark.relative_error(a.detach(), b.detach()) for a, b in zip(own, exact, strict=True)]
            found[f"{name}, {way}"] = errors
            print(f"   {name}, {way}: " + " ".join(f"{each:.1e}" for each in errors), flush=True)
            if not max(errors) < TOLERANCE:
                raise AssertionError(f"{name}, {way} differs from float64: {errors}")
    return found


@section("times")
def times():
    """Microseconds of a forward and of a step, by length; exponents."""
    calls = {"sdpa": ("plain", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))}
    for name, attention in ATTENTIONS.items():
        calls |= {f"{name}, {way}": (way, lambda *given, f=attention: f(*given)[0]) for way in WAYS}
    rows: dict[str, dict[str, dict[int, float]]] = {name: {"forward": {}, "step": {}} for name in calls}
    for n in LENGTHS:
        parts = drawn(n)
        for name, (way, call) in calls.items():
            with by(way):
                with torch.no_grad():
                    rows[name]["forward"][n] = microseconds(lambda c=call, p=parts: c(*p[:3]))
                rows[name]["step"][n] = microseconds(lambda c=call, p=parts: step(c, *p))
            told = "  ".join(f"{what} {own[n]:.0f} us" for what, own in rows[name].items())
            print(f"   {n:>6} {name:<20} {told}", flush=True)
            gc.collect()
    told = {name: {what: exponent(own) for what, own in each.items()} for name, each in rows.items()}
    for name, each in told.items():
        print(
            f"   {name:<20} exponents " + "  ".join(f"{what} {value:.2f}" for what, value in each.items()), flush=True
        )
    return {"rows": rows, "exponents": told}


@section("decode")
@torch.no_grad()
def decode():
    """Microseconds of one token, and bytes of the state, behind contexts of several lengths."""
    rows = []
    for n in (LENGTHS[0], LENGTHS[-1]):
        q, k, v = drawn(n, 3)
        one = [part[:, :, :1].contiguous() for part in (q, k, v)]
        row: dict[str, Any] = {"context": n}
        row["sdpa_us"] = microseconds(lambda o=one, k=k, v=v: F.scaled_dot_product_attention(o[0], k, v))
        row["sdpa_bytes"] = sum(part.numel() * part.element_size() for part in (k, v))
        for name, attention in ATTENTIONS.items():
            for way in WAYS:
                with by(way):
                    _, state = attention(q, k, v, keeps=True)
                    row[f"{name}, {way}_us"] = microseconds(
                        lambda o=one, s=state, f=attention: f(*o, state=s, keeps=True)
                    )
            row[f"{name}_bytes"] = sum(part.numel() * part.element_size() for part in state)
        rows.append(row)
        print("  ", row, flush=True)
    return rows

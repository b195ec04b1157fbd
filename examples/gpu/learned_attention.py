"""Time and memory of learned attention by length on a GPU, beside SDPA: forward, and a step with all gradients.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/learned_attention.py [WORD | LENGTH ...]

With words, only the sections that have one of them in their names run: ``check`` (each attention in the dtype that is
timed against itself in float64), ``forward times`` and ``step times`` (one row, 16 heads of 64, without padding; kept
after each length) and ``kernels`` (which kernels take how much of a forward), which runs only if it is named. Lengths
choose those that are timed, and ``name=...`` the attention whose names have a word. A technique has an entry in
``BUILDERS``: a function that takes a ``Shape`` and returns the call and its weights. Causal ones are taken out of a model
of one layer that is converted (``CONVERTED``), as a recipe does it; their tests compare them with float64.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sections import Sections
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.toolkit.attention import PART, Call
from hf_optim_kernels.common import benchmark
from hf_optim_plugins.attention._induced_attention import InducedAttention
from hf_optim_plugins.attention._length_projection import LengthProjection, projected_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LENGTHS = [1 << power for power in (range(10, 17) if DEVICE == "cuda" else range(8, 11))]
LINEAR_FROM = 4096 if DEVICE == "cuda" else 256  # tokens: from here on exponents are fitted
HEADS, CHECKED = 16, 1024
PROFILED = 8192
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4  # of relative errors against float64
DENSE, DENSE_CAUSAL = "sdpa", "sdpa, causal"


class Shape(NamedTuple):
    """One row of tokens: heads, their size, the length, and what is given to modules."""

    heads: int
    size: int
    tokens: int
    device: str
    dtype: torch.dtype

    @property
    def about(self):
        return {"device": self.device, "dtype": self.dtype}


class Built(NamedTuple):
    """An attention: ``call(q, k, v)``, each ``[1, heads, tokens, size]``, and the weights that have gradients."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: list[nn.Parameter]


def sdpa(shape: Shape) -> Built:
    return Built(F.scaled_dot_product_attention, [])


def linformer(shape: Shape, k: int = 256) -> Built:
    part = LengthProjection(shape.heads, min(k, shape.tokens), shape.tokens, "headwise", "random", **shape.about)
    scale = shape.size**-0.5
    return Built(lambda q, k, v: projected_attention(q, k, v, part, None, scale), list(part.parameters()))


def set_transformer(shape: Shape, points: int = 256) -> Built:
    part = InducedAttention(shape.heads, shape.size, points, False, "identity", **shape.about)
    return Built(lambda q, k, v: part(q, k, v, None, shape.size**-0.5), list(part.parameters()))


# Name -> builder. Attention of encoders is beside SDPA without a mask.
BUILDERS: dict[str, Callable[[Shape], Built]] = {
    DENSE: sdpa,
    "linformer, k = 256": linformer,
    "set_transformer, m = 256": set_transformer,
}


# Name -> step of a recipe, for causal models; beside SDPA with a causal mask.
CONVERTED = {
    "performer, m = 128": {"technique": "performer", "features": 128},
    "rfa, m = 64": {"technique": "rfa", "features": 64},
    "reformer, 4 rounds": {"technique": "reformer", "chunk": 64, "rounds": 4},
    "reformer, trax": {"technique": "reformer", "chunk": 64, "rounds": 4, "scheme": "trax"},
    "routing_transformer": {
        "technique": "routing_transformer", "clusters": 16, "window": 128, "local_heads": 0, "init": "first_batch",
    },
    "sinkhorn": {"technique": "sinkhorn", "block": 64},
}  # fmt: skip


def causal_sdpa(shape: Shape) -> Built:
    return Built(functools.partial(F.scaled_dot_product_attention, is_causal=True), [])


@functools.lru_cache(maxsize=8)
def model_of(step: str, shape: Shape) -> Any:
    """Return the model; one whose settings do not follow from its context has no tokens and serves all lengths."""
    width = shape.heads * shape.size
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, max_position_embeddings=shape.tokens or LENGTHS[-1],
    )  # fmt: skip
    return hf_optim.optimize(LlamaForCausalLM(config).to(**shape.about).eval(), [json.loads(step)])


def converted(step: dict[str, object], shape: Shape) -> Built:
    """Return the attention of a Llama of one layer whose recipe has one step."""
    model = model_of(json.dumps(step), shape._replace(tokens=shape.tokens if step["technique"] == "reformer" else 0))
    attachment = AttentionInterface()[model.config._attn_implementation].__self__
    module = model.model.layers[0].self_attn

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = Call(
            module=module, query=q, key=k, value=v, lengths=None, earlier=None, causal=True, scale=shape.size**-0.5,
            dropout=0.0, layer=0, state=None, keeps=False,
        )  # fmt: skip
        return attachment.compute_call(getattr(module, PART, None), given)[0]

    return Built(call, [])


TIMED = {
    **BUILDERS,
    DENSE_CAUSAL: causal_sdpa,
    **{name: functools.partial(converted, step) for name, step in CONVERTED.items()},
}


def drawn(shape: Shape, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    random = torch.Generator(shape.device).manual_seed(seed)
    size = (1, shape.heads, shape.tokens, shape.size)
    return [torch.randn(size, device=shape.device, generator=random).to(shape.dtype) for _ in range(4)]


def step(built: Built, q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, with the gradients of queries, keys, values and weights."""
    inputs = [each.detach().requires_grad_() for each in (q, k, v)]
    out = built.call(*inputs)
    found = torch.autograd.grad(out, [*inputs, *built.weights], slope, allow_unused=True)  # LSH attention reads no keys
    return (out, *found)


def microseconds(call: Callable[[], object]) -> float:
    """Time of a call: replayed from a graph where it can be captured."""
    call()
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    try:
        return benchmark.graph_time([call], 10).us
    except Exception as problem:
        torch.cuda.synchronize()
        print("   not captured:", type(problem).__name__, str(problem)[:120], flush=True)
        return benchmark.eager_time([call]).us


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that a call takes above what is there before it."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured(build: Callable[[Shape], Built], shape: Shape, steps: bool) -> dict[str, object]:
    """Microseconds and bytes of the forward, or of a step with all gradients, or why there are none."""
    what = "step" if steps else "forward"
    try:
        torch.manual_seed(0)
        built, (q, k, v, slope) = build(shape), drawn(shape)
        call = functools.partial(step, built, q, k, v, slope) if steps else functools.partial(built.call, q, k, v)
        with torch.set_grad_enabled(steps):
            return {f"{what}_us": microseconds(call), f"{what}_bytes": peak_bytes(call)}
    except Exception as problem:
        return {f"{what}_failed": f"{type(problem).__name__}: {str(problem)[:150]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def asked() -> dict[str, Callable[[Shape], Built]]:
    """Return what is measured: all, or SDPA and what has a word of ``name=``."""
    words = [word[5:] for word in sys.argv if word.startswith("name=")]
    if not words:
        return TIMED
    return {name: each for name, each in TIMED.items() if any(word in name for word in ("sdpa", *words))}


def exponent(times: dict[int, float]) -> float | None:
    """The slope of log time against log length, by least squares, from ``LINEAR_FROM`` on."""
    points = [(math.log(n), math.log(t)) for n, t in times.items() if n >= LINEAR_FROM]
    if len(points) < 2:
        return None
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def crossing(times: dict[int, float], dense: dict[int, float]) -> int | None:
    """The first length from which on it is faster than dense attention at every length that both have."""
    both = sorted(times.keys() & dense.keys())
    slower = [n for n in both if times[n] >= dense[n]]
    after = [n for n in both if n > max(slower, default=0)]
    return after[0] if after else None


def summary(rows: dict[str, dict[int, dict[str, object]]], steps: bool) -> dict[str, object]:
    """Exponents and crossing points by name."""
    what = "step_us" if steps else "forward_us"
    times = {name: {n: row[what] for n, row in own.items() if what in row} for name, own in rows.items()}
    found: dict[str, object] = {}
    for name, own in times.items():
        dense = DENSE if name in BUILDERS else DENSE_CAUSAL
        faster = crossing(own, times.get(dense, {})) if name != dense else None
        found[name] = {"exponent": exponent(own), "faster_from": faster}
    return found


def error(pairs) -> float:
    """The norm of the differences of pairs of tensors, relative to that of the second ones."""
    off = sum(float((one.detach().double() - other.detach()).square().sum()) for one, other in pairs)
    return math.sqrt(off / sum(float(other.detach().square().sum()) for _, other in pairs))


section = Sections("learned_attention.json")


@section("check")
def check():
    """Relative error of output and gradients in the dtype that is timed, against float64."""
    found = {}
    for name, build in asked().items():
        results = []
        for dtype in (DTYPE, torch.float64):
            torch.manual_seed(0)
            # As many heads as are timed: numbers of other divisors are other kernels, which take seconds to compile.
            shape = Shape(HEADS, 64, CHECKED, DEVICE, torch.float64)
            built = build(shape)
            rounded = [each.to(DTYPE) for each in drawn(shape)]
            for weight in built.weights:  # the same numbers in both
                weight.data = weight.data.to(DTYPE).to(dtype)
            results.append(step(built, *(each.to(dtype) for each in rounded)))
        out, *gradients = (pair for pair in zip(*results, strict=True) if pair[0] is not None)
        errors = [error([out]), error(gradients)]
        found[name] = {"output": errors[0], "gradients": errors[1]}
        print(f"   {name:<28} output {errors[0]:.1e}, gradients {errors[1]:.1e}", flush=True)
    if wrong := [name for name, each in found.items() if not max(each.values()) < TOLERANCE]:
        raise AssertionError(f"differ from float64: {wrong}")
    return found


def timed(steps: bool) -> dict[str, object]:
    """Return times and memory by name and length, exponents and crossing points; kept after each length."""
    lengths = [int(word) for word in sys.argv if word.isdigit()] or LENGTHS
    rows: dict[str, dict[int, dict[str, object]]] = {name: {} for name in asked()}
    for n in lengths:
        for name, build in asked().items():
            row = rows[name][n] = measured(build, Shape(HEADS, 64, n, DEVICE, DTYPE), steps)
            shown = "  ".join(
                f"{key} {value / 2**20:.0f} MiB" if "bytes" in key else f"{key} {value:.0f}"
                for key, value in row.items()
                if isinstance(value, (int, float))
            )
            print(f"   {n:>6} {name:<28} {shown or row}", flush=True)
        section.keep("step times" if steps else "forward times", {"rows": rows, "summary": summary(rows, steps)})
    told = summary(rows, steps)
    for name, own in told.items():
        print(f"   {name:<28} {own}", flush=True)
    return {"rows": rows, "summary": told}


@section("forward times")
def forward_times():
    """Times and memory of forwards."""
    return timed(False)


@section("step times")
def step_times():
    """Times and memory of forwards with all gradients."""
    return timed(True)


@section("kernels")
def kernels():
    """Of a forward: microseconds and launches of the kernels that take most of it."""
    if "kernels" not in sys.argv or DEVICE == "cpu":
        return "not asked for"
    found = {}
    for name in [each for each in CONVERTED if each in asked()]:
        shape = Shape(HEADS, 64, PROFILED, DEVICE, DTYPE)
        built, (q, k, v, _) = TIMED[name](shape), drawn(shape)
        with torch.no_grad():
            built.call(q, k, v)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                built.call(q, k, v)
                torch.cuda.synchronize()
        own = sorted(seen.key_averages(), key=lambda each: -each.self_device_time_total)
        rows = [(each.key[:60], each.count, each.self_device_time_total) for each in own if each.self_device_time_total]
        found[name] = rows
        print(f"   {name}: {sum(us for *_, us in rows):.0f} us, {sum(c for _, c, _ in rows)} launches", flush=True)
        for key, count, us in rows[:12]:
            print(f"      {us:8.0f} us {count:4} x {key}", flush=True)
        section.keep("kernels", found)
        gc.collect()
        torch.cuda.empty_cache()
    return found

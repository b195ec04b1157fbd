"""Adaptive spans on a GPU: prefill and decoding beside SDPA, after a check of outputs and gradients; captured steps.

    python examples/gpu/adaptive_span.py            # all sections; words choose some
    python examples/gpu/adaptive_span.py correct prefill captured

12 heads x 64, 8 of which look back 64 tokens, 3 256 and 1 all, as trained models do; ramps of 32 tokens. What has a
switch is timed both ways: ``rings`` are ``toolkit.attention.ring_cache.USED`` (``slots`` without it), ``direct`` is
``sparse_attention.op.DIRECT``. Captured steps begin with a batch of long rows, and leave the rest out after a while.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sections import Sections
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.toolkit.attention import HeadGroupsLayer, groups_of
from hf_optim_kernels.common import benchmark
from hf_optim_kernels.decode_attention import op as decode_op
from hf_optim_kernels.ring_attention import launch as ring_launch
from hf_optim_kernels.ring_attention import naive as ring_naive
from hf_optim_kernels.ring_attention import op as ring_op
from hf_optim_kernels.sparse_attention import op as sparse_op
from hf_optim_plugins.adaptive._span_mask import SpanBias, support, untouched
from hf_optim_plugins.adaptive._span_model import SpanSet, _cached, attend_spans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH, RAMP = 12, 64, 32
SPANS = [32] * 8 + [224] * 3 + [None]
LENGTHS = (2048, 4096, 16384) if DEVICE == "cuda" else (512,)
CONTEXT = 32768 if DEVICE == "cuda" else 1024
LAYERS, ROWS, NEW = (12, 8, 64) if DEVICE == "cuda" else (2, 2, 6)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
STARTED, SECONDS = time.perf_counter(), 80  # after which no further model is timed
rings = importlib.import_module("hf_optim.toolkit.attention.ring_cache")
section = Sections("adaptive_span.json")


def spans_of(length: int, z: Tensor | None = None) -> SpanSet:
    """Return the spans of a model that reads ``length`` tokens; ``z`` ``[H]`` for gradients."""
    shares = [1.0 if span is None else span / length for span in SPANS]
    own = torch.tensor(shares, device=DEVICE) if z is None else z
    bias = SpanBias(own, length, RAMP)
    counts = tuple(support(share, length, RAMP) for share in shares)
    return SpanSet(counts, tuple(untouched(share, length) for share in shares), True, bias)


def tensors(length: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """Return query, key and value ``[1, H, length, D]``."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = 1, HEADS, length, WIDTH
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype) for _ in range(3)]


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call."""
    if DEVICE == "cpu":
        work()
        return 0.0
    for _ in range(3):
        work()
    taken = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return round(statistics.median(taken), 4)


def captured(work: Callable[[], object]) -> float:
    """Return the median milliseconds of a call in a graph; NaN if it cannot be captured."""
    try:
        return round(benchmark.graph_time([work] * 4).us / 1e3, 4) if DEVICE == "cuda" else 0.0
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        return math.nan


@section("correct")
def correct() -> dict[str, float]:
    """Largest differences of each way from the dense one: outputs, and gradients relative to their largest."""
    found = {}
    length = 1000 if DEVICE == "cuda" else 300
    z = torch.tensor([1.0 if span is None else span / length for span in SPANS], device=DEVICE)
    results = {}
    for way in ("dense", "blocks", "auto"):
        q, k, v = (part.requires_grad_() for part in tensors(length))
        own = z.clone().requires_grad_()
        out = attend_spans(q, k, v, spans_of(length, own), WIDTH**-0.5, way=way)
        weights = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
        results[way] = [out, *torch.autograd.grad((out.float() * weights).sum(), [q, k, v, own])]
    for way in ("blocks", "auto"):
        for name, one, other in zip(("out", "q", "k", "v", "z"), results[way], results["dense"], strict=True):
            scale = 1.0 if name == "out" else float(other.float().abs().max())
            found[f"{way} {name}"] = float((one.detach().float() - other.detach().float()).abs().max()) / scale
    for rows in (1, ROWS):
        found[f"rings, {rows} rows"] = ring_difference(rows)
    print({name: round(value, 5) for name, value in found.items()}, flush=True)
    assert all(value < 0.05 for value in found.values())
    return found


class Step:
    """A decode step of one layer over rings, ``length`` tokens into a row."""

    def __init__(self, rows: int, length: int, dtype: torch.dtype = DTYPE) -> None:
        spans, self.rows, self.ring, begin = spans_of(length), rows, [], 0
        for count in spans.counts:
            slots = min(count, length) + 8
            self.ring.append([begin, slots, slots, min(count, length)])
            begin += rows * slots
        draw = partial(torch.randn, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
        self.query, self.key, self.value = (draw(rows, HEADS, WIDTH).to(dtype) for _ in range(3))
        self.keys, self.values = (draw(begin, WIDTH).to(dtype) for _ in range(2))
        self.tokens = length - torch.arange(rows, device=DEVICE)
        self.table = torch.tensor(self.ring, device=DEVICE)
        self.counts = torch.tensor(spans.counts, dtype=torch.int32, device=DEVICE)
        assert spans.bias is not None
        self.shares, self.size = spans.bias.z, length
        self.items = ring_op.plan(self.ring, rows, self.keys.device)

    def __call__(self) -> Tensor:
        return ring_op.ring_attention(
            self.query, self.key, self.value, self.keys, self.values, self.tokens, self.table, self.counts, self.shares,
            *self.items, self.size, RAMP, WIDTH**-0.5,
        )  # fmt: skip


def ring_difference(rows: int) -> float:
    """Return the largest difference of a step over rings from the specification in float64."""
    step = Step(rows, 5000 if DEVICE == "cuda" else 300)
    exact = [part.double() for part in (step.query, step.key, step.value, step.keys, step.values)]
    given = step.tokens, step.table, step.counts, step.shares, step.size, RAMP, WIDTH**-0.5
    return float((step().double() - ring_naive.ring_attention(*exact, *given)).abs().max())


@section("prefill")
def prefill() -> dict[str, dict[str, float]]:
    """Milliseconds of a forward, and of a forward with its backward: as the host launches it, and captured."""
    found: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        q, k, v = tensors(length)
        spans = spans_of(length)
        grown = [part.clone().requires_grad_() for part in (q, k, v)]
        grad = torch.randn_like(q)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        def ours(q: Tensor, k: Tensor, v: Tensor, spans: SpanSet = spans) -> Tensor:
            return attend_spans(q, k, v, spans, WIDTH**-0.5)

        row, usual = {}, sparse_op.DIRECT
        for name, work in (("sdpa", sdpa), ("spans", ours), ("spans direct", ours)):
            sparse_op.DIRECT = name.endswith("direct")
            whole = lambda work=work, grown=grown, grad=grad: torch.autograd.grad(work(*grown), grown, grad)  # noqa: E731
            if not sparse_op.DIRECT:  # which changes nothing without a gradient
                with torch.no_grad():
                    row[name] = milliseconds(lambda work=work, q=q, k=k, v=v: work(q, k, v))
                    row[f"{name} captured"] = captured(lambda work=work, q=q, k=k, v=v: work(q, k, v))
            row[f"{name} and backward"] = milliseconds(whole)
            row[f"{name} and backward captured"] = captured(whole)
            sparse_op.DIRECT = usual
        found[str(length)] = row
        print(length, row, flush=True)
        section.keep("prefill", found)
    return found


@section("captured attention")
@torch.no_grad()
def captured_attention() -> list[dict[str, float]]:
    """Microseconds of a step of one layer, captured: over rings, and of decode_attention over all keys."""
    found: list[dict[str, float]] = []
    for rows, length in ((ROWS, CONTEXT), (1, CONTEXT), (1, 4096 if DEVICE == "cuda" else 512)):
        row: dict[str, float] = {"rows": rows, "context": length}
        one = 4 * rows * HEADS * WIDTH * length
        for name in ("dense", "rings"):
            size = one if name == "dense" else 4 * WIDTH * rows * sum(spans_of(length).counts)
            copies = min(32, math.ceil(120e6 / size)) if DEVICE == "cuda" else 1  # more than the L2 cache holds
            calls: list[Callable[[], object]] = []
            for _ in range(copies):
                if name == "rings":
                    calls.append(Step(rows, length))
                    continue
                key, value = (torch.zeros(rows, HEADS, length, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(2))
                query = torch.ones(rows, HEADS, 1, WIDTH, device=DEVICE, dtype=DTYPE)
                calls.append(partial(decode_op.decode_attention, query, key, value, None, None, None, 0.1, 0.0))
            row[name] = round(benchmark.graph_time(calls).us, 2)
        found.append(row)
        print(row, flush=True)
        section.keep("captured attention", found)
    return found


@section("tune")
@torch.no_grad()
def tune() -> list[dict[str, Any]]:
    """Microseconds of a step over rings by its settings, and by how many programs share a multiprocessor."""
    from hf_optim_kernels.common.tuner import with_config

    found: list[dict[str, Any]] = []
    first = ring_launch.FIRST
    others = [first._replace(block=32), first._replace(block=128), first._replace(warps=2), first._replace(warps=8)]
    resident, choices = ring_launch.RESIDENT, [(first, 1), (first, 2), (first, 4), *((each, 2) for each in others)]
    for rows, length in ((1, CONTEXT), (ROWS, CONTEXT)):
        for setting, ring_launch.RESIDENT in choices:
            steps = [Step(rows, length) for _ in range(8 if rows == 1 else 2)]
            calls = [with_config(ring_launch.OP, setting._asdict(), step) for step in steps]
            row = {"rows": rows, "resident": ring_launch.RESIDENT, **setting._asdict()}
            found.append({**row, "us": round(benchmark.graph_time(calls).us, 2)})
            print(found[-1], flush=True)
            section.keep("tune", found)
    ring_launch.RESIDENT = resident
    return found


@section("decode")
@torch.no_grad()
def decode() -> dict[str, float]:
    """Bytes of a layer's cache after a long prompt, and milliseconds of one step, beside the dense cache."""
    q, k, v = tensors(CONTEXT)
    spans = spans_of(CONTEXT)
    layer = HeadGroupsLayer()
    layer.update(k, v)
    for part, group in zip(
        (p for p, _, _ in layer.take(groups_of(spans.counts))), groups_of(spans.counts), strict=True
    ):
        part.settle(spans.of(group).heads, None)
    one = [part[:, :, -1:] for part in (q, k, v)]

    def step() -> Tensor:
        key, _ = layer.update(one[1], one[2])
        return _cached(layer, one[0], key.plain(), one[2], spans, WIDTH**-0.5, None, None, 0.0)

    dense = 2 * k.numel() * k.element_size()
    found = {"dense bytes": dense, "bytes": layer.held_bytes(), "share": layer.held_bytes() / dense}
    found["step"] = milliseconds(step)
    found["sdpa step"] = milliseconds(lambda: functional.scaled_dot_product_attention(one[0], k, v))
    print(found)
    return found


def llama(length: int, spans: bool, layers: int = LAYERS) -> Any:
    """Return a Llama of 12 heads with random weights, with the spans above in each layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HEADS * WIDTH, intermediate_size=4 * HEADS * WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=length, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    model = model.to(DTYPE).eval()
    if not spans:
        return model
    model = hf_optim.optimize(model, [{"technique": "adaptive_span", "ramp": RAMP}]).eval()
    shares = torch.tensor([1.0 if span is None else span / length for span in SPANS])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.span.z.copy_(shares)
    return model


def call(model: Any, ids: Tensor, new: int, mode: str) -> tuple[float, Tensor]:
    """Return the seconds of a call for ``new`` tokens, and the tokens."""
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        found = hf_optim.generate(model, ids, mode=mode, **given)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


@section("captured steps")
@torch.no_grad()
def captured_steps() -> list[dict[str, Any]]:
    """Milliseconds of a step of generate and of a prefill, with spans and without; tokens beside transformers' loop."""
    mode = "captured" if DEVICE == "cuda" else "eager"
    found: list[dict[str, Any]] = []
    short = 4096 if DEVICE == "cuda" else 512
    sizes = (CONTEXT, ROWS), (short, 1), (CONTEXT, 1)
    plan = [(*size, name, "rings") for size in sizes for name in ("dense", "spans", "windows")]
    plan += [(*size, name, "slots") for size in ((short, 1), (CONTEXT, ROWS)) for name in ("spans", "windows")]
    model: Any = None
    for length, rows, name, way in plan:
        if time.perf_counter() - STARTED > SECONDS:
            print(f"left out: {name} ({way}), {rows} x {length}")
            continue
        ids = torch.randint(1, 1024, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        rings.USED = way == "rings"
        if name == "windows":  # of the model with spans before
            model.fix_spans()
        else:
            model = llama(length + NEW, name == "spans")
        row: dict[str, Any] = {"model": name, "context": length, "rows": rows}
        row |= {} if name == "dense" else {"way": way}
        call(model, ids, NEW, mode)  # captures
        call(model, ids, 1, mode)
        prefilled, whole = (min(call(model, ids, new, mode)[0] for _ in range(2)) for new in (1, NEW))
        row |= {"prefill_ms": prefilled * 1e3, "step_ms": (whole - prefilled) / (NEW - 1) * 1e3}
        if name != "dense" and (length, rows) == (short, 1):
            # In 16 bits tokens may differ where two logits are close.
            own, stock = (call(model, ids, NEW, each)[1] for each in (mode, "stock"))
            row["same_tokens"] = float((own == stock)[:, length:].float().mean())
        found.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        section.keep("captured steps", found)
        rings.USED = False
    return found

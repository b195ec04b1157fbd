"""Adaptive spans on a GPU: prefill and decoding beside SDPA, after a check of outputs and gradients; captured steps.

    python examples/gpu/adaptive_span.py            # all sections; words choose some
    python examples/gpu/adaptive_span.py correct

12 heads x 64, 8 of which look back 64 tokens, 3 256 and 1 all, as trained models do; ramps of 32 tokens.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sections import Sections
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.toolkit.attention import HeadGroupsLayer, groups_of
from hf_optim_plugins.adaptive._span_mask import SpanBias, support, untouched
from hf_optim_plugins.adaptive._span_model import SpanSet, _cached, attend_spans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH, RAMP = 12, 64, 32
SPANS = [32] * 8 + [224] * 3 + [None]
LENGTHS = (2048, 4096, 16384) if DEVICE == "cuda" else (512,)
CONTEXT = 32768 if DEVICE == "cuda" else 1024
LAYERS, ROWS, NEW = (12, 8, 64) if DEVICE == "cuda" else (2, 2, 6)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
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
    print(found)
    assert all(value < 0.05 for value in found.values())
    return found


@section("prefill")
def prefill() -> dict[str, dict[str, float]]:
    """Milliseconds of a forward, and of a forward with its backward."""
    found = {}
    for length in LENGTHS:
        q, k, v = tensors(length)
        spans = spans_of(length)
        grown = [part.clone().requires_grad_() for part in (q, k, v)]
        grad = torch.randn_like(q)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        def ours(q: Tensor, k: Tensor, v: Tensor, spans: SpanSet = spans) -> Tensor:
            return attend_spans(q, k, v, spans, WIDTH**-0.5)

        row = {}
        for name, work in (("sdpa", sdpa), ("spans", ours)):
            with torch.no_grad():
                row[name] = milliseconds(lambda work=work, q=q, k=k, v=v: work(q, k, v))
            row[f"{name} and backward"] = milliseconds(
                lambda work=work, grown=grown, grad=grad: torch.autograd.grad(work(*grown), grown, grad)
            )
        found[str(length)] = row
        print(length, row)
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


def llama(length: int, spans: bool, fixed: bool, layers: int = LAYERS) -> Any:
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
    if fixed:
        model.fix_spans()
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
    for length, rows in ((4096 if DEVICE == "cuda" else 512, 1), (CONTEXT, 1), (CONTEXT, ROWS)):
        ids = torch.randint(1, 1024, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for name, spans, fixed in (("dense", False, False), ("spans", True, False), ("windows", True, True)):
            model = llama(length + NEW, spans, fixed)
            row: dict[str, Any] = {"model": name, "context": length, "rows": rows}
            call(model, ids, NEW, mode)  # compiles and captures
            short = statistics.median(call(model, ids, 1, mode)[0] for _ in range(3))
            whole = statistics.median(call(model, ids, NEW, mode)[0] for _ in range(3))
            row |= {"prefill_ms": short * 1e3, "step_ms": (whole - short) / (NEW - 1) * 1e3}
            if spans and rows == 1 and length != CONTEXT:
                # In 16 bits tokens may differ where two logits are close.
                own, stock = (call(model, ids, NEW, each)[1] for each in (mode, "stock"))
                row["same_tokens"] = float((own == stock)[:, length:].float().mean())
            found.append(row)
            print(row, flush=True)
            section.keep("captured steps", found)
            del model
    return found

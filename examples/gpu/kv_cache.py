"""Benchmark the quantized key/value cache on a GPU: correctness against float64, then times and memory.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/kv_cache.py [WORD ...]

With words, only the sections that have one of them in their names run. Kernels are compiled by processes of their own
first, as many as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.decode_attention import op as dense
from hf_optim_kernels.kv_cache import naive, op
from hf_optim_kernels.kv_cache.format import Format, Store, allocate

H, G, D = 32, 8, 128
FORMATS = {
    "int8": Format(8, False, False, 64, 128, True),
    "int8 per token": Format(8, False, True, 64, 128, True),
    "float8": Format(8, True, False, 64, 128, True),
    "int4": Format(4, False, False, 64, 128, False),
    "int4 symmetric": Format(4, False, False, 64, 128, True),
    "int4 group 128": Format(4, False, False, 128, 128, False),
    "int4 per token": Format(4, False, True, 64, 128, False),
    "int4 group 32": Format(4, False, False, 32, 128, False),
}
SHAPES = {"1 x 32k": (1, 32768), "16 x 8k": (16, 8192), "16 x 32k": (16, 32768)}


def tensors(B, N, dtype=torch.bfloat16, heads=(H, G), dims=(D, D), queries=1, seed=0):
    """Random query, keys and values; some channels of the keys are large for every token."""
    random = torch.Generator("cuda").manual_seed(seed)
    make = lambda *shape: torch.randn(shape, device="cuda", generator=random).to(dtype)  # noqa: E731
    key = make(B, heads[1], N, dims[0])
    key[..., :: max(1, dims[0] // 4)] += 6
    return make(B, heads[0], queries, dims[0]), key, make(B, heads[1], N, dims[1])


def filled(fmt, key, value, room=0):
    """A store with all tokens, and its state."""
    store = allocate(fmt, key, value, key.shape[2] + room)
    quantized = naive.append(store, fmt, 0, 0, key, value)
    return store, torch.tensor([key.shape[2], quantized, 0], dtype=torch.int32, device="cuda")


def error(out, reference):
    return float((out.double() - reference.double()).norm() / reference.double().norm())


CASES = {  # rows, tokens, heads, dims, queries, dtype, mask, sinks, softcap
    "grouped": (2, 1000, (32, 8), (128, 128), 1, torch.bfloat16, False, False, 0.0),
    "padded": (3, 900, (32, 8), (128, 128), 1, torch.bfloat16, True, True, 20.0),
    "one key head": (2, 700, (16, 1), (64, 64), 1, torch.float16, True, False, 0.0),
    "a few tokens": (2, 800, (8, 8), (80, 48), 3, torch.float16, True, False, 0.0),
    "sixteen heads": (1, 900, (64, 4), (128, 128), 1, torch.bfloat16, True, False, 0.0),
    "thirty-two heads": (1, 900, (32, 1), (128, 128), 1, torch.bfloat16, True, False, 0.0),
    "wide": (1, 1500, (8, 4), (256, 256), 1, torch.bfloat16, False, False, 0.0),
    "float32": (2, 600, (4, 2), (32, 32), 1, torch.float32, True, True, 0.0),
}


def check(case, name):
    """Attention and append of a case in a format, against float64 and against the specification."""
    B, N, heads, dims, Q, dtype, padding, with_sinks, softcap = CASES[case]
    fmt = FORMATS[name]
    query, key, value = tensors(B, N, dtype, heads, dims, Q)
    start = N - 70
    store, state = filled(fmt, key[:, :, :start], value[:, :, :start], room=400)
    other = Store(*(t.clone() for t in store))
    quantized = int(state[1])
    for first in range(start, N, 7):
        new = slice(first, first + 7)
        op.kv_append(key[:, :, new], value[:, :, new], state, [int(x) for x in fmt], *store)
        quantized = naive.append(other, fmt, first, quantized, key[:, :, new], value[:, :, new])
    same = state.tolist() == [N, quantized, 0]
    for field, mine, theirs in zip(Store._fields, store, other, strict=True):
        # Slots of the tail that have no token may differ.
        if not field.startswith("tail"):
            same &= torch.equal(mine, theirs)
    mask = None
    if padding or Q > 1:
        mask = torch.ones(B, 1, Q, N + 50, dtype=torch.bool, device="cuda").tril(N - Q)
        if B > 1:
            mask[1, :, :, :140] = False
        mask[0, :, :, : N - 300] = False  # a window
    sinks = torch.linspace(-1, 3, heads[0], device="cuda") if with_sinks else None
    out = op.kv_attend(query, state, 0, N + 50, mask, sinks, 0.1, softcap, [int(x) for x in fmt], *store)
    k, v = naive.read(Store(*store[:6], *(t.double() for t in store[6:])), fmt, N, quantized)
    cut = None if mask is None else mask[..., :N]
    reference = reference_attention(query, k, v, cut, sinks, 0.1, softcap)
    return {"error": error(out, reference), "codes_equal": bool(same)}


def reference_attention(query, key, value, mask, sinks, scale, softcap):
    """Attention in float64 of the values that the codes stand for."""
    group = query.shape[1] // key.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.double() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ v).transpose(1, 2)


def warm(part, parts, sections):
    """Compile what ``sections`` need: every ``parts``-th job from ``part`` on."""
    jobs = []
    if "correctness" in sections:
        jobs += [lambda c=c, n=n: check(c, n) for c in CASES for n in checked(c)]
    if "times" in sections:
        # A kernel does not depend on the number of programs, nor on the shape of the cache.
        jobs += [lambda n=name: attend_once(n, "1 x 32k") for name in FORMATS]
    for job in jobs[part::parts]:
        try:
            job()
        except Exception as problem:
            print(f"warm: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
        torch.cuda.empty_cache()


def checked(case):
    return list(FORMATS) if case == "grouped" else ["int8", "float8", "int4"]


def attend_once(name, shape):
    (B, N), fmt = SHAPES[shape], FORMATS[name]
    query = torch.zeros(B, H, 1, D, dtype=torch.bfloat16, device="cuda")
    like = query.new_zeros(B, G, 1, D)
    store = allocate(fmt, like, like, N)
    state = torch.tensor([N, fmt.quantized(N), 0], dtype=torch.int32, device="cuda")
    op.kv_attend(query, state, 0, N, None, None, 0.1, 0.0, [int(x) for x in fmt], *store)


def main():
    section = Sections("kv-cache.json")
    words = sys.argv[1:]
    compiled = [name for name in ("correctness", "times") if not words or any(word in name for word in words)]
    if compiled:
        start, count = time.time(), min(14, os.cpu_count() or 1)
        command = [sys.executable, __file__, "--warm"]
        workers = [subprocess.Popen([*command, str(i), str(count), *compiled]) for i in range(count)]
        for worker in workers:
            worker.wait()
        print(f"compiled in {time.time() - start:.0f} s", flush=True)

    @section("correctness")
    def _():
        found = {f"{c}, {n}": check(c, n) for c in CASES for n in checked(c)}
        for name, each in found.items():
            print(f"{name:32s} {each['error']:.2e} {'' if each['codes_equal'] else 'CODES DIFFER'}", flush=True)
        return found

    @section("times")
    def _():
        """Microseconds of one attention, from replayed graphs over caches that are larger than L2 together."""
        found = {}
        section.result["copy_tb_per_s"] = round(benchmark.copy_bandwidth() / 1e6, 2)
        for shape, (B, N) in SHAPES.items():
            query, key, value = tensors(B, N)
            bytes_dense = 2 * key.numel() * 2
            copies = max(1, -(-200_000_000 // bytes_dense))
            caches = [(key, value)] + [(key.clone(), value.clone()) for _ in range(copies - 1)]
            rows = {}
            call = lambda k, v: dense.decode_attention(query, k, v, None, None, None, 0.1, 0.0)  # noqa: E731
            rows["bf16 kernel"] = timed([lambda k=k, v=v: call(k, v) for k, v in caches], bytes_dense)
            sdpa = lambda k, v: F.scaled_dot_product_attention(query, k, v, scale=0.1, enable_gqa=True)  # noqa: E731
            rows["bf16 sdpa"] = timed([lambda k=k, v=v: sdpa(k, v) for k, v in caches], bytes_dense)
            del caches
            for name, fmt in FORMATS.items():
                rows[name] = timed_format(fmt, query, key, value)
            base = rows["bf16 kernel"]["us"]
            for name, row in rows.items():
                row["times_bf16"] = base / row["us"] if "us" in row else None
                print(f"{shape:9s} {name:36s} {row.get('us', 0):8.1f} us  x{row['times_bf16'] or 0:.2f}  "
                      f"{row.get('tb_s', 0):.2f} TB/s", row.get("failed", ""), flush=True)  # fmt: skip
            found[shape] = rows
            torch.cuda.empty_cache()
        return found

    @section("append")
    def _():
        """Microseconds of writing a token: of most steps, and of one that quantizes a group."""
        found = {}
        for name in ("int8", "int4", "float8"):
            fmt = FORMATS[name]
            _, key, value = tensors(16, 1024)
            store, state = filled(fmt, key, value, room=64)
            new = key[:, :, :1].contiguous(), value[:, :, :1].contiguous()
            for label, count in (("plain", 1024), ("with a group", 1024 + fmt.step - 1)):
                kept = torch.tensor([count, fmt.quantized(count), 0], dtype=torch.int32, device="cuda")

                def run(kept=kept, fmt=fmt, store=store, new=new):
                    state.copy_(kept)
                    op.kv_append(*new, state, [int(x) for x in fmt], *store)

                found[f"{name}, {label}"] = benchmark.graph_time([run] * 8).us
                print(f"append 16 rows, {name}, {label}: {found[f'{name}, {label}']:.1f} us", flush=True)
        return found

    @section("generate")
    def _():
        return generate()


def timed(calls, size):
    try:
        us = benchmark.graph_time(calls).us
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {str(problem)[:200]}"}
    return {"us": us, "bytes": size, "tb_s": size / us / 1e6}


def timed_format(fmt, query, key, value):
    store, state = filled(fmt, key, value)
    size = sum(t.numel() * t.element_size() for t in store)
    copies = max(1, -(-200_000_000 // size))
    stores = [store] + [Store(*(t.clone() for t in store)) for _ in range(copies - 1)]
    fields, N = [int(x) for x in fmt], key.shape[2]
    calls = [lambda s=s: op.kv_attend(query, state, 0, N, None, None, 0.1, 0.0, fields, *s) for s in stores]
    return timed(calls, size)


def model_of_8b_width(layers):
    """Return a random Llama with layers of the width of an 8B one, bfloat16 on the device, that generates without end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=G,
        vocab_size=32000, max_position_embeddings=65536,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate():
    """Milliseconds a token and peak memory of ``hf_optim.generate``, 8 layers of the width of an 8B Llama."""
    import hf_optim
    from hf_optim.generation import sessions
    from hf_optim.toolkit.quantization import KeyValueScheme, cache_size, set_scheme

    model = model_of_8b_width(8)
    mode = os.environ.get("KV_MODE", "captured")
    found = {}
    for rows, length in ((1, 30_000), (8, 8_000)):
        ids = torch.randint(5, 31_000, (rows, length), device="cuda")
        first = None
        for bits in (None, 8, "float8", 4):
            scheme = None if bits is None else KeyValueScheme(bits)
            set_scheme(model.config, scheme)
            sessions.drop(model)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            try:
                times = {}
                with torch.no_grad():
                    hf_optim.generate(model, input_ids=ids, max_new_tokens=8, mode=mode)
                    for count in (32, 160):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        out = hf_optim.generate(model, input_ids=ids, max_new_tokens=count, mode=mode)
                        torch.cuda.synchronize()
                        times[count] = time.perf_counter() - start
                row = {
                    "ms_token": (times[160] - times[32]) / 128 * 1e3,
                    "seconds_32": times[32],
                    "peak_gib": (torch.cuda.max_memory_allocated() - base) / 2**30,
                    "held_gib": (torch.cuda.memory_allocated() - base) / 2**30,
                    "cache_gib": cache_size(model.config, rows, length, scheme).total / 2**30,
                }
                first = out if bits is None else first
                row["same_tokens"] = None if first is None else float((out == first)[:, length:].float().mean())
            except Exception as problem:
                row = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
            found[f"{rows} x {length}, {bits or 16} bits, {mode}"] = row
            print(f"generate {rows} x {length} {bits or 16}:", row, flush=True)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        warm(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()

"""Benchmark packed experts on a GPU: correctness against the specification in float32, then times beside dense ones.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/packed_experts.py [WORD ...]

With words, only the sections that have one of them in their names run. Kernels are compiled by processes of their own
first, as many as there are cores. ``tiles`` times each launch with several tiles; it is not needed to use them.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sections import Sections

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.experts import op as pair_lists
from hf_optim_kernels.packed_experts import launch, naive
from hf_optim_kernels.packed_experts.base import SEMAPHORES
from hf_optim_kernels.packed_experts.naive import StackedWeight
from hf_optim_kernels.wna16 import naive as weight_only


class Shape(NamedTuple):
    """A mixture layer: hidden size, inner size, experts, choices of a token."""

    d: int
    inner: int
    experts: int
    top_k: int


SHAPES = {"qwen3-30b-a3b": Shape(2048, 768, 128, 8), "mixtral": Shape(4096, 14336, 8, 2)}
# bits, group (0: a row), zero points
FORMATS = {"w4a16": (4, 128, False), "w4a16 zeros": (4, 128, True), "w8a16": (8, 0, False)}
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
BF16 = torch.bfloat16
NAMES = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")


def tiles(*values):
    return dict(zip(NAMES, values, strict=True))


# For one token: block_n, split, warps, stages.
ONE_UP = {
    "qwen3-30b-a3b": [(32, 1, 4, 3), (32, 2, 4, 3), (64, 1, 4, 4), (64, 2, 4, 4), (64, 4, 4, 3), (128, 2, 4, 3), (128, 4, 4, 3),
                      (32, 1, 2, 4), (32, 2, 2, 4), (64, 2, 2, 4), (64, 2, 4, 5)],
    "mixtral": [(64, 1, 4, 4), (64, 2, 4, 4), (128, 1, 4, 4), (128, 2, 4, 4), (32, 1, 2, 5), (64, 1, 2, 4), (128, 1, 8, 4), (64, 1, 4, 6)],
}  # fmt: skip
ONE_DOWN = {
    "qwen3-30b-a3b": [(32, 1, 4, 3), (64, 1, 4, 3), (128, 1, 4, 3), (64, 3, 4, 3), (128, 3, 4, 3), (32, 1, 2, 3), (64, 1, 2, 3), (64, 1, 4, 4)],
    "mixtral": [(64, 2, 4, 4), (64, 4, 4, 4), (64, 8, 4, 4), (128, 4, 4, 4), (128, 8, 4, 4), (32, 4, 2, 5), (64, 4, 2, 4), (64, 8, 4, 3)],
}  # fmt: skip
# For several: tokens, and block_m, block_n, split, warps, stages of both products.
MANY = {
    8: [(8, 64, 1, 4, 4), (16, 64, 1, 4, 4), (16, 128, 1, 4, 3), (16, 64, 2, 4, 4), (16, 32, 1, 2, 4)],
    64: [(16, 64, 1, 4, 4), (16, 128, 1, 4, 4), (16, 128, 1, 8, 4), (32, 64, 1, 4, 4), (32, 128, 1, 4, 4)],
    512: [(32, 64, 1, 4, 3), (32, 128, 1, 4, 3), (64, 64, 1, 4, 3), (64, 128, 1, 4, 3), (64, 128, 1, 8, 3), (128, 128, 1, 8, 3)],
    4096: [(64, 64, 1, 4, 3), (64, 128, 1, 4, 3), (64, 128, 1, 8, 3), (128, 128, 1, 8, 3), (128, 64, 1, 8, 3), (128, 256, 1, 8, 2)],
}  # fmt: skip


@functools.cache
def matrices(shape, form):
    """Both sides with random codes."""
    d, inner, experts, _ = SHAPES[shape]
    bits, group, zeros = FORMATS[form]
    random = torch.Generator("cuda").manual_seed(0)
    made = []
    for rows, columns in ((2 * inner, d), (d, inner)):
        size = group or columns
        slices = weight_only.slice_columns(size, columns)
        steps = -(-columns // weight_only.tile_columns(size, bits, columns))
        packed = torch.randint(-(1 << 15), 1 << 15, (experts, steps, rows, slices), device="cuda", generator=random,
                               dtype=torch.int16)  # fmt: skip
        scale = (torch.rand(experts, columns // size, rows, device="cuda", generator=random) + 0.5).to(BF16)
        scale *= 4 / 2**bits / columns**0.5
        zero = (
            torch.randint(0, 1 << bits, scale.shape, device="cuda", generator=random, dtype=torch.uint8)
            if zeros
            else None
        )
        made.append(StackedWeight(packed, scale, zero, None, None, None, bits, size, columns, 0))
    return made


def inputs(shape, tokens, seed=0):
    """hidden, chosen experts and weights of tokens that choose evenly."""
    d, _, experts, top_k = SHAPES[shape]
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, d, device="cuda", generator=random).to(BF16)
    chosen = torch.rand(tokens, experts, device="cuda", generator=random).argsort(1)[:, :top_k].contiguous()
    return hidden, chosen, torch.rand(tokens, top_k, device="cuda", generator=random)


def sets(shape, tokens):
    """Inputs that together read more than the cache holds."""
    d, inner, experts, top_k = SHAPES[shape]
    read = min(experts, tokens * top_k) * 3 * d * inner // 2
    return [inputs(shape, tokens, seed) for seed in range(max(2, min(16, (400 << 20) // read)))]


COUNTERS = torch.zeros(SEMAPHORES, dtype=torch.int32, device="cuda") if torch.cuda.is_available() else None


def mixture(shape, form, given, both=None, single=None):
    return launch.packed_experts(*given, *matrices(shape, form), COUNTERS, both, single)


def floor_of(shape, form, chosen):
    """Bytes of the experts that were chosen."""
    sides, count = matrices(shape, form), len(chosen.unique())
    parts = [t for side in sides for t in (side.packed, side.scale, side.zero) if t is not None]
    return sum(t.numel() * t.element_size() for t in parts) // SHAPES[shape].experts * count


# -- compiling --------------------------------------------------------------------------------------------------------
def jobs():
    """Everything that is launched, as functions."""
    found = []
    for shape, form, tokens in itertools.product(SHAPES, FORMATS, TOKENS):
        if form == "w4a16" or tokens in (1, 64):
            found.append(lambda s=shape, f=form, t=tokens: mixture(s, f, inputs(s, t)))
    for shape in SHAPES:
        found += [lambda s=shape, t=each: one_up(s, inputs(s, 1), tiles(8, *t)) for each in ONE_UP[shape]]
        found += [lambda s=shape, t=each: one_down(s, inputs(s, 1), tiles(8, *t)) for each in ONE_DOWN[shape]]
        for tokens, several in MANY.items():
            for each in several:
                for side in (0, 1):
                    found.append(lambda s=shape, n=tokens, t=each, i=side: many(s, inputs(s, n), tiles(*t), i))
    return found


def one_up(shape, given, own):
    up, _ = matrices(shape, "w4a16")
    return launch.linear(given[0], given[1], up, COUNTERS, gate=True, to_slot=True, defined=False, tiles=own)


@functools.cache
def inner_of(shape, tokens):
    return torch.randn(tokens * SHAPES[shape].top_k, SHAPES[shape].inner, device="cuda").to(BF16)


def one_down(shape, given, own):
    _, down = matrices(shape, "w4a16")
    return launch.weighted_sum(inner_of(shape, 1), given[1], given[2], down, COUNTERS, own)


def many(shape, given, own, side, route=None):
    weight = matrices(shape, "w4a16")[side]
    route = route or pair_lists._route(given[1], weight.experts, own["BLOCK_M"])
    if side == 0:
        return launch.linear(
            given[0], given[1], weight, COUNTERS, route=route, gate=True, to_slot=True, defined=False, tiles=own
        )
    inner = inner_of(shape, len(given[0]))
    return launch.linear(inner, given[1], weight, COUNTERS, route=route, from_slot=True, defined=False, tiles=own)


def compile_share(index, count):
    for number, job in enumerate(jobs()):
        if number % count == index:
            try:
                job()
            except Exception as error:
                print("compile", number, repr(error)[:200], flush=True)


def warm():
    if len(sys.argv) > 2 and sys.argv[1] == "--share":
        compile_share(int(sys.argv[2]), int(sys.argv[3]))
        sys.exit()
    start, count = time.time(), min(14, os.cpu_count() or 1)
    shares = [subprocess.Popen([sys.executable, __file__, "--share", str(i), str(count)]) for i in range(count)]
    for share in shares:
        share.wait()
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


warm()
section = Sections("packed-experts.json")
COPY = benchmark.copy_bandwidth()
section.result["copy_tb_s"] = COPY / 1e6


@section("correct")
def _():
    found = {}
    for shape, form, tokens in itertools.product(SHAPES, FORMATS, (1, 2, 16, 64, 512)):
        if form != "w4a16" and tokens not in (1, 64):
            continue
        hidden, chosen, weights = inputs(shape, tokens, 7)
        if tokens == 16:
            chosen[3, 1], chosen[5] = SHAPES[shape].experts, SHAPES[shape].experts + 5
        wide = hidden.float(), chosen, weights
        reference = naive.packed_experts(*wide, *matrices(shape, form)).double()
        memory = torch.full((1 << 28,), float("nan"), device="cuda")
        del memory
        error = float((mixture(shape, form, (hidden, chosen, weights)).double() - reference).norm() / reference.norm())
        found[f"{shape} {form} {tokens}"] = error
        print(f"{shape:14s} {form:12s} {tokens:5d} {error:.1e} {'' if error < 1.2e-2 else 'WRONG'}", flush=True)
    found["semaphores"] = int(COUNTERS.abs().sum())
    assert not found["semaphores"]
    return found


def stock(shape):
    """The experts of transformers with dense weights."""
    d, inner, experts, _ = SHAPES[shape]
    gate = lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    up, down = (torch.randn(experts, *s, device="cuda", dtype=BF16) * 0.02 for s in ((2 * inner, d), (d, inner)))
    return SimpleNamespace(
        has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True, has_post_expert_norm=False, training=False,
        _is_expert_parallel=False, num_experts=experts, gate_up_proj=up, down_proj=down, _apply_gate=gate, act_fn=F.silu,
    )  # fmt: skip


@section("times")
def _():
    from transformers.integrations.moe import grouped_mm_experts_forward

    found = {}
    print("shape          tokens  floor us  w4a16  of floor  zeros  w8a16   stock grouped_mm (bf16)")
    for shape in SHAPES:
        dense = stock(shape)
        for tokens in TOKENS:
            given = sets(shape, tokens)
            floor = sum(floor_of(shape, "w4a16", one[1]) for one in given) / len(given) / COPY
            row = {"floor_us": floor}
            for form in FORMATS:
                timed = benchmark.graph_time([functools.partial(mixture, shape, form, one) for one in given], 15)
                row[form] = timed.us
            try:
                calls = [functools.partial(grouped_mm_experts_forward, dense, *one) for one in given]
                row["stock grouped_mm"] = benchmark.graph_time(calls, 9).us
            except Exception as error:
                row["stock grouped_mm"] = None
                print(repr(error)[:200])
            found[f"{shape} {tokens}"] = row
            print(f"{shape:14s} {tokens:6d} {floor:9.1f} {row['w4a16']:6.1f} {row['w4a16'] / floor:9.2f} {row['w4a16 zeros']:6.1f} "
                  f"{row['w8a16']:6.1f} {row['stock grouped_mm'] or 0:10.1f}", flush=True)  # fmt: skip
    return found


@section("tiles")
def _():
    found = {}

    def best(name, timed):
        order = sorted(timed, key=timed.get)
        found[name] = {str(key): timed[key] for key in order}
        print(f"{name:28s} " + "  ".join(f"{key} {timed[key]:.1f}" for key in order[:4]), flush=True)

    for shape in SHAPES:
        given = sets(shape, 1)
        for name, choices, call in (("up", ONE_UP, one_up), ("down", ONE_DOWN, one_down)):
            timed = {}
            for each in choices[shape]:
                calls = [functools.partial(call, shape, one, tiles(8, *each)) for one in given]
                timed[each] = benchmark.graph_time(calls, 15).us
            best(f"{shape} 1 {name}", timed)
        for tokens, several in MANY.items():
            given = sets(shape, tokens)
            for side in (0, 1):
                timed = {}
                for each in several:
                    own = tiles(*each)
                    experts = SHAPES[shape].experts
                    calls = [
                        functools.partial(
                            many, shape, one, own, side, pair_lists._route(one[1], experts, own["BLOCK_M"])
                        )
                        for one in given
                    ]
                    try:
                        timed[each] = benchmark.graph_time(calls, 9).us
                    except Exception as error:
                        print(each, repr(error)[:150])
                best(f"{shape} {tokens} {'down' if side else 'up'}", timed)
        for tokens in (2, 4, 8):
            given = sets(shape, tokens)
            timed = {}
            for single in (True, False):
                calls = [functools.partial(mixture, shape, "w4a16", one, None, single) for one in given]
                timed["alone" if single else "sorted"] = benchmark.graph_time(calls, 15).us
            best(f"{shape} {tokens} both", timed)
    return found

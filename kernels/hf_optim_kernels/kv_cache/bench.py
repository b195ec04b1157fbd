"""Contenders and tunables of ``hf-optim bench`` for attention to a quantized cache.

A "layer of ``N`` outputs and ``K`` inputs" is attention of ``N`` channels here, as in ``decode_attention.bench``, of
one new token to the ``K`` before it; ``M`` rows are those of the batch. ``dense`` reads a cache in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable, with_config
from ..decode_attention.bench import SCALE, dense_calls, exact, random_cache, random_query
from . import naive, op
from .format import Format, Store, allocate, padded

FORMATS = {
    "int8": Format(8, False, False, 64, 128, True),
    "float8": Format(8, True, False, 64, 128, True),
    "int4": Format(4, False, False, 64, 128, False),
    "int4 symmetric": Format(4, False, False, 64, 128, True),
}
MATH = "bfloat16"


def filled(fmt: Format, key: Tensor, value: Tensor) -> tuple[Store, Tensor]:
    """Return a store that has the tokens of ``key`` and ``value``, and its state."""
    tokens = key.shape[2]
    store = allocate(fmt, key, value, tokens)
    coded = naive.append(store, fmt, 0, 0, key, value)
    return store, torch.tensor([tokens, coded, 0], dtype=torch.int32, device=key.device)


def calls_of(fmt: Format, query: Tensor, store: Store, state: Tensor, tokens: int) -> list[Callable[[], Tensor]]:
    """Return attention to a store, and to copies of it that are together larger than the L2 cache."""
    fields = [int(field) for field in fmt]
    copies = [Store(*copy) for copy in benchmark.copies_of(tuple(store))]
    return [partial(_attend, query, state, tokens, fields, copy) for copy in copies]


def _attend(query: Tensor, state: Tensor, tokens: int, fields: list[int], store: Store) -> Tensor:
    return op.kv_attend(query, state, 0, tokens, None, None, SCALE, 0.0, fields, *store).flatten(1)


def reference_of(fmt: Format, query: Tensor, store: Store, state: Tensor, tokens: int) -> Tensor:
    """Return attention in float64 to the numbers that the codes stand for."""
    wide = Store(*store[:6], store.tail_keys.double(), store.tail_values.double())
    return exact(query, *naive.read(wide, fmt, tokens, int(state[1])))


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return attention to each format: programs of a multiprocessor, tiles under way, and registers."""
    return [_tunable(fmt, N, K, dtype) for fmt in FORMATS.values()]


def _tunable(fmt: Format, N: int, K: int, dtype: torch.dtype) -> Tunable:
    from . import launch

    name = launch.name_of(fmt)
    held: dict[int, tuple[Store, Tensor]] = {}

    def store_of(query: Tensor) -> tuple[Store, Tensor]:
        if len(query) not in held:
            held.clear()
            held[len(query)] = filled(fmt, *random_cache(N, K, len(query), dtype))
        return held[len(query)]

    def calls(query: Tensor, config: dict[str, int]) -> list[Callable[[], Tensor]]:
        store, state = store_of(query)
        return [with_config(name, config, call) for call in calls_of(fmt, query, store, state, K)]

    first = launch.SETTINGS[fmt.bits]._asdict()
    others = [
        {"resident": resident, "stages": stages, "registers": registers}
        for resident, registers in ((8, 0), (9, 0), (10, 0), (11, 0), (11, 184), (12, 168)) for stages in (2, 3, 4)
    ]  # fmt: skip
    return Tunable(
        op=name,
        shape=(padded(random_query(N, 1, dtype).shape[3]),) * 2,
        dtype=dtype,
        inputs=lambda rows: random_query(N, rows, dtype),
        calls=calls,
        candidates=lambda rows: [first, *(each for each in others if each != first)],
        reference=lambda query: reference_of(fmt, query, *store_of(query), K),
        any_rows=True,
    )


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return attention to each format, and to a cache in 16 bits (``dense``)."""
    key, value = random_cache(N, K, M, dtype)
    query = random_query(N, M, dtype)
    flops = 4 * M * N * K
    found = []
    for name, fmt in FORMATS.items():
        store, state = filled(fmt, key, value)
        reference = reference_of(fmt, query, store, state, K)
        calls = calls_of(fmt, query, store, state, K)
        found.append(Contender(f"kv_cache {name}", calls, benchmark.bytes_of(store), flops, reference, MATH))
    size, reference = benchmark.bytes_of((key, value)), exact(query, key, value)
    return [*found, Contender("dense", dense_calls(query, key, value), size, flops, reference, MATH, dense=True)]

"""From tensors to launches: how many pieces a quantized cache is cut into."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.compute_type import FP16, FP32, compute_constants
from ..common.launch import is_aligned, launch
from ..decode_attention.launch import combine, early
from .append_kernel import _append_kernel
from .format import Format, Store, padded
from .kernel import _attend_kernel
from .numbers import BITS_ASM, CONVERTING, PLAIN, units


class Setting(NamedTuple):
    """How programs of one warp run.

    Attributes:
        resident: programs that a multiprocessor runs at once, as their registers and shared memory allow.
        stages: tiles whose loads are under way, with the one that is computed.
        registers: most registers of a thread; 0: as many as the compiler takes.
    """

    resident: int
    stages: int = 3
    registers: int = 0


# By bits, the fastest on an H200 over caches of 16 x 32,768 tokens.
SETTINGS = {8: Setting(10), 4: Setting(10)}
# Tokens in full precision that a program reads at once, for heads of 128; the interpreter takes as long for any number.
TAIL, INTERPRETED_TAIL = 16, 128
# The least terms of a sum that a tensor core takes: weights times values are summed over the tokens of a block.
LEAST_TAIL = 16
# Programs that share the tokens in full precision of a key head.
TAILS = 1
# The least tokens of a piece, and the most pieces of a cache, those in full precision included.
LEAST_TOKENS, MOST_PIECES = 256, 256
# What the number of pieces is chosen by, in the time that a program takes for a token: what a program needs besides,
# and what a piece of one key head adds to the sum of pieces (measured on an H200).
STARTUP, SUM = 24.0, 1 / 64


@lru_cache(maxsize=256)
def pieces(pairs: int, tokens: int, slots: int) -> int:
    """Return the pieces to cut ``tokens`` with codes into: rounds of programs that are full, and not many sums.

    Args:
        pairs: batch rows times key heads, each of which has its own programs.
        tokens: that fit into the cache.
        slots: programs that run at once on the device.
    """
    most = max(1, min(tokens // LEAST_TOKENS, MOST_PIECES) - TAILS)

    def time(split: int) -> float:
        rounds = -(-pairs * (split + TAILS) // slots)
        return rounds * (STARTUP + tokens / split) + SUM * pairs * split

    return min(range(1, most + 1), key=time)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _converts(device: torch.device) -> bool:
    """Return True if a device converts float8 numbers itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def tail_block(most: int, dp: int, dvp: int) -> int:
    """Return the tokens in full precision to read at once: of ``most``, as many bytes as with heads of 128."""
    return max(LEAST_TAIL, most * 128 // max(128, dp, dvp))


def name_of(fmt: Format) -> str:
    """Return the name of a format's entries in tuning tables."""
    return f"kv-attention-{'float' if fmt.float8 else 'int'}{fmt.bits}{'' if fmt.symmetric else '-zeros'}"


def setting_of(fmt: Format, dp: int, dvp: int, query: Tensor) -> Setting:
    """Return how programs run: as a tuning table says (``kv-attention-int4 128x128x1``), else as on an H200."""

    def guess(_: int) -> dict[str, int]:
        return SETTINGS[fmt.bits]._asdict()

    return Setting(**tuning.choose(name_of(fmt), (dp, dvp), 1, query.dtype, query.device, guess))


def attend(
    query: Tensor, state: Tensor, new: int, longest: int, store: Store, fmt: Format, mask: Tensor | None,
    sinks: Tensor | None, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Return ``naive.attend`` for the tokens that ``state`` [3] int32 counts plus ``new``; ``longest`` bounds them."""
    B, H, Q, D = query.shape
    G, DV = store.tail_keys.shape[1], store.tail_values.shape[3]
    out = query.new_empty((B, Q, H, DV))
    if out.numel() == 0:
        return out
    group = H // G
    rows = max(8, triton.next_power_of_2(group * Q))
    dp, dvp = padded(D), padded(DV)
    # By the room of the store: only the device knows how many tokens it has.
    tiles = store.key_words.shape[2]
    # A warp has the sums of 8 rows of 128 channels in its registers.
    warps = min(4, max(1, rows * max(dp, dvp) // 1024)) if query.dtype != torch.float32 else 4
    setting = setting_of(fmt, dp, dvp, query)
    resident = max(1, setting.resident // warps)
    # Of several warps, each has a part of the sums, and needs no bound.
    registers = setting.registers if warps == 1 else 0
    split = pieces(B * G, tiles * fmt.tile, resident * _processors(query.device))
    width = triton.cdiv(tiles, split)
    split = triton.cdiv(tiles, width)
    tail = tail_block(TAIL if query.is_cuda else INTERPRETED_TAIL, dp, dvp)
    count = split + TAILS
    size = B * Q * H
    part = torch.empty((count, size, DV), dtype=torch.float32, device=query.device)
    sums = torch.empty((count, size, 2), dtype=torch.float32, device=query.device)
    masks = mask if mask is None or mask.dtype == torch.uint8 else mask.view(torch.uint8)
    m_b, m_n = (0, 0) if masks is None else (masks.stride(0) if masks.shape[0] > 1 else 0, masks.stride(2))
    own = compute_constants(query.dtype, _attend_kernel)
    half = query.dtype != torch.float32
    asm = (CONVERTING.value if _converts(query.device) else BITS_ASM.value) if own["ASM"] else PLAIN.value
    # Sums of many tokens' weights times an offset of 128 would take bits from those of their values.
    signed = fmt.bits == 8 and not fmt.float8
    even, odd = units(fmt.bits, fmt.float8, False, half, asm)
    value_even, value_odd = units(fmt.bits, fmt.float8, signed, half, asm)
    constants = {
        "GROUP": group, "Q": Q, "ROWS": rows, "DP": dp, "DVP": dvp, "SUB": fmt.sub, "PER": fmt.per_word,
        "BITS": fmt.bits, "FLOAT8": fmt.float8, "PER_TOKEN": fmt.per_token, "KGROUP": fmt.group, "STEP": fmt.step,
        "RESIDUAL": fmt.residual, "RING": fmt.ring, "ZEROS": not fmt.symmetric, "TAIL": tail,
        "HAS_MASK": mask is not None, "HAS_SINKS": sinks is not None, "HAS_CAP": bool(softcap),
        "MATH": (FP16 if half else FP32).value, "TAIL_MATH": own["MATH"], "ASM": asm, "EVEN": even, "ODD": odd,
        "VALUE_EVEN": value_even, "VALUE_ODD": value_odd, "SIGNED": signed, "EARLY": early(query),
    }  # fmt: skip
    log2e = math.log2(math.e)
    given = (
        query, state, *store, query if masks is None else masks, query if sinks is None else sinks, part, sums
    )  # fmt: skip
    fixed = (H, G, D, DV)
    strides = query.stride()[:3]
    numbers = (*fixed, longest, tiles, width, split, new, *strides, m_b, m_n)
    key = (
        *(t.dtype for t in given), *(is_aligned(t) for t in given), fixed, strides,
        *constants.values(), warps, setting.stages, registers,
    )  # fmt: skip
    launch(
        _attend_kernel, (count, B * G, 1), (*given, scale * log2e, softcap * log2e, *numbers), constants,
        num_warps=warps, num_stages=setting.stages, key=key, registers=registers,
    )  # fmt: skip
    combine(part, sums, out, size, count, DV)
    return out


def append(store: Store, fmt: Format, state: Tensor, key: Tensor, value: Tensor) -> None:
    """Write the tokens of ``key`` and ``value`` after those that ``state`` [3] int32 counts, and count them."""
    B, G, T, D = key.shape
    DV = value.shape[3]
    if key.numel() == 0:
        return
    constants = {
        "DP": padded(D), "DVP": padded(DV), "SUB": fmt.sub, "PER": fmt.per_word, "BITS": fmt.bits,
        "FLOAT8": fmt.float8, "PER_TOKEN": fmt.per_token, "STEP": fmt.step, "RESIDUAL": fmt.residual,
        "RING": fmt.ring, "ZEROS": not fmt.symmetric,
    }  # fmt: skip
    given = (key, value, state, *store)
    tiles = store.key_words.shape[2]
    strides = (*key.stride()[:3], *value.stride()[:3])
    fixed = (G, D, DV, tiles)
    launch_key = (
        *(t.dtype for t in given), *(is_aligned(t) for t in given), fixed, strides, *constants.values()
    )  # fmt: skip
    launch(
        _append_kernel, (B * G, 1, 1), (*given, *fixed, T, *strides), constants, num_warps=4, num_stages=1,
        key=launch_key,
    )  # fmt: skip

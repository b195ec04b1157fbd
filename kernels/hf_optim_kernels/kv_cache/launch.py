"""From tensors to launches: how many pieces a quantized cache is cut into."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..common.compute_type import FP16, FP32, compute_constants
from ..common.launch import is_aligned, launch
from ..decode_attention.kernel import _combine_kernel
from .format import Format, Store, padded
from .kernel import _append_kernel, _attend_kernel

# Programs per multiprocessor that keep the memory busy.
WAVES = 4
# Warps of a program, and tiles whose loads are under way; fewer for wide heads.
WARPS, STAGES = 4, 3
WIDE_WARPS, WIDE_STAGES = 8, 2
# The longest piece: its mask is read at once.
LONGEST = 2048


def pieces(pairs: int, tiles: int, tile: int, processors: int) -> int:
    """Return the pieces to cut ``tiles`` tiles into, of ``LONGEST`` tokens at most.

    ``pairs`` is the number of batch rows times key heads, each of which has its own programs.
    """
    wanted = -(-WAVES * processors // pairs)
    least = -(-tiles * tile // LONGEST)
    return max(least, min(wanted, tiles, 128))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


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
    rows = max(16, triton.next_power_of_2(group * Q))
    dp, dvp = padded(D), padded(DV)
    # By the room of the store, not by its tokens: a kernel is compiled for a number of pieces.
    tiles = store.key_words.shape[2]
    split = pieces(B * G, tiles, fmt.tile, _processors(query.device))
    width = triton.cdiv(tiles, split)
    split = triton.cdiv(tiles, width)
    size = B * Q * H
    part = torch.empty((split + 1, size, DV), dtype=torch.float32, device=query.device)
    sums = torch.empty((split + 1, size, 2), dtype=torch.float32, device=query.device)
    masks = mask if mask is None or mask.dtype == torch.uint8 else mask.view(torch.uint8)
    m_b, m_n = (0, 0) if masks is None else (masks.stride(0) if masks.shape[0] > 1 else 0, masks.stride(2))
    tail = compute_constants(query.dtype, _attend_kernel)
    math_type = FP32.value if query.dtype == torch.float32 else FP16.value
    constants = {
        "GROUP": group, "Q": Q, "ROWS": rows, "DP": dp, "DVP": dvp, "SUB": fmt.sub, "PER": fmt.per_word,
        "BITS": fmt.bits, "FLOAT8": fmt.float8, "PER_TOKEN": fmt.per_token, "KGROUP": fmt.group, "STEP": fmt.step,
        "RESIDUAL": fmt.residual, "RING": fmt.ring, "ZEROS": not fmt.symmetric,
        "PIECE": triton.next_power_of_2(width * fmt.tile), "SPLIT": split, "HAS_MASK": mask is not None,
        "HAS_SINKS": sinks is not None, "HAS_CAP": bool(softcap), "MATH": math_type, "TAIL_MATH": tail["MATH"],
        "ASM": tail["ASM"],
    }  # fmt: skip
    log2e = math.log2(math.e)
    given = (
        query, state, *store, query if masks is None else masks, query if sinks is None else sinks, part, sums
    )  # fmt: skip
    fixed = (H, G, D, DV)
    strides = query.stride()[:3]
    numbers = (*fixed, longest, tiles, width, new, *strides, m_b, m_n)
    wide = max(dp, dvp) > 128
    warps, stages = (WIDE_WARPS, WIDE_STAGES) if wide else (WARPS, STAGES)
    key = (
        *(t.dtype for t in given), *(is_aligned(t) for t in given), fixed, tiles, width, strides,
        *constants.values(), warps, stages,
    )  # fmt: skip
    launch(
        _attend_kernel, (split + 1, B * G, 1), (*given, scale * log2e, softcap * log2e, *numbers), constants,
        num_warps=warps, num_stages=stages, key=key,
    )  # fmt: skip
    splits = triton.next_power_of_2(split + 1)
    block_dv = max(16, triton.next_power_of_2(DV))
    combine = {"SPLITS": splits, "STEP": min(splits, max(1, 4096 // block_dv)), "BLOCK_DV": block_dv}
    launch(
        _combine_kernel, (size, 1, 1), (part, sums, out, size, split + 1, DV), combine, num_warps=4, num_stages=2,
        key=(out.dtype, is_aligned(out), size, split, DV, *combine.values()),
    )  # fmt: skip
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
        _append_kernel, (B * G, 1, 1), (*given, *fixed, T, *strides), constants, num_warps=WARPS, num_stages=1,
        key=launch_key,
    )  # fmt: skip

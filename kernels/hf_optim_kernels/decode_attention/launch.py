"""From tensors to launches: how many pieces a cache is cut into."""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from .kernel import _attend_kernel, _combine_kernel

# Programs per multiprocessor that keep the memory busy.
WAVES = 4
# Positions of a step, warps, and steps whose loads are under way.
BLOCK, WARPS, STAGES = 32, 4, 3
# The longest piece: its mask is read at once.
LONGEST = 2048


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def pieces(pairs: int, positions: int, block: int, processors: int) -> int:
    """Return the pieces to cut a cache of ``positions`` into: a multiple of ``block`` each, ``LONGEST`` at most.

    ``pairs`` is the number of batch rows times key heads, each of which has its own programs.
    """
    most = -(-positions // block)
    wanted = -(-WAVES * processors // pairs)
    least = -(-positions // LONGEST)
    return max(least, min(wanted, most, 128))


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Return ``naive.decode_attention``; the last dimension of every tensor is contiguous."""
    B, H, Q, D = query.shape
    G, N, DV = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((B, Q, H, DV))
    if out.numel() == 0:
        return out
    group = H // G
    rows = max(16, triton.next_power_of_2(group * Q))
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (D, DV))
    wide = block_d * query.element_size() > 256
    block = 16 if wide else BLOCK
    processors = _processors(query.device.index) if query.is_cuda else 4
    split = pieces(B * G, N, block, processors)
    width = triton.cdiv(triton.cdiv(N, split), block) * block
    split = triton.cdiv(N, width)
    size = B * Q * H
    part = out if split == 1 else torch.empty((split, size, DV), dtype=torch.float32, device=query.device)
    sums = out if split == 1 else torch.empty((split, size, 2), dtype=torch.float32, device=query.device)
    masks = mask if mask is None or mask.dtype == torch.uint8 else mask.view(torch.uint8)
    m_b, m_n = (0, 0) if masks is None else (masks.stride(0) if masks.shape[0] > 1 else 0, masks.stride(2))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], m_b, m_n)
    constants = {
        "GROUP": group, "Q": Q, "ROWS": rows, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": block,
        "PIECE": triton.next_power_of_2(width), "SPLIT": split, "HAS_MASK": mask is not None,
        "HAS_SINKS": sinks is not None, "HAS_CAP": bool(softcap),
        "MATH": compute_constants(query.dtype, _attend_kernel)["MATH"],
    }  # fmt: skip
    log2e = math.log2(math.e)
    given = (query, key, value, query if masks is None else masks, query if sinks is None else sinks, out, part, sums)
    numbers = (H, G, N, D, DV, width, *strides)
    cache_key = (*(t.dtype for t in given), *is_aligned_each(given), numbers, *constants.values(), WARPS, STAGES)
    launch(
        _attend_kernel, (split, B * G, 1), (*given, scale * log2e, softcap * log2e, *numbers), constants,
        num_warps=WARPS, num_stages=STAGES, key=cache_key,
    )  # fmt: skip
    if split > 1:
        combine = {"SPLIT": split, "SPLITS": triton.next_power_of_2(split), "STEP": 16, "BLOCK_DV": block_dv}
        launch(
            _combine_kernel, (size, 1, 1), (part, sums, out, size, DV), combine, num_warps=2, num_stages=2,
            key=(out.dtype, is_aligned(out), size, DV, *combine.values()),
        )  # fmt: skip
    return out


def is_aligned_each(tensors: tuple[Tensor, ...]) -> tuple[bool, ...]:
    """Return ``is_aligned`` of each tensor."""
    return tuple(is_aligned(tensor) for tensor in tensors)

"""Attention that is linear in features: sums over the keys of a row, whole or up to each token.

    out_t = phi(q_t) S_t / phi(q_t) z_t,   S_t = sum over s <= t of w_ts phi(k_s) v_s^T,   z_t = sum of w_ts phi(k_s)
    w_ts = exp(level_t - level_s)

A level that falls along the row is a gate, or the scale that sums are kept at. In chunks, in one step at a time and in
pieces with a state between them this computes the same; no pair of tokens is formed outside of a chunk, and nothing of
a token enters what comes before it.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 128  # tokens whose pairs are formed
NEVER = 1e30  # above any level: of sums that hold no token yet


def causal_sums(
    query: Tensor, key: Tensor, value: Tensor, level: Tensor | None, before: Tensor | None, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``phi(q_t) S_t`` for each token, and the sums after the last one.

    Args:
        query: features ``[R, H, P, M]``.
        key: features ``[R, G, P, M]``; those of padding are zero. Query head h reads key head ``h // (H / G)``.
        value: ``[R, G, P, D]``; with a last column of ones the denominator is the last of the results.
        level: float64 ``[R, G, P]``, not rising along P; that of padding is the level before it. None: zero.
        before: float64 ``[R, G]``: the level at which ``sums`` are given, not below those of ``level``.
        sums: ``[R, G, M, D]`` of the tokens before; None: there are none.

    Returns:
        ``[R, H, P, D]``, and ``[R, G, M, D]`` at the last level.
    """
    rows, heads, length, _ = query.shape
    groups, width = key.shape[1], value.shape[-1]
    size = min(CHUNK, length)
    count = -(-length // size)
    query = _in_chunks(query, size).view(rows, groups, heads // groups, count, size, -1).transpose(2, 3)
    query = query.reshape(rows, groups, count, heads // groups * size, -1)
    key, value = _in_chunks(key, size), _in_chunks(value, size)
    pairs = (query @ key.mT).unflatten(3, (-1, size))
    later = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
    if level is None:
        pairs, kept = pairs.masked_fill(later, 0), None
        into = key
    else:
        level = _in_chunks(level[..., None], size, repeat=True)[..., 0]  # [R, G, N, C]
        own = (level - level[..., :1]).to(key.dtype)
        differences = own[..., :, None] - own[..., None, :]
        pairs = pairs * differences.masked_fill(later, -torch.inf).exp()[:, :, :, None]
        into = key * (own[..., -1:] - own).exp()[..., None]
        begin = level[..., 0, 0] if before is None else before
        ends = torch.cat([begin[..., None], level[..., -1]], 2)
        kept = ends.diff(dim=2).exp().to(key.dtype)[..., None, None]  # [R, G, N, 1, 1]
    out = pairs.flatten(3, 4) @ value  # [R, G, N, (H / G) C, D]
    added = into.mT @ value  # [R, G, N, M, D]
    if sums is None:
        sums = torch.zeros_like(added[:, :, 0])
    earlier = []
    for chunk in range(count):
        earlier.append(sums)
        sums = added[:, :, chunk] + (sums if kept is None else sums * kept[:, :, chunk])
    carried = query @ torch.stack(earlier, 2)
    if level is not None:
        since = (level - ends[..., :-1, None]).exp().to(key.dtype)
        carried = (carried.unflatten(3, (-1, size)) * since[..., None, :, None]).flatten(3, 4)
    out = (out + carried).view(rows, groups, count, heads // groups, size, width).transpose(2, 3)
    return out.reshape(rows, heads, count * size, width)[:, :, :length], sums


def whole_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return ``phi(q_t) S`` with the sums over all keys of the row; arguments and result as in ``causal_sums``."""
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    sums = key.mT @ value
    out = query.reshape(rows, groups, heads // groups * length, -1) @ sums
    return out.reshape(rows, heads, length, -1)


def with_ones(value: Tensor) -> Tensor:
    """Return ``[..., D]`` as ``[..., D + 1]`` with a last column of ones."""
    return functional.pad(value, (0, 1), value=1.0)


def computed_in(part: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(part.dtype, torch.float32)


def levels_in(part: Tensor) -> torch.dtype:
    """Return the dtype of levels, float64 where the device has it: over a long row they become large."""
    return torch.float32 if part.device.type == "mps" else torch.float64


def _in_chunks(part: Tensor, size: int, repeat: bool = False) -> Tensor:
    """Return ``[R, G, P, D]`` as ``[R, G, N, size, D]``, ended with zeros, or with its last entry if ``repeat``."""
    missing = -part.shape[2] % size
    if missing and repeat:
        part = torch.cat([part, part[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    elif missing:
        part = functional.pad(part, (0, 0, 0, missing))
    return part.unflatten(2, (-1, size))

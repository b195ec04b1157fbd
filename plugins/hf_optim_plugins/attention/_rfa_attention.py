"""Random feature attention: softmax attention of unit vectors estimated by sines and cosines, in linear time.

    phi(x) = [sin(W x'), cos(W x')] / sqrt(m),   x' = (sigma / tau) x / (|x| + 0.001),   W ~ N(0, 1)
    out_t = phi(q_t) S_t / max(phi(q_t) z_t, floor w_t)
    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T,   z_t and w_t as S_t, of phi(k_t) and of 1; without a gate both are 1

phi(q) . phi(k) estimates exp(-|q' - k'|^2 / 2), the softmax kernel of unit vectors, and may be negative, so the
denominator, the mean estimate times the weight w_t of the tokens, is kept above a share of w_t.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._linear_kernel import TrigSums, trig_by_kernel
from ._linear_scan import causal_sums, computed_in, levels_in, whole_sums, with_ones

LEAST_NORM = 1e-3  # added to norms
PIECE = 4096  # tokens whose features are held at a time


def rfa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    scale: Tensor,
    causal: bool,
    floor: float,
    log_gate: Tensor | None = None,
    valid: Tensor | None = None,
    state: TrigSums | None = None,
    keeps: bool = True,
) -> tuple[Tensor, TrigSums | None]:
    """Compute attention by random Fourier features.

    Args:
        query: ``[R, H, P, D]``.
        key, value: ``[R, G, P, D]``.
        weight: W, ``[G, M, D]``.
        scale: sigma / tau, ``[G, D]``.
        causal: a token sees itself and those before it.
        floor: of the denominator, as a share of the weight of the tokens.
        log_gate: logarithm of g, below 0, ``[R, G, P]``; None without a gate. For causal models.
        valid: bool ``[R, P]``, False for padding, which is behind the tokens; None if there is none.
        state: of the tokens before, in a causal model; None if there are none.
        keeps: True if the state after these tokens is wanted.

    Returns:
        ``[R, H, P, D]`` in the dtype of ``value``, zero at padding; and the state after the last token, None unless
        causal and wanted. Sums are float32, or float64 for float64.
    """
    dtype = computed_in(query)
    groups = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        gate = None if log_gate is None else log_gate.to(dtype)
        totals, total = weights_of_tokens(key, causal, gate, valid, None if state is None else state.total)
        keeps = keeps and causal
        made = trig_by_kernel(
            query, key, value, weight, scale, causal, floor, LEAST_NORM, gate, valid, (totals, total), state, keeps
        )
        if made is not None:
            return made
        wide = scale.to(dtype)[:, None]
        queries = (_unit(query.to(dtype)).unflatten(1, (groups, -1)) * wide[:, None]).flatten(1, 2)
        keys, values = _unit(key.to(dtype)) * wide, with_ones(value).to(dtype)
        sums = None
        if state is not None:
            sums = torch.cat([state.sums, state.features[..., None]], -1).to(dtype)
        compute = _causal if causal else _of_whole_rows
        out, sums = compute(queries, keys, values, weight.to(dtype), gate, valid, sums)
        least = floor * totals.to(dtype).repeat_interleave(query.shape[1] // groups, 1)[..., None]
        out, below = out[..., :-1], torch.maximum(out[..., -1:], least)
        if valid is not None:
            padding = ~valid[:, None, :, None]
            out, below = out.masked_fill(padding, 0), below.masked_fill(padding, 1)
        out = (out / below).to(value.dtype)
    if not keeps or sums is None:
        return out, None
    return out, TrigSums(sums[..., :-1].contiguous(), sums[..., -1].contiguous(), total)


def _unit(part: Tensor) -> Tensor:
    """Return vectors over their norms plus ``LEAST_NORM``."""
    # A norm whose gradient at zero is zero.
    squares = part.square().sum(-1, keepdim=True)
    norm = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return part / (norm + LEAST_NORM)


def weights_of_tokens(
    key: Tensor, causal: bool, gate: Tensor | None, valid: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the weight of the tokens that each query sees, ``[R, G, P or 1]``, and ``[R, G]`` after the last one."""
    dtype = levels_in(key)
    if causal and gate is None and valid is None:
        count = torch.arange(1, key.shape[2] + 1, dtype=dtype, device=key.device).expand(*key.shape[:2], -1)
        totals = count if before is None else before[..., None] + count
        return totals, totals[..., -1]
    seen = torch.ones_like(key[..., 0], dtype=dtype)
    if valid is not None:
        seen = seen * valid[:, None]
    if not causal:
        totals = seen.sum(2, keepdim=True)
    elif gate is None:
        totals = seen.cumsum(2) if before is None else before[..., None] + seen.cumsum(2)
    else:
        # One minus the product of gates: 1 - g of a token, and what it leaves of the others.
        left = (gate.to(dtype) * seen).cumsum(2).exp()
        totals = 1 - (left if before is None else (1 - before[..., None]) * left)
    return totals, totals[..., -1]


def _causal(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, gate: Tensor | None, valid: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out = []
    for begin in range(0, key.shape[2], PIECE):
        q, k, v = (part[:, :, begin : begin + PIECE] for part in (query, key, value))
        phi, queries = _features(k, weight), _features(q.unflatten(1, (len(weight), -1)), weight[:, None]).flatten(1, 2)
        seen = None if valid is None else valid[:, None, begin : begin + PIECE]
        if seen is not None:
            phi = phi.masked_fill(~seen[..., None], 0)
        level = start = None
        if gate is not None:
            own = gate[:, :, begin : begin + PIECE]
            phi = phi * (-own.expm1())[..., None]
            level = (own if seen is None else own.masked_fill(~seen, 0)).to(levels_in(key)).cumsum(2)
            start = torch.zeros_like(level[..., 0])
        made, sums = causal_sums(queries, phi, v, level, start, sums)
        out.append(made)
    return torch.cat(out, 2), sums


def _of_whole_rows(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, gate: Tensor | None, valid: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    phi = _features(key, weight)
    if valid is not None:
        phi = phi.masked_fill(~valid[:, None, :, None], 0)
    queries = _features(query.unflatten(1, (len(weight), -1)), weight[:, None]).flatten(1, 2)
    return whole_sums(queries, phi, value), None


def _features(part: Tensor, weight: Tensor) -> Tensor:
    """Return ``[..., N, 2 M]`` of ``[..., N, D]`` and W ``[..., M, D]``."""
    angles = part @ weight.mT
    return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(weight.shape[-2])

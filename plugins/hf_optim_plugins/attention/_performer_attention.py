"""FAVOR+: softmax attention estimated by positive orthogonal random features, in linear time.

    phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m),   x' = sqrt(scale) x,   E[phi(q) . phi(k)] = exp(scale q . k)

Factors that all features of a query, or all keys of a row, have in common cancel in the quotient, so each is computed
relative to a maximum: for a query that of its features, for keys in a causal model the highest feature of the keys up
to each token, which the state of decoding is rescaled to when it grows. Nothing is added to a denominator: a query
whose features and those of all its keys are more than e^147 apart, as with logits of thousands, gets NaN in float32.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._linear_kernel import PositiveSums, positive_by_kernel
from ._linear_scan import NEVER, causal_sums, computed_in, levels_in, whole_sums, with_ones

# Maxima are at 2^43, not at 1: products of a query's and a key's features, which may peak at different ones, then reach
# e^147 below the highest of them before they vanish in float32, and sums of 10^12 features do not overflow.
RAISED = 2.0**43
PIECE = 4096  # tokens whose features are held at a time
RELU_OFFSET = 1e-3  # added to features of the ReLU kernel, so that no denominator is zero
AUTHORS_EPSILON = 1e-4


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    scale: float,
    causal: bool,
    kernel: str = "softmax",
    valid: Tensor | None = None,
    state: PositiveSums | None = None,
    keeps: bool = True,
) -> tuple[Tensor, PositiveSums | None]:
    """Compute attention by random features.

    Args:
        query: ``[R, H, P, D]``.
        key, value: ``[R, G, P, D]``.
        weight: W, ``[G, M, D]``.
        scale: of the scores, above 0.
        causal: a token sees itself and those before it.
        kernel: ``softmax``; ``relu`` for features ``max(W x', 0) + 0.001``; ``softmax_authors`` for the published code,
            with 0.0001 added to each feature and one maximum over all keys, which is not for causal models.
        valid: bool ``[R, P]``, False for padding, which is behind the tokens; None if there is none.
        state: of the tokens before, in a causal model; None if there are none.
        keeps: True if the state after these tokens is wanted.

    Returns:
        ``[R, H, P, D]`` in the dtype of ``value``, zero at padding; and the state after the last token, None unless
        causal and wanted. Sums are float32, or float64 for float64.
    """
    keeps = keeps and causal
    if kernel == "softmax":
        made = positive_by_kernel(query, key, value, weight, scale, causal, valid, state, keeps)
        if made is not None:
            return made
    dtype = computed_in(query)
    with torch.autocast(query.device.type, enabled=False):
        root = math.sqrt(scale)
        parts = (query.to(dtype) * root, key.to(dtype) * root, with_ones(value.to(dtype)))
        if causal:
            out, state = _causal(*parts, weight.to(dtype), kernel, valid, state)
        else:
            out = _of_whole_rows(*parts, weight.to(dtype), kernel, valid)
        out, below = out[..., :-1], out[..., -1:]
        if valid is not None:
            padding = ~valid[:, None, :, None]
            out, below = out.masked_fill(padding, 0), below.masked_fill(padding, 1)
        out = out / below
    return out.to(value.dtype), state if keeps else None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, kernel: str, valid: Tensor | None,
    state: PositiveSums | None,
) -> tuple[Tensor, PositiveSums]:  # fmt: skip
    rows, groups = key.shape[:2]
    if state is None:
        sums = key.new_zeros(rows, groups, weight.shape[1], value.shape[-1])
        highest = torch.full((rows, groups), -NEVER, dtype=levels_in(key), device=key.device)
    else:
        sums = torch.cat([state.state, state.sums[..., None]], -1).to(key.dtype) * RAISED
        highest = state.reference.to(levels_in(key)).clamp_min(-NEVER)
    out = []
    for begin in range(0, key.shape[2], PIECE):
        q, k, v = (part[:, :, begin : begin + PIECE] for part in (query, key, value))
        seen = None if valid is None else valid[:, None, begin : begin + PIECE]
        if kernel == "relu":
            phi = _relu(k, weight)
            if seen is not None:
                phi = phi.masked_fill(~seen[..., None], 0)
            made, sums = causal_sums(_of_query(q, weight, _relu), phi, v, None, None, sums)
        else:
            logs = _key_logs(k, weight, seen)
            tops = logs.detach().amax(-1).clamp_min(-NEVER).to(highest)
            tops = torch.cat([highest[..., None], tops], 2).cummax(2).values[..., 1:]
            phi = (logs - tops.to(logs)[..., None]).exp() * RAISED
            made, sums = causal_sums(_of_query(q, weight, _softmax_query), phi, v, -tops, -highest, sums)
            highest = tops[..., -1]
        out.append(made)
    last = highest.masked_fill(highest == -NEVER, -torch.inf).to(key.dtype)
    kept = sums / RAISED
    return torch.cat(out, 2), PositiveSums(kept[..., :-1].contiguous(), kept[..., -1].contiguous(), last)


def _of_whole_rows(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, kernel: str, valid: Tensor | None
) -> Tensor:
    seen = None if valid is None else valid[:, None]
    if kernel == "relu":
        phi, queries = _relu(key, weight), _of_query(query, weight, _relu)
    elif kernel == "softmax_authors":
        dashes = key @ weight.mT
        shown = dashes.detach() if seen is None else dashes.detach().masked_fill(~seen[..., None], -torch.inf)
        tops = shown.amax((-1, -2), keepdim=True).clamp_min(-NEVER)
        phi = (dashes - key.square().sum(-1, keepdim=True) / 2 - tops).exp() + AUTHORS_EPSILON
        queries = _of_query(query, weight, _authors_query)
    else:
        logs = _key_logs(key, weight, seen)
        tops = logs.detach().amax(2, keepdim=True).clamp_min(-NEVER)  # of each feature: queries are relative to these
        phi = (logs - tops).exp()
        queries = _of_query(query, weight, _softmax_query, tops)
    if seen is not None:
        phi = phi.masked_fill(~seen[..., None], 0)
    return whole_sums(queries, phi, value)


def _of_query(query: Tensor, weight: Tensor, features: Callable[..., Tensor], *more: Tensor) -> Tensor:
    """Return features ``[R, H, P, M]``: heads of a group have the weight of their key head."""
    grouped = query.unflatten(1, (weight.shape[0], -1))
    return features(grouped, weight[:, None], *(part[:, :, None] for part in more)).flatten(1, 2)


def _softmax_query(query: Tensor, weight: Tensor, tops: Tensor | None = None) -> Tensor:
    logs = query @ weight.mT  # |x|^2 / 2 is common to the features of a query
    if tops is not None:
        return (logs + tops - (logs + tops).detach().amax(-1, keepdim=True)).exp()
    return (logs - logs.detach().amax(-1, keepdim=True)).exp() * RAISED


def _authors_query(query: Tensor, weight: Tensor) -> Tensor:
    logs = query @ weight.mT
    half = query.square().sum(-1, keepdim=True) / 2
    return (logs - half - logs.detach().amax(-1, keepdim=True)).exp() + AUTHORS_EPSILON


def _key_logs(key: Tensor, weight: Tensor, seen: Tensor | None) -> Tensor:
    """Return logarithms of features ``[R, G, P, M]``, -inf where ``seen``, bool ``[R, 1, P]``, is False."""
    logs = key @ weight.mT - key.square().sum(-1, keepdim=True) / 2
    return logs if seen is None else logs.masked_fill(~seen[..., None], -torch.inf)


def _relu(part: Tensor, weight: Tensor) -> Tensor:
    return (part @ weight.mT).relu() + RELU_OFFSET

"""The specification: attention whose weights are products of features of queries and keys, in PyTorch.

The weight of key j for query i is ``phi(q_i) . phi(k_j)``, of features that replace the softmax:

- ``positive`` (FAVOR+, Choromanski et al. 2021, arXiv:2009.14794, lemma 1): ``phi(x) = exp(W y - |y|^2 / 2)``,
- ``trig`` (random Fourier features; RFA, Peng et al. 2021, arXiv:2103.02143, equation 4): ``phi(x) = [sin(W y),
  cos(W y)] / sqrt(m)``,

of ``y = sqrt(scale) x``, or with ``eps`` of ``y = sqrt(scale) x / (|x| + eps)``. Sums over keys are a state of fixed
size: ``S = sum_j phi(k_j) v_j^T`` and ``z = sum_j phi(k_j)``; out is ``phi(q)^T S / phi(q)^T z``. Positive features are
computed relative to the largest of their row, and a state relative to ``exp(reference)``, which cancel in the quotient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

POSITIVE, TRIG = "positive", "trig"
KINDS = (POSITIVE, TRIG)
# Of positive features: a denominator below this, relative to the largest weight of a key, is that of a query that sees
# nothing. Its features and those of all its keys are further apart than float32 reaches.
LEAST = 2.0**-100


class State(NamedTuple):
    """What was seen of keys and values. The sums are ``exp(reference)`` times these; float32 (or float64).

    Attributes:
        state: ``[B, P, F, Dv]``: ``sum_j phi(k_j) v_j^T``, of F features: m of kind positive, 2 m of kind trig.
        sums: ``[B, P, F]``: ``sum_j phi(k_j)``.
        reference: ``[B, P]``; ``-inf`` before the first key of kind positive, 0 always for kind trig.
    """

    state: Tensor
    sums: Tensor
    reference: Tensor


class Settings(NamedTuple):
    """How features are made and combined.

    Attributes:
        kind: ``positive`` or ``trig``.
        scale: ``phi(q) . phi(k)`` estimates ``exp(scale q . k)`` (positive), or ``exp(-scale |q - k|^2 / 2)`` (trig).
        causal: query i sees keys up to i.
        floor: denominators of kind trig below it are replaced by it: features that may be negative can cancel.
        eps: vectors are divided by their norm plus this before; negative: they are not.
    """

    kind: str
    scale: float
    causal: bool = True
    floor: float = LEAST
    eps: float = -1.0


def state_heads(H: int, G: int, L: int) -> int:
    """Return the heads of a state: those of the keys, or those of the queries if each has features of its own."""
    return H if L == H else G


def empty_state(query: Tensor, value: Tensor, key_heads: int, weight: Tensor, kind: str) -> State:
    """Return the state before the first token, for tensors as of ``linear_attention``."""
    P = state_heads(query.shape[1], key_heads, weight.shape[0])
    size, wide = (query.shape[0], P, weight.shape[1] * (1 + (kind == TRIG))), _wide(query)
    device = query.device
    start = 0.0 if kind == TRIG else float("-inf")
    return State(
        torch.zeros((*size, value.shape[3]), dtype=wide, device=device),
        torch.zeros(size, dtype=wide, device=device),
        torch.full(size[:2], start, dtype=wide, device=device),
    )


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    settings: Settings,
    mask: Tensor | None = None,
    log_gate: Tensor | None = None,
    state: State | None = None,
    amounts: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Return linear attention and the state after the last key. Sums are float32, or float64 if the query is.

    Query head ``h`` reads state head ``h // (H // P)``, state head ``p`` key head ``p // (P // G)``.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]`` and ``[B, G, M, Dv]``, with H a multiple of G; causal needs N = M.
        weight: ``[L, m, D]``: the rows of W for all heads (L = 1), each key head (L = G) or each query head (L = H,
            with P = H heads of the state; else P = G).
        mask: bool ``[B, M]``: False for keys that are padding, which leave the state as it is.
        log_gate: ``[B, P, M]``, at most 0: the logarithm of ``g`` in ``S_j = g_j S_{j-1} + (1 - g_j) phi(k_j) v_j^T``
            and in the same for z (Peng et al. 2021, equation 7). Causal only.
        state: what was seen before the first key.
        amounts: ``[B, P, N]``: what the floor of denominators of kind trig is multiplied with for each query.
        columns: ``[L, D]``: what the columns of W are multiplied with; kind trig.

    Returns:
        out ``[B, H, N, Dv]`` in the dtype of the query, zeros for a query that sees nothing; and the state.
    """
    parts = _parts(query, key, value, with_columns(weight, columns), settings, mask, log_gate, state)
    numerator, denominator = _quotient(parts, state)
    if settings.kind == TRIG:
        out = numerator / torch.maximum(denominator, least_of(denominator, settings, amounts))[..., None]
    else:
        some = denominator > LEAST
        out = torch.where(some[..., None], numerator / torch.where(some, denominator, 1.0)[..., None], 0.0)
    return out.to(query.dtype), _after(parts, state, settings)


def with_columns(weight: Tensor, columns: Tensor | None) -> Tensor:
    """Return W with its columns multiplied, in float32 or wider."""
    return weight if columns is None else weight * columns.to(torch.promote_types(weight.dtype, torch.float32))[:, None]


def least_of(denominator: Tensor, settings: Settings, amounts: Tensor | None) -> Tensor:
    """Return the smallest denominators of kind trig, as ``[B, H, N]``."""
    least = torch.full_like(denominator, settings.floor)
    if amounts is None:
        return least
    return least * amounts.to(least).repeat_interleave(denominator.shape[1] // amounts.shape[1], 1)


def replaced(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, mask: Tensor | None,
    log_gate: Tensor | None, state: State | None, amounts: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return 1 where the denominator of a query of kind trig is the smallest one, else 0: ``[B, H, N]``."""
    parts = _parts(query, key, value, weight, settings, mask, log_gate, state)
    _, denominator = _quotient(parts, state)
    return (denominator <= least_of(denominator, settings, amounts)).to(denominator.dtype)


def _quotient(parts: _Parts, state: State | None) -> tuple[Tensor, Tensor]:
    """Return the sums of values ``[B, H, N, Dv]`` and of weights ``[B, H, N]`` of each query."""
    numerator = parts.weights @ parts.values
    denominator = parts.weights.sum(-1)
    if state is not None:
        numerator = numerator + parts.before[..., None] * (parts.queries @ parts.repeat(state.state))
        denominator = denominator + parts.before * (parts.queries * parts.repeat(state.sums)[:, :, None]).sum(-1)
    return numerator, denominator


def gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    settings: Settings,
    mask: Tensor | None = None,
    log_gate: Tensor | None = None,
    state: State | None = None,
    amounts: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key, value, gate and columns for that of out; W, the given state and the amounts
    are constants.

    With ``A`` the weights over the denominator and ``E = A (dO V^T - rowsum(dO O))``: ``dV = A^T dO``, and E is the
    gradient of the logarithm of each weight.
    """
    parts = _parts(query, key, value, with_columns(weight, columns), settings, mask, log_gate, state)
    wide = parts.weights.dtype
    slope = grad_out.to(wide)
    numerator, total = _quotient(parts, state)
    held = held_sums = None
    if state is not None:
        held, held_sums = parts.repeat(state.state), parts.repeat(state.sums)
    trig = settings.kind == TRIG
    least = least_of(total, settings, amounts) if trig else torch.full_like(total, LEAST)
    free = total > least
    below = torch.where(free, total, least if trig else float("inf"))
    inverse = 1.0 / below
    out = numerator * inverse[..., None]
    delta = (slope * out).sum(-1) * free
    inner = (slope @ parts.values.mT - delta[..., None]) * inverse[..., None]  # the gradient of each weight
    scaled = inner * parts.factors
    grad_queries = scaled @ parts.keys
    grad_keys = scaled.mT @ parts.queries
    past = torch.zeros_like(total)
    if held is not None and held_sums is not None:
        given = (slope @ held.mT - delta[..., None] * held_sums[:, :, None]) * (inverse * parts.before)[..., None]
        grad_queries = grad_queries + given
        past = (given * parts.queries).sum(-1)
    grad_value = (parts.weights * inverse[..., None]).mT @ slope
    grad_gate = None
    if log_gate is not None:
        pairs = inner * parts.weights  # E
        # E of the pairs j < t <= i, and of those with j = t through 1 - g.
        by_query, by_key = pairs.sum(-1) + past, pairs.sum(-2)
        flow = (by_query - by_key).flip(-1).cumsum(-1).flip(-1)
        gate = parts.repeat(log_gate.to(wide))
        each = flow - by_key * torch.exp(gate) / -torch.expm1(gate)
        if mask is not None:
            each = each.masked_fill(~mask[:, None], 0.0)
        grad_gate = _summed(each, log_gate.shape[1]).to(log_gate.dtype)
    shape = query.shape[1] // key.shape[1]
    rows_of_keys = key.to(wide).repeat_interleave(shape, 1)
    grad_query = _through(grad_queries, query.to(wide), parts.queries, parts.rows, settings)
    grad_key = _through(grad_keys, rows_of_keys, parts.keys, parts.rows, settings)
    grad_key, grad_value = (_summed(each, key.shape[1]) for each in (grad_key, grad_value))
    grad_columns = None
    if columns is not None:
        logs = _along(grad_queries, query.to(wide), parts.queries, parts.rows, settings)
        logs = logs + _along(grad_keys, rows_of_keys, parts.keys, parts.rows, settings)
        grad_columns = of_columns(logs.unflatten(0, (len(columns), -1)).sum(1), columns)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_gate, grad_columns


def of_columns(logs: Tensor, columns: Tensor) -> Tensor:
    """Return the gradient of columns for that of their logarithms; 0 for columns that are 0, which have none."""
    wide = columns.to(logs)
    return torch.where(wide == 0, 0.0, logs / torch.where(wide == 0, 1.0, wide)).to(columns.dtype)


def step(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, log_gate: Tensor | None,
    state: State, amounts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the output of one token ``[B, H, 1, Dv]``, and bring ``state`` up to date in place."""
    out, after = linear_attention(query, key, value, weight, settings, None, log_gate, state, amounts)
    for held, new in zip(state, after, strict=True):
        held.copy_(new)
    return out


class _Parts(NamedTuple):
    """Features relative to the largest of their rows, by query head, and the weights that they make.

    Attributes:
        queries, keys: ``[B, H, N or M, F]``.
        values: ``[B, H, M, Dv]``.
        rows: ``[H, m, D]``: W.
        factors: ``[B, H, N or 1, M]``: what a product of features is multiplied with; 0 where nothing is seen.
        weights: ``[B, H, N, M]``: the products times the factors.
        before: ``[B, H, N]``: what products with the given state are multiplied with.
        logs: ``[B, H, M]``: logarithms of the weights of keys in the state after the last.
        decay: ``[B, H]``: the logarithm of what the given state is multiplied with until then.
        heads: of the state.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    factors: Tensor
    weights: Tensor
    before: Tensor
    logs: Tensor
    decay: Tensor
    heads: int

    def repeat(self, tensor: Tensor) -> Tensor:
        """Return a tensor ``[B, P, ...]`` by query head."""
        return tensor.to(self.weights.dtype).repeat_interleave(self.queries.shape[1] // self.heads, 1)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, mask: Tensor | None,
    log_gate: Tensor | None, state: State | None,
) -> _Parts:  # fmt: skip
    wide, (B, H, N, _), (G, M) = _wide(query), query.shape, key.shape[1:3]
    P = state_heads(H, G, weight.shape[0])
    keys, values = (each.to(wide).repeat_interleave(H // G, 1) for each in (key, value))
    rows = weight.to(wide).expand(P, -1, -1) if weight.shape[0] == 1 else weight.to(wide)
    rows = rows.repeat_interleave(H // P, 0)
    queries, _ = features(query.to(wide), rows, settings)
    keys, logs = features(keys, rows, settings)
    decays = logs.new_zeros(B, H, M)
    if log_gate is not None:
        gate = log_gate.to(wide).repeat_interleave(H // P, 1)
        logs = logs + torch.log(-torch.expm1(gate))
        decays = gate if mask is None else gate.masked_fill(~mask[:, None], 0.0)
    if mask is not None:
        logs = logs.masked_fill(~mask[:, None], float("-inf"))
    cumulated = decays.cumsum(-1)
    inside = logs[:, :, None]  # logarithms of factors
    reference = logs.new_zeros(B, H) if state is None else state.reference.to(wide).repeat_interleave(H // P, 1)
    past = reference[..., None]
    if state is None:
        past = torch.full_like(past, float("-inf"))
    if settings.causal:
        inside = inside - cumulated[:, :, None] + cumulated[..., None]
        future = torch.ones(N, M, dtype=torch.bool, device=query.device).triu(1)
        inside = inside.masked_fill(future, float("-inf"))
        past = past + cumulated
    if settings.kind == POSITIVE:
        top = torch.maximum(inside.amax(-1), past) if M else past
        top = top.masked_fill(top == float("-inf"), 0.0)
        inside, past = inside - top[..., None], past - top
    factors = inside.exp()
    total = cumulated[..., -1] if M else logs.new_zeros(B, H)
    return _Parts(
        queries, keys, values, rows, factors, (queries @ keys.mT) * factors, past.exp().expand(B, H, N),
        logs + total[..., None] - cumulated, total, P,
    )  # fmt: skip


def features(x: Tensor, rows: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the features ``[B, H, N, F]`` of ``x`` ``[B, H, N, D]``, and ``[B, H, N]`` the logarithms taken out."""
    y = _normalized(x, settings)
    products = y @ rows.mT
    if settings.kind == TRIG:
        return torch.cat([products.sin(), products.cos()], -1) / math.sqrt(rows.shape[1]), products.new_zeros(
            y.shape[:3]
        )
    exponents = products - y.square().sum(-1, keepdim=True) / 2
    top = exponents.amax(-1, keepdim=True)
    return (exponents - top).exp(), top[..., 0]


def _normalized(x: Tensor, settings: Settings) -> Tensor:
    y = x * math.sqrt(settings.scale)
    return y if settings.eps < 0 else y / (x.norm(dim=-1, keepdim=True) + settings.eps)


def _through(slope: Tensor, x: Tensor, features: Tensor, rows: Tensor, settings: Settings) -> Tensor:
    """Return the gradient of ``x`` for that of its features (their logarithms taken out being a constant)."""
    y, root = _normalized(x, settings), math.sqrt(settings.scale)
    if settings.kind == TRIG:
        grad_y = _of_angles(slope, features) @ rows
    else:
        inner = slope * features
        grad_y = inner @ rows - y * inner.sum(-1, keepdim=True)
    if settings.eps < 0:
        return grad_y * root
    norm = x.norm(dim=-1, keepdim=True)
    along = (x * grad_y).sum(-1, keepdim=True) / torch.where(norm > 0, norm, 1.0) / (norm + settings.eps)
    return root * (grad_y - x * along) / (norm + settings.eps)


def _of_angles(slope: Tensor, features: Tensor) -> Tensor:
    (sin, cos), (by_sin, by_cos) = features.chunk(2, -1), slope.chunk(2, -1)
    return by_sin * cos - by_cos * sin


def _along(slope: Tensor, x: Tensor, features: Tensor, rows: Tensor, settings: Settings) -> Tensor:
    """Return the gradient of the logarithm of what each column of W is multiplied with, ``[H, D]``; kind trig."""
    return (_normalized(x, settings) * (_of_angles(slope, features) @ rows)).sum((0, 2))


def _after(parts: _Parts, state: State | None, settings: Settings) -> State:
    """Return the state after the last key: of the first query head of each state head, which all have the same."""
    group = parts.queries.shape[1] // parts.heads
    logs, keys, values, decay = (each[:, ::group] for each in (parts.logs, parts.keys, parts.values, parts.decay))
    past = torch.full_like(decay, float("-inf")) if state is None else state.reference.to(decay.dtype) + decay
    reference = torch.zeros_like(decay)
    if settings.kind == POSITIVE:
        reference = torch.maximum(past, logs.amax(-1)) if logs.shape[-1] else past
    base = reference.masked_fill(reference == float("-inf"), 0.0)
    weighted = keys * (logs - base[..., None]).exp()[..., None]
    sums, held = weighted.sum(-2), weighted.mT @ values
    if state is not None:
        shrink = (past - base).exp()
        held = held + shrink[..., None, None] * state.state
        sums = sums + shrink[..., None] * state.sums
    return State(held, sums, reference)


def _summed(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(1, (heads, -1)).sum(2)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""The specification of the experts' operators in plain PyTorch.

A *pair* is a token and one of the k experts that it chose. Pairs are numbered ``t * k + j``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOBODY = -1
SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(5)
"""Activations that kernels compute."""
UNGATED, CONCATENATED, INTERLEAVED = range(3)
"""Columns of the first matrix: no gate; all of the gate, then all of up; gate and up in turn."""


class Gate(NamedTuple):
    """What is between the two matrices of an expert, for columns ``gate`` and ``up``::

        act(min(gate, limit)) * (clamp(up, -limit, limit) + offset)

    or ``act(up)`` without a gate.

    Attributes:
        layout: ``UNGATED``, ``CONCATENATED`` or ``INTERLEAVED``.
        act: one of the activations above; SILU is ``x * sigmoid(alpha * x)``.
        alpha, offset, limit: numbers; limit is infinite for no bound.
    """

    layout: int = CONCATENATED
    act: int = SILU
    alpha: float = 1.0
    offset: float = 0.0
    limit: float = math.inf


def activate(x: Tensor, act: int, alpha: float = 1.0) -> Tensor:
    """Return an activation of ``x``."""
    if act == SILU:
        return x * torch.sigmoid(alpha * x)
    if act == RELU_SQUARED:
        return F.relu(x).square()
    if act == RELU:
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if act == GELU_TANH else "none")


def apply_gate(rows: Tensor, gate: Gate) -> Tensor:
    """Return the input ``[..., I]`` of the second matrix for the output ``[..., 2 I]`` (``[..., I]``) of the first."""
    if gate.layout == UNGATED:
        return activate(rows, gate.act, gate.alpha)
    first, up = (rows[..., ::2], rows[..., 1::2]) if gate.layout == INTERLEAVED else rows.chunk(2, dim=-1)
    if gate.limit != math.inf:
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    return activate(first, gate.act, gate.alpha) * (up + gate.offset)


class Weights(NamedTuple):
    """The matrices of all experts.

    Attributes:
        up: ``[E, 2 I, d]`` (``[E, I, d]`` without a gate), or with the last two dimensions exchanged.
        down: ``[E, d, I]``, or exchanged.
        up_bias, down_bias: ``[E, 2 I]`` (``[E, I]``) and ``[E, d]``, or None.
        transposed: the last two dimensions of the matrices are exchanged.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    transposed: bool

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return ``up`` and ``down`` as ``[E, out, in]``."""
        return (self.up.transpose(1, 2), self.down.transpose(1, 2)) if self.transposed else (self.up, self.down)


class Route(NamedTuple):
    """The pairs of a mixture layer, sorted by expert and cut into blocks of rows: what a grouped product reads.

    Row i of a grouped product belongs to the pair ``order[i]``, which is token ``order[i] // k``. The rows of expert e
    are ``offsets[e] : offsets[e + 1]``. Pairs whose expert is not one of ``0 .. E - 1`` are computed by none: they
    stand behind ``offsets[E]``, and no block has them.

    The sizes depend on those of the inputs alone, never on what was chosen, so nothing waits for an accelerator, and a
    captured graph may be replayed with other choices: ``blocks`` has as many entries as any choice can need
    (``most_blocks``), and the unused ones stand last.

    Attributes:
        order: int32 ``[T k]``: the numbers of the pairs by expert; those of an expert in ascending order.
        offsets: int32 ``[E + 1]``: where the rows of each expert begin; the last is the number of computed pairs.
        blocks: int32 ``[most_blocks, 2]``: expert and first row of each block of at most ``block`` rows, which ends at
            ``min(first + block, offsets[expert + 1])``. Blocks of an expert follow each other, experts ascend. The
            expert of an unused entry is -1.
    """

    order: Tensor
    offsets: Tensor
    blocks: Tensor


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Return the largest number of blocks that ``pairs`` can need: each expert has one that is not full."""
    return (pairs + min(experts, pairs) * (block - 1)) // block


def block_rows(pairs: int, experts: int) -> int:
    """Return the rows of a block: the power of two from 16 to 128 that the pairs of most experts fit in.

    Choices differ: of a mean of m pairs, m + 2 sqrt(m) hold nearly all experts. Only whole numbers are compared, so
    that ``torch.compile`` needs few guards on the number of tokens.
    """
    return 16 if pairs <= 9 * experts else 32 if pairs <= 22 * experts else 64 if pairs <= 49 * experts else 128


def route(experts: Tensor, count: int, block: int) -> Route:
    """Return the route of pairs to experts.

    Args:
        experts: int64 or int32 ``[T, k]``; numbers outside of ``0 .. count - 1`` stand for "computed by none".
        count: E, the number of experts.
        block: rows of a block.
    """
    flat, device = experts.reshape(-1), experts.device
    numbers = torch.where((flat >= 0) & (flat < count), flat, count)
    order = torch.argsort(numbers, stable=True).to(torch.int32)
    each = torch.zeros(count + 1, dtype=torch.int64, device=device)
    each = each.scatter_add(0, numbers.long(), torch.ones_like(numbers, dtype=torch.int64))[:count]
    offsets = torch.cat([each.new_zeros(1), each.cumsum(0)])
    need = (each + block - 1) // block
    ends = need.cumsum(0)
    number = torch.arange(most_blocks(len(flat), count, block), device=device)
    expert = torch.searchsorted(ends, number, right=True)
    used = expert < count
    own = expert.clamp(max=count - 1)
    first = offsets[own] + (number - ends[own] + need[own]) * block
    blocks = torch.stack([torch.where(used, expert, NOBODY), torch.where(used, first, 0)], dim=1)
    return Route(order, offsets.to(torch.int32), blocks.to(torch.int32))


def mixture(hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate) -> Tensor:
    """Return ``y[t] = sum over j of weights[t, j] * down(gate(up(hidden[t])))``, by expert ``experts[t, j]``.

    Sums are float32 (float64 for float64), and the result ``[T, d]`` is rounded once, to the dtype of ``hidden``.

    Args:
        hidden: ``[T, d]``.
        experts: int64 or int32 ``[T, k]``; pairs of a number outside of ``0 .. E - 1`` count as zero.
        weights: ``[T, k]``, floating point.
        given, gate: the experts.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    up, down = given.matrices
    x, out = hidden.to(compute), hidden.new_zeros(hidden.shape, dtype=compute)
    for expert in range(len(up)):
        token, choice = torch.where(experts == expert)
        up_bias, down_bias = (None if b is None else b[expert].to(compute) for b in (given.up_bias, given.down_bias))
        inner = apply_gate(F.linear(x[token], up[expert].to(compute), up_bias), gate)
        rows = F.linear(inner, down[expert].to(compute), down_bias)
        out = out.index_add(0, token, rows * weights[token, choice].to(compute)[:, None])
    return out.to(hidden.dtype)


def rows_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, found: Route, top_k: int, by_pair: bool, block: int
) -> Tensor:  # fmt: skip
    """Return each row of a route times the matrix of its expert; rows that no expert computes are undefined.

    Args:
        x: ``[T, in]``: row i is that of token ``order[i] // top_k``. With ``top_k`` 0, ``[T k, in]`` in route order.
        weight: ``[E, out, in]``, of the dtype of ``x``, with any strides.
        bias: ``[E, out]``, or None.
        found: the route, with blocks of ``block`` rows.
        by_pair: return the rows in the order of pairs, not in that of the route.

    Returns:
        ``[T k, out]``, of the dtype of ``x``.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    order, offsets = found.order.long(), found.offsets.tolist()
    rows = (x[order // top_k] if top_k else x).to(compute)
    out = x.new_zeros(len(order), weight.shape[1])
    for expert in range(weight.shape[0]):
        begin, end = offsets[expert : expert + 2]
        own = F.linear(rows[begin:end], weight[expert].to(compute), None if bias is None else bias[expert].to(compute))
        at = order[begin:end] if by_pair else torch.arange(begin, end, device=order.device)
        out = out.index_copy(0, at, own.to(x.dtype))
    return out


def combine(rows: Tensor, experts: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``sum over j of weights[t, j] * rows[t k + j]``, over pairs with an expert below ``count``: ``[T, d]``.

    Args:
        rows: ``[T k, d]`` in the order of pairs.
        experts, weights: ``[T, k]``.
        dtype: of the result. Sums are float32 (float64 for float64).
    """
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    known = ((experts >= 0) & (experts < count))[..., None]
    each = rows.view(*experts.shape, -1).to(compute) * weights[..., None].to(compute)
    return torch.where(known, each, 0).sum(1).to(dtype)

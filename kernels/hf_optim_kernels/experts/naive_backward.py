"""The specification of the gradients of a mixture layer in plain PyTorch.

With ``h = up(x[t])``, ``a = gate(h)`` and ``u = W_down^T dy[t]`` of a pair of token t and expert e with weight w::

    dw = u . a + dy[t] . b_down                dh = w * u * gate'(h)
    dx[t] = sum over the pairs of t of  W_up^T dh
    dW_down = sum over the pairs of e of  w * dy[t] a^T,  db_down the same of  w * dy[t]
    dW_up = sum over the pairs of e of  dh x[t]^T,        db_up the same of  dh

So the output of an expert is not needed, and ``h`` alone is kept from the forward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .naive import GELU, GELU_TANH, INTERLEAVED, RELU, RELU_SQUARED, UNGATED, Gate, Route, Weights, activate, apply_gate


class Needs(NamedTuple):
    """Which gradients are asked for; the matrices of frozen experts have none."""

    hidden: bool = True
    weights: bool = True
    up: bool = True
    down: bool = True
    up_bias: bool = True
    down_bias: bool = True


class Gradients(NamedTuple):
    """Gradients of the inputs of ``naive.mixture``, each of its shape and dtype; None where none is asked for."""

    hidden: Tensor | None
    weights: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def slope(x: Tensor, act: int, alpha: float = 1.0) -> Tensor:
    """Return the derivative of ``naive.activate``; of RELU at 0 it is 0, as PyTorch's."""
    if act == RELU:
        return (x > 0).to(x.dtype)
    if act == RELU_SQUARED:
        return 2 * F.relu(x)
    if act == GELU:
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if act == GELU_TANH:
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)
    s = torch.sigmoid(alpha * x)
    return s * (1 + alpha * x * (1 - s))


def gate_gradient(rows: Tensor, grad: Tensor, gate: Gate) -> Tensor:
    """Return the gradient ``[..., 2 I]`` (``[..., I]``) of the input of ``naive.apply_gate`` for that of its output."""
    if gate.layout == UNGATED:
        return grad * slope(rows, gate.act, gate.alpha)
    first, up = (rows[..., ::2], rows[..., 1::2]) if gate.layout == INTERLEAVED else rows.chunk(2, dim=-1)
    kept, bounded = ~(first > gate.limit), ~(up.abs() > gate.limit)  # NaN stays NaN
    first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    d_first = torch.where(kept, grad * (up + gate.offset) * slope(first, gate.act, gate.alpha), 0)
    d_up = torch.where(bounded, grad * activate(first, gate.act, gate.alpha), 0)
    if gate.layout == INTERLEAVED:
        return torch.stack([d_first, d_up], dim=-1).flatten(-2)
    return torch.cat([d_first, d_up], dim=-1)


def gradients(
    grad: Tensor, hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate, inner: Tensor,
    found: Route, needs: Needs,
) -> Gradients:  # fmt: skip
    """Return the gradients of ``naive.mixture``. Sums are float32 (float64 for float64).

    Args:
        grad: ``[T, d]``, of the output.
        hidden, experts, weights, given, gate: as of ``naive.mixture``.
        inner: ``[T k, 2 I]`` (``[T k, I]``), the output of the first matrices in the order of the route.
        found: the route.
        needs: which gradients are returned.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    (up, down), top_k = given.matrices, experts.shape[1]
    x, dy = hidden.to(compute), grad.to(compute)
    flat = weights.reshape(-1).to(compute)
    dx, dw = torch.zeros_like(x), torch.zeros_like(flat)
    d_up, d_down = (torch.zeros(m.shape, dtype=compute, device=m.device) for m in (up, down))
    b_up, b_down = (torch.zeros(m.shape[:2], dtype=compute, device=m.device) for m in (up, down))
    stops = found.offsets.tolist()
    for expert in range(len(up)):
        begin, end = stops[expert : expert + 2]
        pairs = found.order[begin:end].long()
        tokens, share = pairs // top_k, flat[pairs][:, None]
        h = inner[begin:end].to(compute)
        a, u = apply_gate(h, gate), dy[tokens] @ down[expert].to(compute)
        own = (u * a).sum(1)
        if given.down_bias is not None:
            own = own + dy[tokens] @ given.down_bias[expert].to(compute)
        dw[pairs] = own
        dh = gate_gradient(h, share * u, gate)
        dx.index_add_(0, tokens, dh @ up[expert].to(compute))
        d_up[expert], b_up[expert] = dh.T @ x[tokens], dh.sum(0)
        d_down[expert], b_down[expert] = (share * dy[tokens]).T @ a, (share * dy[tokens]).sum(0)
    if given.transposed:
        d_up, d_down = d_up.transpose(1, 2), d_down.transpose(1, 2)
    found_all = (dx, dw.view(weights.shape), d_up, d_down, b_up, b_down)
    like = (hidden, weights, given.up, given.down, given.up_bias, given.down_bias)
    return Gradients(*(
        value.to(of.dtype).contiguous() if wanted and of is not None else None
        for value, of, wanted in zip(found_all, like, needs, strict=True)
    ))  # fmt: skip

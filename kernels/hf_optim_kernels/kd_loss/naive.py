"""The specification of the distillation loss in plain PyTorch, per row of logits ``[rows, classes]``.

With ``p = softmax(z_t / T)`` and ``q = softmax(z_s / T)``::

    forward   D = Σ p (log p - log q)                              dD/du = q - p
    reverse   D = Σ q (log q - log p)                              dD/du = q (log q - log p - D)
    js        D = β Σ p (log p - log m) + (1-β) K                  dD/du = (1-β) q (log q - log m - K)
              m = β p + (1-β) q,  K = Σ q (log q - log m)

where ``u = z_s / T``; a class of probability zero contributes nothing. The loss of a row is ``T² D``, and its gradient
with respect to ``z_s`` is ``T dD/du``. Forward is 1503.02531 section 2, reverse 2306.08543, js 2306.13649 equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIRECTIONS = ("forward", "reverse", "js")


def losses(
    student: Tensor, teacher: Tensor, kept: Tensor | None, temperature: float, direction: str, beta: float
) -> Tensor:
    """Return ``T² D`` of every row.

    Args:
        student, teacher: logits ``[rows, classes]``; computed in float32, or float64 if the student is.
        kept: bool ``[rows]``, False for rows whose loss is set to 0; None keeps all.

    Returns:
        ``[rows]``, float32 or float64.
    """
    found = temperature**2 * _parts(student, teacher, temperature, direction, beta)[0]
    return found if kept is None else found.where(kept, 0.0)


def gradient(
    student: Tensor, teacher: Tensor, kept: Tensor | None, upstream: Tensor, temperature: float, direction: str,
    beta: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of ``(upstream * losses).sum()`` with respect to ``student``: its shape and dtype.

    Args:
        upstream: ``[rows]``.
    """
    _, slope = _parts(student, teacher, temperature, direction, beta)
    found = slope * (temperature * upstream.to(slope.dtype))[:, None]
    return (found if kept is None else found.where(kept[:, None], 0.0)).to(student.dtype)


def _parts(student: Tensor, teacher: Tensor, temperature: float, direction: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return ``D`` [rows] and ``dD/du`` [rows, classes]."""
    working = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_q = (student.to(working) / temperature).log_softmax(-1)
    log_p = (teacher.to(working) / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if direction == "forward":
        return _expected(p, log_p, log_q).sum(-1), q - p
    if direction == "reverse":
        inside = _expected(q, log_q, log_p)
        total = inside.sum(-1)
        return total, inside - q * total[:, None]
    if direction != "js":
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")
    log_m = (beta * p + (1 - beta) * q).log()
    inside = _expected(q, log_q, log_m)
    total = inside.sum(-1)
    loss = beta * _expected(p, log_p, log_m).sum(-1) + (1 - beta) * total
    return loss, (1 - beta) * (inside - q * total[:, None])


def _expected(weight: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return ``weight (one - other)``, 0 where the weight is 0."""
    return torch.where(weight > 0, weight * (one - other), 0.0)

"""The distillation loss of hidden states and heads: the logits of a few tokens exist at a time, never all of them.

``z_s = h_s W_sᵀ`` and ``z_t = h_t W_tᵀ``; the loss is that of ``op.kd_loss``. The gradients of ``h_s`` and ``W_s`` are
computed in the forward, chunk by chunk, so that two chunks of logits are all the additional memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import op

# Logits of a chunk, of teacher and student each: 2^27 bfloat16 are 256 MB.
CHUNK_ELEMENTS = 2**27


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    rows: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return ``T²·D``, the mean over tokens: a float32 scalar, once differentiable in the student's arguments.

    Args:
        student_hidden: ``[..., student width]``.
        student_head: ``[classes, student width]``, of the dtype of the hidden states.
        teacher_hidden: ``[..., teacher width]``, with the same number of tokens.
        teacher_head: ``[classes, teacher width]``.
        temperature, direction, beta: as ``op.kd_loss``.
        rows: int64 ``[n]``, distinct: the tokens that count; None takes all.
        chunk_elements: size of a chunk's logits. The head's gradient is summed over chunks in the head's dtype.

    Raises ``ValueError`` if tokens or classes of student and teacher differ in number.
    """
    ours, theirs = (hidden.reshape(-1, hidden.shape[-1]) for hidden in (student_hidden, teacher_hidden))
    if ours.shape[0] != theirs.shape[0] or student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"{ours.shape[0]} tokens of {student_head.shape[0]} classes (student) and {theirs.shape[0]} of "
            f"{teacher_head.shape[0]} (teacher) cannot be compared"
        )
    chunk = max(1, chunk_elements // student_head.shape[0])
    return _Fused.apply(
        ours, student_head, theirs.detach(), teacher_head.detach(), rows, (temperature, direction, beta), chunk
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        rows: Tensor | None,
        settings: tuple[float, str, float],
        chunk: int,
    ) -> Tensor:
        count = hidden.shape[0] if rows is None else rows.numel()
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, count, chunk):
            here: Any = slice(start, min(start + chunk, count))
            here = here if rows is None else rows[here]
            h = hidden[here]
            student, teacher = h @ head.T, teacher_hidden[here] @ teacher_head.T
            losses, statistics = op.kd_rows(student, teacher, None, *settings, False)
            total += losses.sum()
            if grad_hidden is None and grad_head is None:
                continue
            slope = _slope(student, teacher, statistics, settings)
            if grad_hidden is not None:
                grad_hidden[here] = slope @ head
            if grad_head is not None:
                grad_head.addmm_(slope.T, h)
        # The factor of the mean is applied last: in float16 the gradient of one logit would underflow with it.
        ctx.share = 1.0 / max(count, 1)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total / max(count, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        found = [None if g is None else g * (upstream[0] * ctx.share).to(g.dtype) for g in ctx.saved_tensors]
        return *found, *[None] * 5


def _slope(student: Tensor, teacher: Tensor, statistics: Tensor, settings: tuple[float, str, float]) -> Tensor:
    """Return the gradient of the sum of a chunk's losses, in the memory of the teacher's logits if dtypes agree."""
    upstream = torch.ones(len(student), dtype=torch.float32, device=student.device)
    if teacher.dtype != student.dtype:
        return op.kd_gradient(student, teacher, None, statistics, upstream, *settings)
    op.kd_gradient_(teacher, student, None, statistics, upstream, *settings)
    return teacher

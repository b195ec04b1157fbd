"""The operator ``torch.ops.hf_optim.kd_rows``: the distillation loss of every row of logits (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the interpreted kernels). The forward reads both logits once (``js``: twice) and keeps three
numbers per row; the backward reads them again and writes the gradient, in the student's dtype, scaled by the upstream
gradient. With ``overwrite_teacher`` it is written into the teacher's memory: no further tensor has the size of the
logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive


def on_triton(logits: Tensor) -> bool:
    """Return True if the kernels run for these logits: on a CUDA device or interpreted, and not in float64."""
    return logits.dtype != torch.float64 and can_run_triton(logits)


@torch.library.custom_op("hf_optim::kd_rows", mutates_args=())
def kd_rows(
    student: Tensor, teacher: Tensor, kept: Tensor | None, temperature: float, direction: str, beta: float,
    overwrite_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``T² D`` of every row, and statistics for the gradient.

    Args:
        student: logits ``[rows, classes]`` with a gradient.
        teacher: the same shape, any floating dtype; gets no gradient.
        kept: bool ``[rows]``: rows that count; the others have loss 0 and no gradient. None keeps all.
        temperature, direction, beta: as in ``naive``.
        overwrite_teacher: the backward writes the gradient over the teacher's logits (of the student's dtype). A second
            backward through the same loss is then an error.

    Returns:
        losses ``[rows]`` and statistics ``[rows, 3]``, float32 (float64 if the student is).
    """
    if on_triton(student):
        from .launch import losses

        return losses(student, teacher, kept, temperature, direction, beta)
    found = naive.losses(student, teacher, kept, temperature, direction, beta)
    return found, found.new_zeros(len(found), 3)


@kd_rows.register_fake
def _(student, teacher, kept, temperature, direction, beta, overwrite_teacher) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[0], dtype=dtype), student.new_empty(student.shape[0], 3, dtype=dtype)


@torch.library.custom_op("hf_optim::kd_gradient", mutates_args=())
def kd_gradient(
    student: Tensor, teacher: Tensor, kept: Tensor | None, statistics: Tensor, upstream: Tensor, temperature: float,
    direction: str, beta: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of ``(upstream * losses).sum()`` with respect to ``student``, in its shape and dtype."""
    if on_triton(student):
        from .launch import gradient

        out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        gradient(student, teacher, kept, statistics, upstream, out, temperature, direction, beta)
        return out
    return naive.gradient(student, teacher, kept, upstream, temperature, direction, beta)


@kd_gradient.register_fake
def _(student, teacher, kept, statistics, upstream, temperature, direction, beta) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.custom_op("hf_optim::kd_gradient_", mutates_args=("teacher",))
def kd_gradient_(
    teacher: Tensor, student: Tensor, kept: Tensor | None, statistics: Tensor, upstream: Tensor, temperature: float,
    direction: str, beta: float,
) -> None:  # fmt: skip
    """Write the result of ``kd_gradient`` over the teacher's logits."""
    if on_triton(student):
        from .launch import gradient

        gradient(student, teacher, kept, statistics, upstream, teacher, temperature, direction, beta)
    else:
        teacher.copy_(naive.gradient(student, teacher, kept, upstream, temperature, direction, beta))


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, kept, *ctx.settings, ctx.overwrite = inputs
    ctx.has_kept = kept is not None
    ctx.save_for_backward(student, teacher, output[1], *([kept] if ctx.has_kept else []))
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream: Tensor, _):
    student, teacher, statistics, *kept = ctx.saved_tensors
    mask = kept[0] if ctx.has_kept else None
    if ctx.overwrite:
        kd_gradient_(teacher, student, mask, statistics, upstream.contiguous(), *ctx.settings)
        gradient = teacher
    else:
        gradient = kd_gradient(student, teacher, mask, statistics, upstream.contiguous(), *ctx.settings)
    return gradient, *[None] * 6


kd_rows.register_autograd(_backward, setup_context=_setup_context)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    rows: Tensor | None = None,
    overwrite_teacher: bool = False,
) -> Tensor:
    """Return ``T²·D``, the mean over rows: a float32 scalar (float64 if the student is), 0 without rows.

    Args:
        student, teacher: logits ``[..., classes]`` of one shape on one device; rows that are not contiguous are copied.
        temperature: ``T > 0``.
        direction, beta: see ``naive``.
        rows: int64 ``[n]``, distinct: the rows of ``student.view(-1, classes)`` that count, which are not gathered;
            None takes all.
        overwrite_teacher: True if the teacher's logits are not needed afterwards: the gradient overwrites them if dtype
            and layout allow it.

    Raises ``ValueError`` if the shapes differ, or the direction is unknown.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")
    if direction not in naive.DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(naive.DIRECTIONS)}, not {direction!r}")
    ours, theirs = (_flat(logits) for logits in (student, teacher.detach()))
    kept, count = None, ours.shape[0]
    if rows is not None:
        count = rows.numel()
        kept = torch.zeros(ours.shape[0], dtype=torch.bool, device=ours.device)
        kept[rows] = True
    fits = theirs.dtype == ours.dtype and theirs.is_contiguous() and not torch.compiler.is_compiling()
    losses, _ = kd_rows(ours, theirs, kept, temperature, direction, beta, overwrite_teacher and fits)
    return losses.sum() / max(count, 1)


def _flat(logits: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()

"""Distillation losses over logits, computed a few rows at a time.

With teacher logits ``z_t``, student logits ``z_s`` and a temperature ``T``, let ``p = softmax(z_t/T)`` and
``q = softmax(z_s/T)``. The losses are ``T²·D(p, q)``, averaged over rows (tokens, or sequences of a classifier), with

- ``forward``: ``KL(p ‖ q)``, of Hinton et al. (1503.02531, section 2);
- ``reverse``: ``KL(q ‖ p)``, of MiniLLM (2306.08543);
- ``js``: ``β KL(p ‖ m) + (1-β) KL(q ‖ m)`` with ``m = β p + (1-β) q``, of GKD (2306.13649, equation 1).

``T²`` keeps the gradient's size when ``T`` changes; for ``T → ∞`` the forward loss goes to half the mean square
difference of centred logits, ``mean((z_s - z̄_s - z_t + z̄_t)²) / 2`` (1503.02531, section 2.1).

Two heads of sequence classifiers have no distribution over classes (``head_kind``). With ``n`` outputs, and averaged over
rows as well:

- ``regression``: ``Σ_i (z_s,i - z_t,i)² / n``, the mean squared error that such a model is trained with; a temperature
  has no place in it;
- ``labels``, each of which holds or does not: ``T² Σ_i D(p_i, q_i) / n`` with ``p_i = (σ(z_t,i/T), 1 - σ(z_t,i/T))``
  and ``q_i`` likewise: ``D`` between two outcomes, for every label alone.

Two softmaxes over ``[rows, vocabulary]`` would be several times as large as the logits. Here rows go through in chunks,
and each chunk's gradient is taken at once, so that what stands is one tensor of the size of the student's logits: their
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Direction = Literal["forward", "reverse", "js"]
Rest = Literal["bucket", "renormalize"]
Head = Literal["classes", "regression", "labels"]
DIRECTIONS = ("forward", "reverse", "js")
RESTS = ("bucket", "renormalize")
# Heads that transformers trains by the `problem_type` of their configuration.
SEQUENCE_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification")

# Elements of one chunk of rows: 32 MB in float32, of which a handful of copies exist for a moment.
CHUNK_ELEMENTS = 2**23


class TopK(NamedTuple):
    """The ``k`` most probable classes of each row of a teacher, at one temperature.

    Attributes:
        indices: int32 ``[rows, k]``, the classes.
        log_probs: float ``[rows, k]``, their log-probabilities at the temperature, over *all* classes.
        rest: float ``[rows]``, the log of the probability of all other classes together (-inf when there are none).
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor


def divergence(teacher: Tensor, student: Tensor, direction: Direction = "forward", beta: float = 0.5) -> Tensor:
    """``D(p, q)`` of each row.

    Args:
        teacher, student: log-probabilities ``[rows, classes]``; a class may have -inf.
        direction: ``forward``, ``reverse`` or ``js``.
        beta: of ``js``, in (0, 1).

    Returns:
        ``[rows]``, in nats.
    """
    if direction == "forward":
        return _kl(teacher, student)
    if direction == "reverse":
        return _kl(student, teacher)
    if direction != "js":
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}")
    # A class that neither has would make the gradient of logaddexp NaN.
    teacher, student = (logs.clamp_min(torch.finfo(logs.dtype).min / 4) for logs in (teacher, student))
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log(1.0 - beta))
    return beta * _kl(teacher, middle) + (1.0 - beta) * _kl(student, middle)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 log(0/x) = 0: a class of probability zero adds nothing, to the loss as to the gradient.
    weight = p.exp()
    absent = weight == 0
    return (weight * (p.masked_fill(absent, 0.0) - q.masked_fill(absent, 0.0))).sum(-1)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    rows: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """``T²·D(softmax(teacher/T), softmax(student/T))``, the mean over rows. No gradient goes to the teacher.

    Args:
        student, teacher: logits ``[..., classes]`` of one shape, any floating dtype and any devices; computed in
            float32, or float64 if the student is.
        temperature: ``T > 0``.
        direction, beta: which ``D``; see ``divergence``.
        rows: int64 ``[n]``, the rows of ``student.view(-1, classes)`` that count (``scored_rows``); None takes all.
        chunk_elements: size of the chunks; the result does not depend on it but for rounding.

    Returns:
        A scalar (zero without rows), in float32 or float64.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")
    classes = student.shape[-1]

    def per_row(part: Tensor, target: Tensor) -> Tensor:
        p = F.log_softmax(target.to(part.dtype) / temperature, -1)
        return temperature**2 * divergence(p, F.log_softmax(part / temperature, -1), direction, beta)

    targets = (teacher.reshape(-1, classes),)
    return _mean_over_rows(student.reshape(-1, classes), per_row, rows, targets, chunk_elements, rows)


def head_kind(model: Any) -> Head:
    """What the logits of a model are of: ``classes`` of which one is right, a ``regression``, or single ``labels``.

    The last two only for classifiers of whole sequences (or images), whose configuration says so: by ``num_labels`` of
    1, or by ``problem_type``. transformers sets a ``problem_type`` that is None at the first batch that has labels.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    if not any(name.endswith(SEQUENCE_CLASSIFIERS) for name in names):
        return "classes"
    if model.config.problem_type == "multi_label_classification":
        return "labels"
    return "regression" if model.config.problem_type == "regression" or model.config.num_labels == 1 else "classes"


def head_loss(
    head: Head,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    rows: Tensor | None = None,
) -> Tensor:
    """The loss of a head (see above), the mean over rows. No gradient goes to the teacher.

    Args:
        head: ``classes`` (``kd_loss``), ``labels``, or ``regression``, to which temperature and direction mean nothing.
        others: as ``kd_loss``; the logits are ``[..., n]``.

    Returns:
        A scalar (zero without rows), in float32 or float64.
    """
    if head == "classes":
        return kd_loss(student, teacher, temperature=temperature, direction=direction, beta=beta, rows=rows)
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")

    def squared_error(part: Tensor, target: Tensor) -> Tensor:
        return (part - target.to(part.dtype)).square().mean(-1)

    def of_labels(part: Tensor, target: Tensor) -> Tensor:
        p, q = (_outcomes(logits / temperature) for logits in (target.to(part.dtype), part))
        return temperature**2 * divergence(p, q, direction, beta).mean(-1)

    ours, theirs = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
    per_row = squared_error if head == "regression" else of_labels
    return _mean_over_rows(ours, per_row, rows, (theirs,), CHUNK_ELEMENTS, rows)


def _outcomes(logits: Tensor) -> Tensor:
    """Log-probabilities ``[..., 2]`` that a label holds and that it does not."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)


def top_k(teacher: Tensor, k: int, temperature: float = 1.0, *, chunk_elements: int = CHUNK_ELEMENTS) -> TopK:
    """The ``k`` most probable classes of logits ``[rows, classes]``, in float32 (or float64), without gradient."""
    k = min(k, teacher.shape[-1])
    found = []
    for part in teacher.detach().split(max(1, chunk_elements // teacher.shape[-1])):
        logs = F.log_softmax(part.to(_working_dtype(part)) / temperature, -1)
        values, indices = logs.topk(k, -1)
        rest = logs.scatter(-1, indices, -torch.inf).logsumexp(-1)
        found.append((indices.to(torch.int32), values, rest))
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def top_k_kd_loss(
    student: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    rest: Rest = "bucket",
    rows: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """``kd_loss`` against a teacher of whom only the ``k`` most probable classes are known.

    What happens to the other classes, ``rest``:

    - ``bucket``: they count as one class with the sum of their probabilities, for teacher and student alike. The loss
      is then at most ``kd_loss``, and equal to it for ``k = classes``; the student's mass outside is held at the
      teacher's.
    - ``renormalize``: both distributions are conditioned on the ``k`` classes; the student's mass outside is left
      alone.

    Args:
        student: logits ``[..., classes]``.
        teacher: one row for each of ``rows``, in their order; made at the same ``temperature``.
        others: as ``kd_loss``.
    """
    classes = student.shape[-1]

    def per_row(part: Tensor, indices: Tensor, log_probs: Tensor, outside: Tensor) -> Tensor:
        logits, indices, p = part / temperature, indices.long(), log_probs.to(part.dtype)
        inside = logits.gather(-1, indices)
        if indices.shape[-1] == classes or rest == "renormalize":
            return temperature**2 * divergence(p.log_softmax(-1), inside.log_softmax(-1), direction, beta)
        others = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        q = torch.cat([inside, others], -1).log_softmax(-1)
        p = torch.cat([p, outside.to(p.dtype).unsqueeze(-1)], -1)
        return temperature**2 * divergence(p, q, direction, beta)

    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(RESTS)}, not {rest!r}")
    return _mean_over_rows(student.reshape(-1, classes), per_row, rows, tuple(teacher), chunk_elements, None)


def scored_rows(logits: Tensor, labels: Tensor | None, mask: Tensor | None = None, *, shift: bool = False) -> Tensor:
    """Which rows of ``logits.view(-1, classes)`` a loss looks at: int64 ``[n]``, on the logits' device.

    Args:
        logits: ``[batch, tokens, classes]``, or ``[batch, classes]``.
        labels: ``[batch, tokens]`` (or ``[batch]``) with -100 where nothing is scored; None scores everything.
        mask: attention mask ``[batch, tokens]``, used where there are no labels.
        shift: True for a causal model, whose logits at ``t`` predict token ``t + 1``.
    """
    shape = logits.shape[:-1]
    if labels is not None and labels.shape == shape:
        wanted = labels != -100
    elif labels is None and mask is not None and mask.shape == shape:
        wanted = mask != 0
    else:
        wanted = torch.ones(shape, dtype=torch.bool, device=logits.device)
    if shift:
        wanted = F.pad(wanted[..., 1:], (0, 1), value=False)
    return wanted.reshape(-1).nonzero().squeeze(-1).to(logits.device)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _mean_over_rows(
    student: Tensor,
    per_row: Callable[..., Tensor],
    rows: Tensor | None,
    teacher: tuple[Tensor, ...],
    chunk_elements: int,
    teacher_rows: Tensor | None,
) -> Tensor:
    count = student.shape[0] if rows is None else rows.numel()
    chunk = max(1, chunk_elements // student.shape[-1])
    return _RowMean.apply(student, per_row, rows, teacher_rows, count, chunk, *teacher)


class _RowMean(torch.autograd.Function):
    """The mean of ``per_row(student[rows], *teacher[rows])``; the gradient is made chunk by chunk in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        per_row: Callable[..., Tensor],
        rows: Tensor | None,
        teacher_rows: Tensor | None,
        count: int,
        chunk: int,
        *teacher: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else None
        total = torch.zeros((), dtype=_working_dtype(student), device=student.device)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            here = part if rows is None else rows[part].to(student.device)
            there = part if teacher_rows is None else teacher_rows[part]
            given = [t[there if isinstance(there, slice) else there.to(t.device)].to(student.device) for t in teacher]
            logits = student[here].to(total.dtype)
            # Under autocast some of these operations would run in half precision.
            with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
                logits.requires_grad_(wanted)
                loss = per_row(logits, *given).sum()
            total += loss.detach()
            if gradient is not None:
                gradient[here] = torch.autograd.grad(loss, logits)[0].to(gradient.dtype)
        ctx.count = count
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return total / max(count, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * (upstream[0] / max(ctx.count, 1)).to(gradient.dtype)
        return scaled, *([None] * (len(ctx.needs_input_grad) - 1))

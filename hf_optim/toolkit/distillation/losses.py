"""Distillation losses over logits, computed a few rows at a time.

With teacher logits ``z_t``, student logits ``z_s`` and a temperature ``T``, let ``p = softmax(z_t/T)`` and
``q = softmax(z_s/T)``. The losses are ``T²·D(p, q)``, averaged over rows (tokens, or sequences of a classifier), with

- ``forward``: ``KL(p ‖ q)``, of Hinton et al. (1503.02531, section 2);
- ``reverse``: ``KL(q ‖ p)``, of MiniLLM (2306.08543);
- ``js``: ``β KL(p ‖ m) + (1-β) KL(q ‖ m)`` with ``m = β p + (1-β) q``, of GKD (2306.13649, equation 1).

``T²`` keeps the magnitude of the gradient when ``T`` changes; for ``T → ∞`` the forward loss converges to half the mean
squared difference of centred logits, ``mean((z_s - z̄_s - z_t + z̄_t)²) / 2`` (1503.02531, section 2.1).

Two heads of sequence classifiers have no distribution over classes (``head_kind``). With ``n`` outputs, also averaged
over rows:

- ``regression``: ``Σ_i (z_s,i - z_t,i)² / n``, the mean squared error of regression training; without a temperature;
- ``labels``, which are independent: ``T² Σ_i D(p_i, q_i) / n`` with ``p_i = (σ(z_t,i/T), 1 - σ(z_t,i/T))`` and ``q_i``
  likewise, that is ``D`` between two outcomes for each label.

Two softmaxes over ``[rows, vocabulary]`` would be several times as large as the logits. Therefore rows are processed in
chunks, and the gradient of each chunk is computed in the forward, so that a single tensor of the size of the student's
logits is kept: their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
ONE_ROW_PER_SEQUENCE = (
    *SEQUENCE_CLASSIFIERS,
    "ForAudioClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)

# Elements of one chunk of rows: 32 MB in float32, of which a handful of copies exist at a time.
CHUNK_ELEMENTS = 2**23


class TopK(NamedTuple):
    """The ``k`` most probable classes of each row of a teacher, at a given temperature.

    Attributes:
        indices: int32 ``[rows, k]``, the classes.
        log_probs: float ``[rows, k]``, their log-probabilities at the temperature, over *all* classes.
        rest: float ``[rows]``, the log of the total probability of all other classes (-inf if there are none).
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor


def divergence(teacher: Tensor, student: Tensor, direction: Direction = "forward", beta: float = 0.5) -> Tensor:
    """Return ``D(p, q)`` of each row.

    Args:
        teacher, student: log-probabilities ``[rows, classes]``; may be -inf.
        direction: ``forward``, ``reverse`` or ``js``.
        beta: ``β`` of ``js``, in (0, 1).

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
    # The gradient of logaddexp is NaN for a class that has probability zero in both.
    teacher, student = (logs.clamp_min(torch.finfo(logs.dtype).min / 4) for logs in (teacher, student))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1.0 - beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 log(0/x) = 0: a class of probability zero contributes neither to the loss nor to the gradient.
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
    """Return ``T²·D(softmax(teacher/T), softmax(student/T))``, averaged over rows, without a gradient for the teacher.

    Args:
        student, teacher: logits ``[..., classes]`` of one shape, any floating dtype and any devices; computed in
            float32, or float64 if the student is.
        temperature: ``T > 0``.
        direction, beta: select ``D``; see ``divergence``.
        rows: int64 ``[n]``, the rows of ``student.view(-1, classes)`` that count (``scored_rows``); None takes all.
        chunk_elements: elements per chunk; affects the result only by rounding.

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
    """Return what the logits predict: one of several ``classes``, a ``regression``, or independent ``labels``.

    The last two occur only for classifiers of whole sequences (or images), with ``num_labels`` 1 or a ``problem_type``
    in their configuration. transformers sets a ``problem_type`` of None at the first batch with labels.
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
    """Return the loss of a head (see above), averaged over rows, without a gradient for the teacher.

    Args:
        head: ``classes`` (``kd_loss``), ``labels``, or ``regression``, which ignores temperature and direction.
        others: as for ``kd_loss``; the logits are ``[..., n]``.

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
    """Return the log-probabilities ``[..., 2]`` that a label is set, and that it is not."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)


def top_k(teacher: Tensor, k: int, temperature: float = 1.0, *, chunk_elements: int = CHUNK_ELEMENTS) -> TopK:
    """Return the ``k`` most probable classes of logits ``[rows, classes]``, in float32 or float64, without gradient."""
    k = min(k, teacher.shape[-1])
    found = []
    for part in teacher.detach().split(max(1, chunk_elements // teacher.shape[-1])):
        logs = F.log_softmax(part.to(_compute_dtype(part)) / temperature, -1)
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
    """Return ``kd_loss`` for a teacher of which only the ``k`` most probable classes are known.

    ``rest`` selects how the other classes are treated:

    - ``bucket``: they count as one class with the sum of their probabilities, for teacher and student alike. The loss
      is then at most ``kd_loss``, and equal to it for ``k = classes``; the student's mass outside the ``k`` classes is
      trained towards the teacher's.
    - ``renormalize``: both distributions are conditioned on the ``k`` classes; the student's mass outside is ignored.

    Args:
        student: logits ``[..., classes]``.
        teacher: one row for each of ``rows``, in their order, computed at the same ``temperature``.
        others: as for ``kd_loss``.
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
    """Return the rows of ``logits.view(-1, classes)`` that a loss is computed on: int64 ``[n]``, on the logits' device.

    Args:
        logits: ``[batch, tokens, classes]``, or ``[batch, classes]``.
        labels: ``[batch, tokens]`` (or ``[batch]``), -100 for tokens that are not scored; None scores all.
        mask: attention mask ``[batch, tokens]``, used if there are no labels.
        shift: True for a causal model, whose logits at ``t`` predict token ``t + 1``.
    """
    everything = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return _scored(everything, labels, mask, shift).reshape(-1).nonzero().squeeze(-1).to(logits.device)


def count_scored_rows(
    model: Any, inputs: Mapping[str, Any], labels: Tensor | None, mask: Tensor | None = None, *, shift: bool = False
) -> Tensor:
    """Return how many rows ``scored_rows`` finds for a batch, as a scalar. It is known before the forward.

    Args:
        model: tells by its class whether there is a row for each token or for each sequence (or image).
        inputs: the batch.
        labels, mask, shift: as for ``scored_rows``.
    """
    everything = all_tokens(inputs, "decoder_" if model.config.is_encoder_decoder else "")
    names = [cls.__name__ for cls in type(model).__mro__]
    if any(name.endswith(ONE_ROW_PER_SEQUENCE) for name in names):
        everything = everything.new_ones(everything.shape[:1])
    return _scored(everything, labels, mask, shift).sum()


def all_tokens(inputs: Mapping[str, Any], prefix: str = "") -> Tensor:
    """Return a mask of ones for the tokens of a batch ``[batch, tokens]``, or for its images ``[batch]``.

    ``prefix`` is ``"decoder_"`` for the tokens that a decoder predicts.
    """
    labels = [inputs["labels"]] if prefix and isinstance(inputs.get("labels"), Tensor) else []
    named = [inputs[name] for name in (f"{prefix}input_ids", "input_ids") if isinstance(inputs.get(name), Tensor)]
    embedded = [inputs[name] for name in (f"{prefix}inputs_embeds", "input_values") if name in inputs]
    for found in (*labels, *named):
        return found.new_ones(found.shape, dtype=torch.bool)
    for found in embedded:
        return found.new_ones(found.shape[:2], dtype=torch.bool)
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    return first.new_ones(first.shape[:1], dtype=torch.bool)


def _scored(everything: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool) -> Tensor:
    """Return which elements of ``everything``, a mask of ones in the shape of the rows, are scored."""
    shape, scored = everything.shape, everything
    if labels is not None and labels.shape == shape:
        scored = labels != -100
    elif labels is None and mask is not None and mask.shape == shape:
        scored = mask != 0
    return F.pad(scored[..., 1:], (0, 1), value=False) if shift else scored


def _compute_dtype(tensor: Tensor) -> torch.dtype:
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
    """The mean of ``per_row(student[rows], *teacher[rows])``; the forward computes the gradient chunk by chunk."""

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
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if needs_gradient else None
        total = torch.zeros((), dtype=_compute_dtype(student), device=student.device)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            index = part if rows is None else rows[part].to(student.device)
            other = part if teacher_rows is None else teacher_rows[part]
            targets = [t[other if isinstance(other, slice) else other.to(t.device)].to(student.device) for t in teacher]
            logits = student[index].to(total.dtype)
            # Under autocast some of these operations would run in half precision.
            with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
                logits.requires_grad_(needs_gradient)
                loss = per_row(logits, *targets).sum()
            total += loss.detach()
            if gradient is not None:
                gradient[index] = torch.autograd.grad(loss, logits)[0].to(gradient.dtype)
        ctx.count = count
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return total / max(count, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * (upstream[0] / max(ctx.count, 1)).to(gradient.dtype)
        return scaled, *([None] * (len(ctx.needs_input_grad) - 1))

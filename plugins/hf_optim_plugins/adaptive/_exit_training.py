"""The losses of a training with exits: aligned over all of them, mixed over sampled ones, and of their classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from hf_optim import ModelError, Run
from hf_optim.toolkit.distillation import teachers
from hf_optim.toolkit.exits import ExitHeads, is_language_model, no_cache, pooled, record_states, run_held

from ._exit_oracles import classifier_loss, log_probabilities, quality, smooth, stacked, targets

BOOKKEEPING = ("num_items_in_batch", "return_loss")


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


def balanced(count: int) -> Any:
    """Return the split that gives each block the mean of the gradients of the exits above it, in place of their sum.

    Of the r exits from number n on, exit n gets 1 / r and what is behind it (r - 1) / r (Li et al., arXiv 1908.06294).
    """

    def split(index: int, states: Tensor) -> tuple[Tensor, Tensor]:
        left = count - index
        if left == 1:
            return states, states
        made: Any = _Scaled.apply
        return made(states, 1 / left), made(states, (left - 1) / left)

    return split


class RecordExits(TrainerCallback):
    """Records the states at the exits while training steps run, in ``step_state.recording``."""

    def __init__(self, step_state: Any, run: Run, split: Any) -> None:
        self._state, self._run, self._split = step_state, run, split

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop_recording(self._state)  # left by a step that failed
        factor = args.label_smoothing_factor
        self._state.smoother = LabelSmoother(epsilon=factor) if factor else None
        recording = record_states(self._run.model, self._split)
        self._state.states = recording.__enter__()
        self._state.recording = recording

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop_recording(self._state)


def stop_recording(step_state: Any) -> None:
    """Remove the hooks of ``RecordExits`` from the model, if there are any."""
    recording = vars(step_state).pop("recording", None)
    for name in ("states", "smoother"):
        vars(step_state).pop(name, None)
    if recording is not None:
        recording.__exit__(None, None, None)


def forward_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a batch as the forward of the exits takes them, without a cache."""
    return {key: value for key, value in inputs.items() if key not in BOOKKEEPING} | no_cache(model)


def early_outputs(exits: ExitHeads, states: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[Any]:
    """Return the outputs of the early exits, with their losses if the batch has labels."""
    given = forward_inputs(exits.model, inputs)
    return [exits.output(index, states[index], **given) for index in range(exits.count - 1)]


def loss_of(output: Any, label: str) -> Tensor:
    """Return the loss in an output. Raises ``ModelError`` if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ModelError(f"{label}: the model returns no loss, which exits are trained on: the data needs labels")
    return loss.mean()


def exit_loss(exits: ExitHeads, output: Any, inputs: Mapping[str, Any], smoother: Any, label: str) -> Tensor:
    """Return the loss of an exit: the model's own, or that of smoothed labels, which the Trainer keeps from the model.

    Raises ``ModelError`` if there is none.
    """
    labels = inputs.get("labels")
    if smoother is None or labels is None:
        return loss_of(output, label)
    return smoother(output, labels, shift_labels=teachers.predicts_next_token(exits.model))


def vector_distance(states: Tensor, last: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``1 - cos`` between the pooled states of an exit and those of the last one."""
    first, second = pooled(states, mask), pooled(last, mask).detach()
    return (1 - functional.cosine_similarity(first, second, dim=-1)).mean()


def mixed_loss(exits: ExitHeads, inputs: Mapping[str, Any], paths: int, label: str, smoother: Any = None) -> Tensor:
    """Return the mean loss of ``paths`` forwards in which each token, or row, stops at an exit drawn uniformly."""
    model, losses = exits.model, []
    for _ in range(paths):
        drawn: list[Tensor] = []

        def decide(index: int, hidden: Tensor, drawn: list[Tensor] = drawn) -> Tensor:
            if not drawn:
                rows, tokens = hidden.shape[:2]
                shape = (rows, tokens if is_language_model(model) else 1)
                drawn.append(torch.randint(exits.count, shape, device=hidden.device).expand(rows, tokens))
            return drawn[0] == index

        output = run_held(model, decide, **forward_inputs(model, inputs)).output
        losses.append(exit_loss(exits, output, inputs, smoother, label))
    return torch.stack(losses).mean()


def exit_targets(
    exits: ExitHeads,
    outputs: Sequence[Any],
    inputs: Mapping[str, Any],
    *,
    oracle: str,
    penalty: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Return where to stop, int64, and which of these count, bool: of rows, or of tokens for a ``token`` classifier.

    A language model's token is the one that predicts the label; a row's score is the mean over its labels.
    """
    model, labels = exits.model, inputs["labels"]
    logits = [output.logits.detach() for output in outputs]
    if teachers.predicts_next_token(model) and logits[0].dim() == 3:
        # Position t predicts label t + 1, and the last one predicts nothing.
        labels = functional.pad(labels[:, 1:], (0, 1), value=-100)
    scores = stacked([quality(each, labels, oracle) for each in logits])
    known = labels != -100
    if scores.dim() == 2:  # one label for each row
        return targets(scores, penalty), known
    if exits.settings.classifiers == "token":
        return targets(smooth(scores, smoothing), penalty), known
    counted = known.sum(1)
    return targets(scores.sum(1) / counted.clamp_min(1)[:, None], penalty), counted > 0


def stop_logits(exits: ExitHeads, states: Sequence[Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of the classifier for a batch; its gradient does not reach the model."""
    rows = exits.settings.classifiers == "sequence"
    mask = inputs.get("attention_mask")
    read = [(pooled(each, mask) if rows else each).detach() for each in states]
    if exits.settings.law == "multinomial":
        return exits.stop_logits(0, read[0])
    return torch.stack([exits.stop_logits(index, read[index]) for index in range(exits.count - 1)], -1)


def stop_loss(
    exits: ExitHeads, states: Sequence[Tensor], inputs: Mapping[str, Any], target: Tensor, counted: Tensor
) -> Tensor:
    """Return the mean loss of the classifier over the targets that count."""
    log_q = log_probabilities(stop_logits(exits, states, inputs), exits.settings.law)
    each = classifier_loss(log_q, target)
    return (each * counted).sum() / counted.sum().clamp_min(1)

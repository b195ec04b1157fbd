"""The SquareHead term of a step: hidden states of all blocks of the student against those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_optim import ModelError
from hf_optim.toolkit.distillation import hidden_losses, hidden_states, teachers
from hf_optim.toolkit.topology import blocks, find_residual_order

if TYPE_CHECKING:
    from hf_optim import Run, Technique


def squarehead_term(
    step: Technique, run: Run, inputs: Mapping[str, Any], teacher: nn.Module, targets: list[Tensor]
) -> Tensor:
    """Return the unweighted loss of each block, on the states that the recorder of ``step`` has of the last forward.

    Args:
        step, run: the step with the field ``alpha_states``, and its run.
        inputs: the batch, for its padding.
        teacher: the teacher.
        targets: the teacher's states, ``[batch, tokens, width]`` for each block.

    Raises:
        ModelError: if the numbers of blocks or the widths differ, or if no gradient reaches the student's last block.
    """
    own, label = run.state(step), run.label(step)
    states = hidden_states.take_recorded(own)
    if not states or [h.shape for h in states] != [h.shape for h in targets]:
        raise ModelError(
            f"{label}: alpha_states compares the hidden states of all blocks; the teacher has {len(targets)} "
            f"{_widths(targets)} and the student {len(states)} {_widths(states)}, but both need as many of one width"
        )
    # Blocks before the first trained parameter have no gradient, so only the last block is checked.
    if not states[-1].requires_grad:
        raise ModelError(f"{label}: alpha_states: no gradient reaches the last block; does the model train at all?")
    if not hasattr(own, "order"):
        # The student's channels may have been permuted, in this run or before its checkpoint was written.
        own.order = find_residual_order(run.model, teacher)
    if own.order is not None:
        targets = [h[..., own.order.to(h.device)] for h in targets]
    return hidden_losses.squarehead_losses(states, targets, _masks(run, inputs))


def squarehead_items(run: Run, inputs: Mapping[str, Any], teacher: nn.Module) -> list[Tensor]:
    """Return the size of the teacher's states of each block, the denominators of the term, from a forward of it."""
    with hidden_states.Recorder([block.module for block in blocks(teacher)]) as recorder:
        teachers.forward(teacher, inputs)
        found, masks = recorder.take(), _masks(run, inputs)
    return hidden_losses.squared_sizes(found, masks) if len(found) == len(masks) else []  # the term raises


def _masks(run: Run, inputs: Mapping[str, Any]) -> list[Tensor | None]:
    """Return the padding mask of each block's states."""
    masks = hidden_losses.token_masks(inputs, run.model.config.is_encoder_decoder)
    return [masks[i] for i in hidden_states.base_model_of_blocks(run.model)]


def _widths(states: list[Tensor]) -> str:
    return "of width " + " and ".join(str(width) for width in sorted({h.shape[-1] for h in states}))

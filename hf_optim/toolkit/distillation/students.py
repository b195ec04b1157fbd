"""Students with some of the layers of their teacher: the same class with fewer blocks, initialized as a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..pruning import shrink
from ..topology.block_lists import blocks


def block_indices(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the block lists of a model: qualified name -> indices of the blocks; that of an encoder comes first."""
    found: dict[str, list[int]] = {}
    for block in blocks(model):
        found.setdefault(block.list_name, []).append(block.index)
    return found


def evenly_spaced(count: int, kept: int) -> tuple[int, ...]:
    """Return indices of ``kept`` of ``count`` layers, evenly spaced from first to last: 0, 2, 5 for three of six."""
    if kept <= 1:
        return (0,)[:kept]
    return tuple(round(i * (count - 1) / (kept - 1)) for i in range(kept))


def build_student(
    teacher: PreTrainedModel, kept: Mapping[str, Sequence[int]], label: str
) -> tuple[PreTrainedModel, Callable[[str], list[str]]]:
    """Copy a teacher without some of its layers.

    Args:
        teacher: not changed; the student shares no memory with it.
        kept: for every block list of ``block_indices``, the indices of the layers to keep, ascending.
        label: name of the step in messages.

    Returns:
        The student, with the mode, tied weights, dtype, device and generation settings of the teacher; and the mapping
        from old to new names of modules and parameters, for ``Run.rename``.

    Raises:
        ModelError: the configuration cannot express the student, or a layer cannot be removed.
    """
    _require_removable(teacher, kept, label)
    try:
        plan = shrink.plan(teacher, [], kept)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    removed = [block for block in blocks(teacher) if block.index not in kept[block.list_name]]
    # Removed blocks are not copied.
    memo: dict[int, Any] = {id(block.module): nn.Identity() for block in removed}
    student = copy.deepcopy(teacher, memo)
    shrink.apply_(student, plan)
    return student, plan.new_names


def count_block_parameters(model: PreTrainedModel) -> int:
    """Count the parameters in the blocks of a model, without embeddings, head and other parameters outside them."""
    return sum(p.numel() for block in blocks(model) for p in block.module.parameters())


def _require_removable(teacher: PreTrainedModel, kept: Mapping[str, Sequence[int]], label: str) -> None:
    for stack, free in shrink.removable_blocks(teacher).items():
        required = [i for i in block_indices(teacher)[stack] if i not in free and i not in kept[stack]]
        if required:
            raise ModelError(
                f"{label}: layer {required[0]} of {stack} has parameters that other layers do not have, such as the "
                "position biases of T5: it cannot be left out"
            )

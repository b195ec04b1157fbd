"""A student made of some of its teacher's layers: a model of the same class with fewer blocks, begun as a copy."""

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
    """The stacks of blocks of a model, by qualified name, with the indices of their blocks; an encoder's first."""
    found: dict[str, list[int]] = {}
    for block in blocks(model):
        found.setdefault(block.list_name, []).append(block.index)
    return found


def evenly_spaced(count: int, wanted: int) -> tuple[int, ...]:
    """Indices of `wanted` of `count` layers, evenly spread from the first to the last: 0, 2, 5 for three of six."""
    if wanted <= 1:
        return (0,)[:wanted]
    return tuple(round(i * (count - 1) / (wanted - 1)) for i in range(wanted))


def build_student(
    teacher: PreTrainedModel, kept: Mapping[str, Sequence[int]], label: str
) -> tuple[PreTrainedModel, Callable[[str], list[str]]]:
    """A model of the teacher's class that has, of each stack, only the layers `kept`, and everything else as it is.

    Args:
        teacher: unchanged; the student shares no memory with it.
        kept: for every stack of `block_indices`, the indices of layers in ascending order.
        label: names the step in messages.

    Returns:
        The student, with the teacher's mode, ties, dtype, device and generation settings; and for `Run.rename` what
        the teacher's modules and parameters are called there. Raises `ModelError` for a model whose configuration
        cannot express the student, and for layers that cannot be left out.
    """
    _require_removable(teacher, kept, label)
    try:
        plan = shrink.plan(teacher, [], kept)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    left_out = [block for block in blocks(teacher) if block.index not in kept[block.list_name]]
    # What is left out is not copied first.
    memo: dict[int, Any] = {id(block.module): nn.Identity() for block in left_out}
    student = copy.deepcopy(teacher, memo)
    shrink.apply_(student, plan)
    return student, plan.new_names


def count_block_parameters(model: PreTrainedModel) -> int:
    """Parameters of the blocks of a model: without embeddings, head and what else stands outside the stacks."""
    return sum(p.numel() for block in blocks(model) for p in block.module.parameters())


def _require_removable(teacher: PreTrainedModel, kept: Mapping[str, Sequence[int]], label: str) -> None:
    for stack, free in shrink.removable_blocks(teacher).items():
        held = [i for i in block_indices(teacher)[stack] if i not in free and i not in kept[stack]]
        if held:
            raise ModelError(
                f"{label}: layer {held[0]} of {stack} has parameters that others lack, such as a T5's position biases: "
                "it cannot be left out"
            )

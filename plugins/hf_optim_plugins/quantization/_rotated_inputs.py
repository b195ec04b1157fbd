"""Install rotations at run time before the layers that read neurons, with the code that travels with the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, joined, require_own_code, stock_class
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import replace
from hf_optim.toolkit.permutation import orthogonal
from hf_optim.toolkit.topology import weight_out_in

from . import _hadamard_kernel, _rotation_modules

LEAST_BLOCK = 256  # channels; smaller blocks spread an outlier over few others

CODE = RemoteCode(
    name="rotation",
    config_base="",
    source=joined(replace, _hadamard_kernel, _rotation_modules),
    field=_rotation_modules.RotatedInputModel.replaced_field,
    model_base=_rotation_modules.RotatedInputModel.__name__,
)


def neuron_readers(model: PreTrainedModel, label: str) -> dict[str, int]:
    """Return the linear layers that read the neurons of a feed-forward layer, and the channels of a block of each.

    Raises ``ModelError`` if there are none, or if the class of the model cannot have code of its own.
    """
    require_own_code(model, CODE, label)
    found, _ = topology.find_feed_forwards(topology.trace(model))
    if not found:
        raise ModelError(
            f"{label}: no inputs of {type(model).__name__} can be rotated at run time: it has no feed-forward layers "
            "of linear layers"
        )
    return {each.down: block_of(len(each)) for each in found}


def block_of(width: int) -> int:
    """Return the channels of a block: the largest power of two that divides the width, if it is large enough.

    Otherwise the largest power of two up to the width: two blocks that overlap then cover it.
    """
    even = orthogonal.power_of_two_in(width)
    return even if even >= min(LEAST_BLOCK, width) else 1 << (width.bit_length() - 1)


@torch.no_grad()
def install(model: PreTrainedModel, blocks: dict[str, int]) -> None:
    """Rotate the inputs of linear layers at run time, and their weights, in place; the model gets its own class."""
    made: Any = generate(CODE, stock_class(type(model.config)))  # type: ignore[arg-type]
    for name, block in blocks.items():
        layer = model.get_submodule(name)
        weight = weight_out_in(layer)
        weight.copy_(_rotation_modules.rotated_input(weight.detach(), block))
        module = made.RotatedInput(layer, block)
        module.train(layer.training)
        replace.replace_module(model, name, module)
    convert(model, CODE, {"modules": {name: {"block": block} for name, block in blocks.items()}})

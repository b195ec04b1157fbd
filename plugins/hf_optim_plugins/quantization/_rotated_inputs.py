"""Install rotations at run time, of the inputs of layers that read neurons and of queries and keys.

The code that computes them travels with the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, joined, require_own_code, stock_class
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import mixed_classes, replace
from hf_optim.toolkit.topology import weight_out_in

from . import _hadamard_kernel, _rotation_modules

CODE = RemoteCode(
    name="rotation",
    config_base="",
    source=joined(replace, mixed_classes, _hadamard_kernel, _rotation_modules),
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
        experts = " but those of stacked experts, whose neurons are computed and read in one function"
        raise ModelError(
            f"{label}: no inputs of {type(model).__name__} can be rotated at run time: it has no feed-forward layers "
            f"of linear layers{experts if topology.expert_linears(model) else ''}"
        )
    return {each.down: _rotation_modules.block_of(len(each)) for each in found}


def rotary_attentions(model: PreTrainedModel, label: str) -> list[str]:
    """Return the attentions whose queries and keys can be rotated behind the rotary embedding.

    Raises ``ModelError`` if there are none, or if the class of the model cannot have code of its own.
    """
    require_own_code(model, CODE, label)
    found = [name for name, module in model.named_modules() if _rotation_modules.rotary_function(type(module))]
    if not found:
        raise ModelError(
            f"{label}: queries and keys of {type(model).__name__} cannot be rotated at run time: no attention of it "
            "turns both by one rotary embedding"
        )
    return found


@torch.no_grad()
def install(model: PreTrainedModel, blocks: dict[str, int], attentions: list[str]) -> None:
    """Rotate at run time, in place: the inputs of linear layers, and their weights, and queries and keys.

    The model gets its own class.
    """
    made: Any = generate(CODE, stock_class(type(model.config)))  # type: ignore[arg-type]
    entries: dict[str, dict[str, Any]] = {name: {"block": block} for name, block in blocks.items()}
    for name, block in blocks.items():
        layer = model.get_submodule(name)
        weight = weight_out_in(layer)
        weight.copy_(_rotation_modules.rotated_input(weight.detach(), block))
        module = made.RotatedInput(layer, block)
        module.train(layer.training)
        replace.replace_module(model, name, module)
    for name in attentions:
        attention = model.get_submodule(name)
        attention.__class__ = made.mixed(made.RotatedScores, type(attention))
        entries[name] = {"scores": True}
    convert(model, CODE, {"modules": entries})

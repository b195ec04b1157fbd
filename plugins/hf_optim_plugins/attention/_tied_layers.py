"""The layers of a pretrained model whose blocks are tied: which they are, and what their blocks become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.modules import block_of_step
from hf_optim.toolkit.topology import blocks

BLOCK = "own_block"  # the attribute of a step


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of a model.

    Attributes:
        name: of their list in the base model.
        full_name: of their list in the model.
        blocks: the layers.
    """

    name: str
    full_name: str
    blocks: tuple[nn.Module, ...]

    def grouped(self, groups: int, order: str) -> list[list[int]]:
        """Return the layers of each group, by number."""
        count = len(self.blocks)
        found: list[list[int]] = [[] for _ in range(groups)]
        for layer in range(count):
            found[block_of_step(layer, count, groups, order)].append(layer)
        return found

    def restore(self, model: PreTrainedModel, stack: list[nn.Module]) -> None:
        """Put layers back into the list of a model."""
        holder = model.base_model.get_submodule(self.name)
        for number, layer in enumerate(stack):
            holder[number] = layer  # type: ignore[operator]
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = number  # type: ignore[assignment]

    def renamed(self, chosen: list[int], settings: Mapping[str, Any]) -> Callable[[str], Iterable[str]]:
        """Return a function that maps the name of a module or parameter to its names after tying.

        A block has what was known of the layer ``chosen[group]``; names of other layers are gone.
        """
        firsts: dict[int, int] = {}
        for step in range(settings["steps"]):
            firsts.setdefault(block_of_step(step, settings["steps"], settings["groups"], settings["order"]), step)
        places = {layer: firsts[group] for group, layer in enumerate(chosen)}

        def new_names(name: str) -> Iterable[str]:
            if not name.startswith(f"{self.full_name}."):
                return [name]
            number, _, rest = name[len(self.full_name) + 1 :].partition(".")
            if not number.isdigit() or int(number) not in places:
                return []
            return [f"{self.full_name}.{places[int(number)]}.{BLOCK}" + f".{rest}" * bool(rest)]

        return new_names


def require_one_stack(config: PretrainedConfig, label: str) -> None:
    """Raise ``ModelError`` for models of an encoder and a decoder, or of parts with configurations of their own."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{label}: {config.model_type} has an encoder and a decoder, whose blocks differ, and in some of these "
            "models only the first block has the biases of positions; tied blocks are for decoder-only and "
            "encoder-only models"
        )
    if config.get_text_config() is not config:
        raise ModelError(
            f"{label}: the parts of {config.model_type} have configurations of their own; tied blocks are for "
            "decoder-only and encoder-only models"
        )


def find_layers(model: PreTrainedModel, label: str) -> Layers:
    """Return the layers of a model. Raises ``ModelError`` unless they form one list of blocks of one kind."""
    found = blocks(model)
    lists = {block.list_name for block in found}
    kind = type(model).__name__
    if len(lists) != 1:
        what = "no list of blocks" if not lists else f"{len(lists)} lists of blocks"
        raise ModelError(f"{label}: {kind} has {what}, where one is needed whose blocks can be tied")
    full = lists.pop()
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    holder = model.get_submodule(full)
    if not full.startswith(prefix) or len(holder) != len(found):  # type: ignore[arg-type]
        raise ModelError(f"{label}: the list of blocks {full} of {kind} is not one that all layers are called from")
    modules = tuple(block.module for block in found)
    _require_alike(modules, label, kind)
    text = model.config.get_text_config()
    if getattr(text, "num_hidden_layers", None) != len(modules):
        raise ModelError(f"{label}: {kind} has {len(modules)} blocks, and its configuration says otherwise")
    if len(set(getattr(text, "layer_types", None) or ["same"])) > 1:
        raise ModelError(
            f"{label}: the layers of {kind} are of several kinds ({', '.join(sorted(set(text.layer_types)))}), which "
            "one block cannot replace"
        )
    return Layers(full.removeprefix(prefix), full, modules)


def _require_alike(modules: tuple[nn.Module, ...], label: str, kind: str) -> None:
    """Raise ``ModelError`` unless all blocks have parameters and buffers of the same names, shapes and types."""
    first = _shapes(modules[0])
    for number, module in enumerate(modules):
        if type(module) is not type(modules[0]) or _shapes(module) != first:
            raise ModelError(
                f"{label}: layers 0 and {number} of {kind} differ in structure, so that their blocks cannot be tied"
            )
    shared = {id(p) for p in modules[0].parameters()}
    if len(modules) > 1 and any(id(p) in shared for module in modules[1:] for p in module.parameters()):
        raise ModelError(f"{label}: the layers of {kind} share weights already")


def _shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}


@torch.no_grad()
def tie_weights(layers: Layers, groups: list[list[int]], initial: int | str) -> list[int]:
    """Give all layers of a group the weights of its block, in place; return a layer of each group that stands for it.

    Args:
        layers: of the model.
        groups: the layers of each group.
        initial: ``mean`` of the group's weights, computed in float64, or the number of the layer in its group.
    """
    chosen = []
    for group in groups:
        members = [layers.blocks[number] for number in group]
        source = 0 if initial == "mean" else int(initial)
        chosen.append(group[source])
        named = [dict([*each.named_parameters(), *each.named_buffers()]) for each in members]
        for name, tensor in named[source].items():
            value = tensor.clone()
            if initial == "mean" and tensor.is_floating_point():
                total = torch.zeros_like(tensor, dtype=torch.float64)
                for each in named:
                    total += each[name]
                value = (total / len(named)).to(tensor.dtype)
            for each in named:
                each[name].copy_(value)
    return chosen


def set_depth(model: PreTrainedModel, layers: Layers, settings: Mapping[str, Any]) -> None:
    """Give a model as many layers as it will have steps, with the block of its group where a step is the first of it.

    Called after ``tie_weights``. Other layers may be any block.
    """
    count, steps = len(layers.blocks), settings["steps"]
    groups, order = settings["groups"], settings["order"]
    source = {block_of_step(n, count, groups, order): layers.blocks[n] for n in reversed(range(count))}
    holder: Any = model.base_model.get_submodule(layers.name)
    made = [source[block_of_step(step, steps, groups, order)] for step in range(steps)]
    for name in list(holder._modules):
        del holder._modules[name]
    for block in made:
        holder.append(block)
    text = model.config.get_text_config()
    text.num_hidden_layers = steps
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * steps

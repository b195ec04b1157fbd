"""Move the neurons of a dense feed-forward layer, and what a run knows of their weights, into experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_optim import Run
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.topology import FeedForward, weight_out_in

Part = tuple[Tensor, Tensor | None]
"""Weight ``[neurons, in]`` and bias ``[neurons]`` or None."""


def input_parts(model: PreTrainedModel, layer: FeedForward) -> list[Part]:
    """Return the weights and biases of the gate, if there is one, and of the up projection, row by neuron."""
    found = []
    for part in (layer.gate, layer.up):
        if part is not None:
            module: Any = model.get_submodule(part.name)
            bias = None if module.bias is None else module.bias.detach()[part.index]
            found.append((weight_out_in(module).detach()[part.index], bias))
    return found


def fill_(ffn: Any, parts: list[Part], down: Tensor, bias: Tensor | None, order: Tensor) -> None:
    """Copy the neurons into the experts of a divided layer.

    Args:
        ffn: a ``MoefiedFFN``.
        parts: of the gate and the up projection.
        down: ``[out, neurons]``.
        bias: ``[out]``, of the last projection, or None.
        order: int64 ``[E, neurons of each]``.
    """
    experts = ffn.experts
    getattr(experts, experts.up_name).copy_(torch.cat([weight[order] for weight, _ in parts], dim=1))
    experts.down_proj.copy_(down[:, order].transpose(0, 1))
    if experts.has_bias:
        zero = parts[0][0].new_zeros(order.shape)
        biases = [zero if part is None else part[order] for _, part in parts]
        getattr(experts, f"{experts.up_name}_bias").copy_(torch.cat(biases, dim=1))
    if bias is not None:
        ffn.bias.copy_(bias)


def dense_parameters(model: PreTrainedModel, layer: FeedForward) -> int:
    """Return the number of parameters of a dense feed-forward layer."""
    return sum(p.numel() for name in (layer.down, *layer.producers) for p in model.get_submodule(name).parameters())


def computed_parameters(ffn: Any) -> int:
    """Return the number of parameters that one token reads in a ``MoefiedFFN``, its router included."""
    experts, stacks = ffn.experts.num_experts, sum(p.numel() for p in ffn.experts.parameters())
    router = 0 if ffn.active == experts else sum(p.numel() for p in ffn.router.parameters())
    return stacks * ffn.active // experts + router + (0 if ffn.bias is None else ffn.bias.numel())


def stack_names(layer: FeedForward) -> dict[str, list[str]]:
    """Return the name of each stack -> the names of the linear layers whose weights it is made of."""
    up = [part.name for part in (layer.gate, layer.up) if part is not None]
    return {f"{layer.down}.experts.{'gate_up_proj' if layer.gate else 'up_proj'}": up,
            f"{layer.down}.experts.down_proj": [layer.down]}  # fmt: skip


def move_masks(run: Run, layer: FeedForward, order: Tensor) -> None:
    """Turn the masks of the dense weights into those of the experts, while the dense layers are still there."""
    moved: dict[str, Tensor] = {}
    home = order.cpu()
    for stack, names in stack_names(layer).items():
        if not any(f"{name}.weight" in run.masks for name in names):
            continue
        pieces = []
        for part in (layer.gate, layer.up) if stack.endswith("up_proj") else (None,):
            name = layer.down if stack.endswith("down_proj") else getattr(part, "name", "")
            if not name:
                continue
            module = run.model.get_submodule(name)
            mask = masks.mask_out_in(module, run.masks, f"{name}.weight")
            mask = torch.ones(weight_out_in(module).shape, dtype=torch.bool) if mask is None else mask.cpu()
            pieces.append(mask[part.index[home]] if part is not None else mask[:, layer.columns[home]].transpose(0, 1))
        moved[stack] = torch.cat(pieces, dim=1).contiguous()
    for name in (layer.down, *layer.producers):
        run.masks.pop(f"{name}.weight", None)
        run.nm_patterns.pop(f"{name}.weight", None)
    run.masks.update(moved)


def new_names(name: str, stacks: dict[str, list[str]], experts: dict[str, int]) -> list[str]:
    """Return the new names of a module of the dense model: for a projection the matrices that hold its neurons.

    Args:
        name: of the module.
        stacks: ``stack_names`` of all layers.
        experts: how many each stack has.
    """
    holding = [stack for stack, names in stacks.items() if name in names]
    parts = [(*stack.rpartition(".")[::2], experts[stack]) for stack in holding]
    return [f"{module}.{index}.{matrix}" for module, matrix, count in parts for index in range(count)] or [name]

"""Rotate channels in the weights, in place, without changing what the model computes.

``topology`` finds what takes a rotation; this module unties the output head, folds the gains of norms into the weights
that read them, and multiplies weights by orthogonal matrices: products in float32 or wider, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import ModelError
from ..topology.linear_layers import weight_out_in
from ..topology.stream_rotation import RotatedNorm, StreamRotation
from ..topology.value_rotation import ValueHeads
from .folding import STRIP


def untie_head_(model: PreTrainedModel) -> bool:
    """Give the output head a weight of its own, if it shares the input embedding's; return True if it did.

    The configuration then says ``tie_word_embeddings: false``. Raises ``ModelError`` for a configuration without this
    setting.
    """
    head, embedding = _embeddings(model)
    if head is None or embedding is None or head.weight is not embedding.weight:
        return False
    if not _set_ties(model, False):
        raise ModelError(
            f"{type(model).__name__} ties its output head to its embedding, and has no setting to untie it"
        )
    own = embedding.weight.detach().clone()
    head.weight = nn.Parameter(own, requires_grad=embedding.weight.requires_grad)
    return True


def tie_head_(model: PreTrainedModel) -> None:
    """Undo ``untie_head_``: the output head shares the input embedding's weight again."""
    head, embedding = _embeddings(model)
    head.weight = embedding.weight
    _set_ties(model, True)


def _set_ties(model: PreTrainedModel, tied: bool) -> bool:
    """Set what configuration and model say about tied weights; return False if they say nothing."""
    configs = [c for c in (model.config, model.config.get_text_config()) if hasattr(c, "tie_word_embeddings")]
    for config in configs:
        config.tie_word_embeddings = tied
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=module is model)
    return bool(configs)


def _embeddings(model: PreTrainedModel) -> tuple[Any, Any]:
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None
    return (head if hasattr(head, "weight") else None), (embedding if hasattr(embedding, "weight") else None)


@torch.no_grad()
def fold_gains_(model: nn.Module, norms: Iterable[RotatedNorm]) -> None:
    """Multiply the gain of each norm into the weights that read it, in place; the gain becomes one.

    The bias moves into the biases of the linear layers behind it, if all have one; otherwise it stays, divided by the
    gain. Raises ``ModelError`` if a norm without such layers has a bias where its gain is zero.
    """
    for norm in norms:
        if norm.offset is None:
            continue
        module: Any = model.get_submodule(norm.name)
        gain = module.weight.double() + norm.offset
        bias = getattr(module, "bias", None)
        if bias is not None and bool(bias.any()):
            _move_bias_(model, norm, module, gain)
        for name, dim in norm.readers.items():
            parameter = model.get_parameter(name)
            for part in _strips(parameter.data, dim):
                part.copy_((part.movedim(dim, -1).to(_wide(part)) * gain.to(part.device, _wide(part))).movedim(-1, dim))
        module.weight.fill_(1.0 - norm.offset)


def _move_bias_(model: nn.Module, norm: RotatedNorm, module: Any, gain: Tensor) -> None:
    layers: list[Any] = [model.get_submodule(name) for name in norm.linears]
    held = {id(model.get_parameter(name)) for name in norm.readers}
    alone = {id(layer.weight) for layer in layers} == held and len(layers) == len(held)
    if layers and alone and all(layer.bias is not None for layer in layers):
        for layer in layers:
            shift = weight_out_in(layer).double() @ module.bias.to(layer.weight.device).double()
            layer.bias.copy_(layer.bias.double() + shift)
        module.bias.zero_()
        return
    if bool(((gain == 0) & (module.bias != 0)).any()):
        raise ModelError(
            f"{norm.name} has a bias in channels whose gain is zero, and layers behind it without a bias: its bias can "
            "neither stay nor move"
        )
    module.bias.copy_(torch.where(gain == 0, 0.0, module.bias.double() / gain))


@torch.no_grad()
def rotate_stream_(model: nn.Module, stream: StreamRotation, rotation: Tensor) -> None:
    """Rotate a residual stream, ``x -> x Q``, in every parameter that follows it, in place. The gains must be one.

    ``rotation`` is Q, ``[width, width]``, orthogonal. With ``stream.keeps_mean`` its rows must sum to one. Biases that
    norms still have are rotated with the stream.
    """
    for name, dims in stream.parameters.items():
        for dim in dims:
            rotate_(model.get_parameter(name).data, dim, rotation)
    for norm in stream.norms:
        bias = getattr(model.get_submodule(norm.name), "bias", None)
        if norm.offset is not None and bias is not None:
            rotate_(bias.data, 0, rotation)


@torch.no_grad()
def rotate_values_(model: nn.Module, heads: ValueHeads, rotations: Tensor) -> None:
    """Rotate the values of each head, ``v -> v R``, in the rows that compute and the columns that read them, in place.

    ``rotations`` is ``[key/value heads, channels, channels]``, orthogonal.
    """
    for name, dim, index in value_moves(model, heads):
        parameter = model.get_parameter(name)
        parameter.copy_(rotated_parts(parameter.detach(), dim, index, rotations))


def value_moves(model: nn.Module, heads: ValueHeads) -> Iterator[tuple[str, int, Tensor]]:
    """Yield what follows the values of an attention: parameter name, dimension, index ``[heads, reads, channels]``."""
    producer: Any = model.get_submodule(heads.producer)
    yield f"{heads.producer}.weight", _stored_dim(producer, 0), heads.rows[:, None]
    if producer.bias is not None:
        yield f"{heads.producer}.bias", 0, heads.rows[:, None]
    yield f"{heads.consumer}.weight", _stored_dim(model.get_submodule(heads.consumer), 1), heads.columns


def _stored_dim(module: nn.Module, dim: int) -> int:
    return 1 - dim if isinstance(module, Conv1D) else dim


def rotated_parts(tensor: Tensor, dim: int, index: Tensor, rotations: Tensor) -> Tensor:
    """Return ``tensor`` with parts of its channels along ``dim`` rotated, each by its own matrix; differentiable.

    Args:
        tensor: any float type.
        dim: a dimension of it.
        index: int64 ``[parts, reads, channels]``: channels of each part, once for each set that is rotated.
        rotations: ``[parts, channels, channels]``.
    """
    wide = _wide(tensor)
    last = tensor.movedim(dim, -1).to(wide)
    every = index.flatten().to(tensor.device)
    parts = last.index_select(-1, every).unflatten(-1, index.shape)
    turned = torch.einsum("...hrc,hcd->...hrd", parts, rotations.to(tensor.device, wide))
    return last.index_copy(-1, every, turned.flatten(-3)).movedim(-1, dim).to(tensor.dtype)


def rotated(tensor: Tensor, dim: int, rotation: Tensor) -> Tensor:
    """Return ``tensor`` with the channels along ``dim`` multiplied by ``rotation``, ``x -> x Q``; differentiable."""
    wide = _wide(tensor)
    return (tensor.movedim(dim, -1).to(wide) @ rotation.to(tensor.device, wide)).movedim(-1, dim).to(tensor.dtype)


def rotate_(tensor: Tensor, dim: int, rotation: Tensor) -> None:
    """Multiply the channels of ``tensor`` along ``dim`` by ``rotation`` in place, a strip at a time."""
    for part in _strips(tensor, dim):
        part.copy_(rotated(part, dim, rotation))


def _strips(tensor: Tensor, dim: int) -> Iterable[Tensor]:
    """Yield parts of a tensor that each contain all of dimension ``dim``, since they are copied into a wider dtype."""
    if tensor.dim() == 1:
        return [tensor]
    other = 0 if dim != 0 else 1
    return tensor.split(STRIP if tensor.dim() == 2 else 1, other)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""Which models have projections that sparse ones can replace, and of which sizes these are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_optim import ModelError
from hf_optim.toolkit.attention import attends_to_the_far_end, attentions, hidden_states, is_causal
from hf_optim.toolkit.topology import NoInputsError, dummy_inputs

from ._sparse_qkv_modules import QkvSettings, layout_of_projections


@dataclass(eq=False)
class DenseProjections:
    """What an attention module projected with before.

    Attributes:
        attention: the module.
        layers: one that makes queries, keys and values, or one for each.
        output, output_name: the projection of the output, and its name in the module.
        sizes: features of queries, keys and values.
    """

    attention: Any
    layers: list[nn.Module]
    output: nn.Module
    output_name: str
    sizes: tuple[int, int, int]

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[..., features]``."""
        made = torch.cat([layer(hidden) for layer in self.layers], -1)
        query, key, value = made.split(self.sizes, -1)
        return query, key, value


def dense_projections(model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, DenseProjections]:
    """Return what each attention of a model projects with, by its name; ``settings_for`` has accepted the model."""
    found = {}
    sizes = (settings["query"], settings["key"], settings["key"])
    for name, module in model.named_modules():
        layout = layout_of_projections(module) if hasattr(module, "is_causal") else None
        if layout is not None:
            layers = [module.get_submodule(each) for each in layout[0]]
            found[name] = DenseProjections(module, layers, module.get_submodule(layout[1]), layout[1], sizes)
    return found


def require_decoder(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless the model is a causal decoder of one stack."""
    kind = type(model).__name__
    found = attentions(model)
    if any(getattr(module, "is_causal", None) is not True for module in found) or not found:
        raise ModelError(
            f"{label}: {kind} is not a decoder: convolutions of queries, keys and values are causal, in the paper and "
            "here"
        )
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise ModelError(
            f"{label}: {kind} has {len(found)} modules of attention in {layers} layers; this architecture is not "
            "supported"
        )
    if next(model.parameters()).is_meta:
        return
    try:
        inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
    except NoInputsError:
        return
    full = hidden_states(model, inputs)
    if attends_to_the_far_end(model, inputs) and not is_causal(model, inputs, full):
        raise ModelError(f"{label}: earlier tokens of {kind} see later ones; sparse projections are for decoders")


def settings_for(
    model: PreTrainedModel, modules: int | None, about: Mapping[str, Any], label: str, reads_keys: bool = True
) -> dict[str, Any]:
    """Return the settings of a model, as they go into its ``config.json``.

    Args:
        model: a decoder.
        modules: S; None for as many as the model has query heads.
        about: ``kernel``, ``concat``, ``output`` and ``share_qk``.
        label: begins messages.
        reads_keys: False for attention that makes keys of its queries, for each query head.

    Raises ``ModelError`` for attention of another layout, sizes that differ by layer, and an S that does not divide
    them.
    """
    kind, text = type(model).__name__, model.config.get_text_config()
    sizes = {_sizes(module, label) for module in attentions(model)}
    if len(sizes) != 1:
        raise ModelError(f"{label}: the projections of {kind} have other sizes in other layers: {sorted(sizes)[:3]}")
    width, query, key, out = sizes.pop()
    heads = text.num_attention_heads
    count = heads if modules is None else modules
    for what, size in (("the hidden state", width), ("all queries", query), ("all keys", key)):
        if size % count:
            fitting = [n for n in range(1, min(width, 257)) if not (width % n or query % n or key % n)]
            raise ModelError(
                f"{label}: {count} modules do not divide the {size} features of {what} of {kind}: set modules to one "
                f"of {fitting}"
            )
    if about["output"] in ("none", "mult", "multconv") and (query != width or out != width):
        raise ModelError(
            f"{label}: the heads of {kind} have {query} features together and its hidden state has {width}: without a "
            "projection these cannot be added. Set output to dense"
        )
    if about["share_qk"] and reads_keys and query != key:
        raise ModelError(
            f"{label}: {kind} has fewer key heads than query heads, so keys cannot be the queries: set share_qk to "
            "false"
        )
    settings = {"modules": count, **about, "width": width, "query": query, "key": key}
    try:
        QkvSettings.read(settings)
    except ValueError as error:
        raise ModelError(f"{label}: {error}") from None
    return settings


def _sizes(module: nn.Module, label: str) -> tuple[int, int, int, int]:
    """Return features of hidden state, queries, keys and output of an attention module."""
    found = layout_of_projections(module)
    if found is None:
        raise ModelError(
            f"{label}: {type(module).__name__} does not project queries, keys and values in layers that can be told "
            "apart (q_proj, k_proj and v_proj; qkv_proj; c_attn); this architecture is not supported"
        )
    shapes = [_shape(module.get_submodule(name), label) for name in (*found[0], found[1])]
    *made, (_, out) = shapes
    width = made[0][0]
    if len(made) == 3:
        (_, query), (_, key), (_, value) = made
    else:
        query = shapes[-1][0]  # what the output projection reads
        key, rest = divmod(made[0][1] - query, 2)
        value = key + rest
    if key != value or any(shape[0] != width for shape in made):
        raise ModelError(
            f"{label}: keys of {type(module).__name__} have {key} features and values {value}; this architecture is "
            "not supported"
        )
    return width, query, key, out


def _shape(layer: nn.Module, label: str) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    raise ModelError(f"{label}: a projection is a {type(layer).__name__}, not a linear layer")

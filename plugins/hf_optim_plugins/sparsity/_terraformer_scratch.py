"""A Terraformer of the configuration of a decoder, with weights drawn from a seed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.attention import MOST_BUCKETS, context_length, layout_of

from ._small_start import begin_small
from ._sparse_ffn_modules import SparseFFN, sparse_ffn_settings
from ._terraformer_model import build_terraformer
from ._terraformer_modules import RecurrentBranch

LARGEST_FACTOR = 128  # more buckets are two hashes, as in the code of Reformer's authors
UNITS = ("intermediate_size", "ffn_dim", "n_inner")  # names of the number of units in configurations


def blocks_of(model: PreTrainedModel, label: str) -> list[str]:
    """Return the names in a layer of its norm, attention, second norm and feed-forward layer.

    Raises ``ModelError`` for a model whose layers are others.
    """
    try:
        return layout_of(model, label)
    except ModelError as error:
        if "dropout" in str(error):
            raise ModelError(str(error).replace("reversible layers do", "terraformer does")) from None
        raise ModelError(
            f"{label}: terraformer replaces layers that are a norm, attention, a norm and a feed-forward layer in this "
            f"order, as in Llama and GPT-2; those of {type(model).__name__} are others. Give it another decoder"
        ) from None


def buckets_for(model: PreTrainedModel, given: Sequence[int], chunk: int, label: str) -> list[int]:
    """Return the factors of the number of buckets: those given, or such that each has half a chunk of the context."""
    if given:
        return list(given)
    context = context_length(model.config)
    if context is None:
        raise ModelError(f"{label}: {model.config.model_type} has no fixed context: set buckets")
    power = max(1, (2 * (context // chunk)).bit_length() - 1)
    power = min(power, MOST_BUCKETS.bit_length() - 1)
    if 2**power <= LARGEST_FACTOR:
        return [2**power]
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def feed_forward_of(model: PreTrainedModel, own: Any, label: str) -> dict[str, Any]:
    """Return the settings of sparse feed-forward layers, of as many units as those of a model.

    Raises ``ModelError`` for a number of units that cannot be told, or that blocks do not divide.
    """
    text = model.config.get_text_config()
    width = text.hidden_size
    units = next((found for name in UNITS if isinstance(found := getattr(text, name, None), int)), None)
    if units is None:
        if not hasattr(text, "n_inner"):
            raise ModelError(f"{label}: the configuration of {text.model_type} does not say how many units a layer has")
        units = 4 * width
    if units % own.block:
        fitting = [n for n in range(1, min(units, 257)) if not units % n]
        raise ModelError(
            f"{label}: blocks of {own.block} units do not divide the {units} units of a layer: set block to one of "
            f"{fitting}"
        )
    entry = {
        "width": width,
        "neurons": units,
        "out": width,
        "block": own.block,
        "rank": 0 if own.block == 1 else min(64, width) if own.rank is None else own.rank,
        "act": own.activation,
        "gated": own.gated,
        "bias": False,
        "out_bias": True,
        "controller_bias": True,
        "temperature": own.temperature,
        "hard_share": own.hard_share,
        "controller_output": False,
        "gather_rows": 8,
        "bits": 16,
        "group": None,
    }
    try:
        return sparse_ffn_settings(entry)
    except ValueError as error:
        raise ModelError(f"{label}: {error}") from None


def from_scratch(
    model: PreTrainedModel, layers: int | None, seed: int, settings: Mapping[str, Any], small: bool = True
) -> PreTrainedModel:
    """Return a Terraformer of the class and the configuration of a model, in its dtype and on its device.

    Args:
        model: a decoder, of which no weight is used.
        layers: of the new model; None: as many.
        seed: of the weights.
        settings: of ``read_terraformer``.
        small: see ``begin_small``.
    """
    config = copy.deepcopy(model.config)
    if layers is not None:
        config.num_hidden_layers = layers
        types = getattr(config, "layer_types", None)
        if types:
            config.layer_types = [types[number % len(types)] for number in range(layers)]
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]), torch.device(weight.device):
        torch.manual_seed(seed)
        made = type(model)(config)
        build_terraformer(made, settings)
        std = getattr(config, "initializer_range", 0.02)
        for module in made.modules():
            if isinstance(module, SparseFFN) and not weight.is_meta:
                module.reset_parameters(std)
            elif isinstance(module, RecurrentBranch) and not weight.is_meta:
                module.draw()
        if small and not weight.is_meta:
            begin_small(made, std)
    made.to(dtype=weight.dtype)  # type: ignore[call-arg]
    made.train(model.training)
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made

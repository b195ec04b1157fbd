"""From BART to transformers' LED: the encoder of a BART with the attention of a Longformer, tensor for tensor."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LEDConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.modules import eval_mode, rounding_tolerance, transplant
from hf_optim.toolkit.topology import dummy_inputs

TYPE = "bart"
CLASSES = ("BartModel", "BartForConditionalGeneration")
OFFSET = 2  # rows of BART's positions before the first one
ENCODER = re.compile(r"(encoder\.layers\.\d+\.self_attn)\.([qkv]|out)_proj\.")
OWN = {"q": "query", "k": "key", "v": "value"}
POSITIONS = re.compile(r"(encoder|decoder)\.embed_positions\.weight$")


def require_bart(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model that transformers' LED does not express."""
    name = type(model).__name__
    if name not in CLASSES:
        raise ModelError(f"{label}: transformers' LED does not express {name}: it takes {' and '.join(CLASSES)}")
    if model.config.scale_embedding:
        raise ModelError(f"{label}: transformers' LED does not scale embeddings, as this {name} does (scale_embedding)")


def to_led(model: PreTrainedModel, window: int, label: str) -> PreTrainedModel:
    """Return a BART as a stock LED that shares its parameters but those that are copied.

    Args:
        model: a BART that ``require_bart`` accepts.
        window: tokens of the encoder on both sides, even.
        label: the beginning of messages.

    Raises ``ModelError`` if the result with a window over the whole text does not compute what the model does.
    """
    inputs = dummy_inputs(model)
    with eval_mode(model):
        full = model(**inputs)[0].double()
    wide = _as_led(model, 2 * inputs["input_ids"].shape[1])
    with eval_mode(wide):
        same = (wide(**inputs)[0].double() - full).abs().max() / full.abs().max()
    if not float(same) <= rounding_tolerance(model):
        raise ModelError(
            f"{label}: transformers' LED of this {type(model).__name__} computes something else (relative difference "
            f"{float(same):.2g})"
        )
    return _as_led(model, window)


def _as_led(model: PreTrainedModel, window: int) -> PreTrainedModel:
    target = transplant.find_counterpart(type(model), type(model.config), LEDConfig)
    assert target is not None
    positions = model.config.max_position_embeddings
    whole = -(-positions // window) * window  # the class pads texts to whole windows, and gives the padding positions
    fields: dict[str, Any] = {"max_encoder_position_embeddings": whole, "max_decoder_position_embeddings": positions}
    config = transplant.translate_config(
        model.config, LEDConfig, attention_window=[window] * model.config.encoder_layers, **fields
    )
    config._attn_implementation_internal = None
    with torch.device("meta"):
        made = target(config)
    prefix, wanted = f"{made.base_model_prefix}.", dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        new = re.sub(rf"^{model.base_model_prefix}\.", prefix, name) if type(model).__name__ != CLASSES[0] else name
        if (found := POSITIONS.search(new)) is not None:
            length = whole if found[1] == "encoder" else positions
            transplant.set_tensor(made, new, _positions(parameter, length))
            continue
        if (found := ENCODER.search(new)) is not None:
            own = OWN.get(found[2])
            if own is not None:
                copied = ENCODER.sub(rf"\1.longformer_self_attn.{own}_global.", new)
                transplant.set_tensor(made, copied, nn.Parameter(parameter.detach().clone()))
            new = ENCODER.sub(r"\1.output." if own is None else rf"\1.longformer_self_attn.{own}.", new)
        if new in wanted:
            transplant.set_tensor(made, new, parameter)
    for name, buffer in model.named_buffers():
        if name in dict(made.named_buffers()):
            transplant.set_tensor(made, name, buffer)
    if missing := transplant.meta_tensor_names(made):
        raise ModelError(f"{type(made).__name__} has {missing[0]}, which {type(model).__name__} does not have")
    if made.can_generate():
        made.generation_config = model.generation_config
    return made.train(model.training)


def _positions(table: Tensor, length: int) -> nn.Parameter:
    """Return the rows of the positions, and the last one again up to ``length``: only padding is there."""
    rows = table.detach()[OFFSET:]
    rows = torch.cat([rows, rows[-1:].expand(length - len(rows), -1)])
    return nn.Parameter(rows.clone(), requires_grad=table.requires_grad)

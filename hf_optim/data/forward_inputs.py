"""The inputs that the forward of a model takes, by name, and which columns of the data are among them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import transformers
from torch import Tensor

log = logging.getLogger(__name__)

# Parameters of forwards that hold no data, or state that a batch does not bring.
_OPTIONS = frozenset(
    {
        "args", "kwargs", "cache", "cache_params", "cache_position", "encoder_outputs", "logits_to_keep",
        "num_logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
        "past_key_value", "return_dict", "return_loss", "use_cache", "state", "mems", "use_mems", "skip_logits",
    }
)  # fmt: skip
# What tokenizers, processors and collators make. A forward that takes any keywords may hand them on.
KNOWN = frozenset(
    {
        "attention_mask", "cross_attention_mask", "decoder_attention_mask", "decoder_input_ids",
        "decoder_inputs_embeds", "decoder_position_ids", "feature_attention_mask", "flattened_patches",
        "global_attention_mask", "image_grid_thw", "image_sizes", "input_features", "input_features_mask", "input_ids",
        "input_values", "inputs_embeds", "labels", "mm_token_type_ids", "pixel_attention_mask", "pixel_mask",
        "pixel_values", "pixel_values_videos", "position_ids", "second_per_grid_ts", "token_type_ids",
        "video_grid_thw",
    }
)  # fmt: skip
# Inputs that carry the example itself; a prepared dataset has a column with one of these names.
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "flattened_patches")


def forward_inputs(model: Any, processor: Any = None) -> frozenset[str]:
    """Return the names of the inputs that a model takes, ``labels`` included.

    They are the parameters of its forward. If that takes keywords, it hands them on, so that the parameters of the
    forwards of the models inside it count too, and, unless it lists the keywords in a type, what the processor makes;
    if it names no main input, all of ``KNOWN``.

    Args:
        model: a model or its class; None if it is unknown, and then ``KNOWN`` alone decides.
        processor: its tokenizer or processor, or None.
    """
    made = frozenset(getattr(processor, "model_input_names", None) or ())
    if model is None:
        return KNOWN | made
    names, keywords = _parameters(model)
    if keywords:
        for inner in _wrapped(model):
            names |= _parameters(inner)[0]
    main = getattr(model, "main_input_name", None)
    if keywords == "any":
        names |= made & KNOWN if names & set(MAIN_INPUTS) else made | KNOWN
        names |= {main} if isinstance(main, str) else set()
    return frozenset(names) | {"labels"}


def class_of(config: Any) -> type | None:
    """Return the class of transformers that a configuration names first, or None."""
    named = getattr(config, "architectures", None) or [None]
    found = getattr(transformers, str(named[0]), None)
    return found if isinstance(found, type) else None


def taken(columns: Iterable[str], accepted: Collection[str], name: str) -> list[str]:
    """Return the columns that a forward takes, in their order; log the others in one line.

    Args:
        columns: the names of the columns.
        accepted: what ``forward_inputs`` returned.
        name: of the data, for the line.
    """
    columns = [str(column) for column in columns]
    dropped = [column for column in columns if column not in accepted]
    if dropped:
        log.warning("%s: the model's forward does not take %s; left out", name, ", ".join(sorted(dropped)))
    return [column for column in columns if column in accepted]


def holds_model_inputs(example: Mapping[str, Any]) -> bool:
    """Return True if an example holds a main input of a model as numbers, not as text, an image or a recording."""
    return any(isinstance(example.get(key), (list, tuple, np.ndarray, Tensor)) for key in MAIN_INPUTS)


def processed(outputs: Mapping[str, Any], accepted: Collection[str] | None) -> dict[str, Tensor]:
    """Return the tensors that a processor made, without those that the model's forward does not take."""
    return {
        key: value
        for key, value in outputs.items()
        if isinstance(value, Tensor) and (accepted is None or key in accepted)
    }


def _parameters(model: Any) -> tuple[set[str], str]:
    """Return the named parameters of a forward, and which keywords it takes besides: "" (none), "typed" or "any"."""
    cls: Any = model if isinstance(model, type) else type(model)
    try:
        parameters = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return set(), "any"
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    annotations = [str(p.annotation) for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    keywords = "" if not annotations else "typed" if "Kwargs" in annotations[0] else "any"
    # What has no default is data, whatever its name (the state of a robot).
    data = {p.name for p in parameters if p.kind in fixed and (p.default is p.empty or p.name not in _OPTIONS)}
    return data - {"self"}, keywords


def _wrapped(model: Any) -> list[Any]:
    """Return the models inside a model that it hands its keywords to, at any depth."""
    if isinstance(model, type):
        return []
    found = [getattr(model, name, None) for name in ("base_model", "model", "module")]
    inner = [each for each in found if each is not None and each is not model and hasattr(each, "forward")]
    return inner + [each for wrapped in inner for each in _wrapped(wrapped)]

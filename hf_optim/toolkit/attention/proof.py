"""Proof, on a model, that an attention function reaches all of its attention and changes nothing else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ...errors import ModelError
from ..compat import CACHE
from ..modules import eval_mode, relative_difference, rounding_tolerance
from ..topology import NoInputsError, dummy_inputs
from .attachment import FIELD, Attachment
from .caches import HeldKeysError, PatternLayer
from .pattern import Pattern
from .reach import attends_to_the_far_end, hidden_states, is_causal
from .rows import SEGMENTS
from .terms import Band, Term

log = logging.getLogger(__name__)


def require_self_attention(config: PretrainedConfig, label: str, model_class: Any = None) -> None:
    """Raise ``ModelError`` for configurations of models whose attention a pattern does not fit.

    ``model_class`` is what will be made of a configuration that is read; None for that of a model.
    """
    if config.is_encoder_decoder and model_class is not None:
        # The class of an encoder alone says so in the configuration of its model.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            config = model_class(copy.deepcopy(config)).config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{label}: {config.model_type} has cross-attention between two sequences, for which a pattern of positions "
            "means nothing; sparse attention is for decoder-only and encoder-only models"
        )
    if config.get_text_config() is not config:
        raise ModelError(
            f"{label}: a pattern does not reach the attention of {config.model_type}, whose parts have configurations "
            "of their own; this architecture is not supported"
        )


def require_on_interface(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless the model takes its attention from transformers' ``AttentionInterface``."""
    require_self_attention(model.config, label)
    if not type(model)._can_set_attn_implementation():
        raise ModelError(
            f"{label}: {type(model).__name__} does not take its attention from transformers' AttentionInterface, so "
            "no pattern reaches it; this architecture is not supported"
        )
    try:
        inputs = dummy_inputs(model)
    except NoInputsError:
        return  # calibration data may have them
    if len(inputs) > 1:
        raise ModelError(
            f"{label}: {type(model).__name__} reads {' and '.join(inputs)} in parts with attention of their own; "
            "sparse attention is for decoder-only and encoder-only models"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most tokens that a model reads: its positions, or those of its pictures; None if nothing says so."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    if found is None and hasattr(text, "image_size") and hasattr(text, "patch_size"):
        (height, width), (high, wide) = (_pair(getattr(text, name)) for name in ("image_size", "patch_size"))
        found = (height // high) * (width // wide) + 1
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class Proved(NamedTuple):
    """What was seen of a model: it is causal, and its layers share a module of attention."""

    causal: bool
    shared: bool


def prove(model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor, label: str) -> Proved:
    """Show that a pattern reaches the attention of a model and changes nothing else, and return what was found.

    A pattern that sees all must give the outputs ``full``, one in which a token sees itself alone must isolate tokens,
    and each layer must call the function. Raises ``ModelError`` otherwise.
    """
    try:
        with probe(model, Band(None, None)) as called:
            wide = hidden_states(model, inputs)
        with probe(model, Band(0, 0)):
            isolated = not attends_to_the_far_end(model, inputs)
    except ValueError as error:  # what the attention function refuses
        raise ModelError(f"{label}: {type(model).__name__} cannot compute a pattern: {error}") from error
    layers = model.config.get_text_config().num_hidden_layers
    same = relative_difference(wide, full) <= rounding_tolerance(model)
    if not (same and isolated and called.total >= layers):
        raise ModelError(
            f"{label}: a pattern does not reach the attention of {type(model).__name__}, which does not take attention "
            "and mask from transformers' interfaces in all of its layers; this architecture is not supported"
        )
    causal = is_causal(model, inputs, full)
    if causal:
        _require_cached_keys(model, inputs, label)
    return Proved(causal, shared=called.total > len(called))


def _require_cached_keys(model: PreTrainedModel, inputs: dict[str, Tensor], label: str) -> None:
    """Raise ``ModelError`` for a model that makes the keys of its attention of what its cache returns.

    What a pattern keeps then says nothing of the keys, and the model could neither decode nor be called as usual.
    """
    cache = Cache(layer_class_to_replicate=PatternLayer)
    body = model.base_model
    try:
        with probe(model, Band(None, None)), eval_mode(body):
            body(**inputs, **{CACHE: cache}, use_cache=True)
    except HeldKeysError as error:
        raise ModelError(
            f"{label}: {type(model).__name__} computes its keys from what it has cached, as multi-head latent "
            "attention does, so a pattern has no keys to keep; this architecture is not supported"
        ) from error
    except Exception as error:  # a class with layers that need another cache, or with none: nothing follows from it
        log.debug("%s was not tried with a cache: %s", type(model).__name__, error)


class ProbedCall(NamedTuple):
    """What an attention function got: key heads, width of a key and of a value, and if a mask restricts pairs."""

    heads: int
    key_width: int
    value_width: int
    restricted: bool


class Called(dict[int, ProbedCall]):
    """The last call of each module, by its id, and how many calls there were in all."""

    total = 0


@contextmanager
def probe(model: PreTrainedModel, term: Term, causal: bool = True) -> Iterator[Called]:
    """Compute one term in every head while the body runs; yields the calls of attention.

    ``causal=False`` lets causal models look at later tokens, too.
    """
    called = Called()

    class Probe(Attachment):
        def attention(
            self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
        ) -> Any:
            mask = args[0] if args else more.get("attention_mask")
            restricted = mask is not None and mask.dtype != SEGMENTS
            called[id(module)] = ProbedCall(key.shape[1], key.shape[3], value.shape[3], restricted)
            called.total += 1
            return super().attention(module, query, key, value, *args, **more)

    attachment = Probe("hf_optim_probe", lambda settings, layer, heads, own: [Pattern((term,), own and causal)])
    config, before = model.config, model.config._attn_implementation
    had = hasattr(config, FIELD)
    attachment.register()
    try:
        setattr(config, FIELD, {})
        model.set_attn_implementation(attachment.name)
        yield called
    finally:
        model.set_attn_implementation(before)
        if not had:
            delattr(config, FIELD)
        attachment.unregister()

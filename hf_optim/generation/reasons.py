"""Why a call of ``generate`` cannot run on captured graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ..toolkit.compat import CACHE
from ..toolkit.offloading import find_state
from .sampling import unsupported_processor
from .static_cache import unsupported_cache
from .stopping import unsupported_criterion

# Arguments of a forward that only its first call needs, or that the steps have buffers for.
STEP_INPUTS = frozenset(
    {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", "inputs_embeds", CACHE}
) | frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


def offloaded(model: Any) -> list[Any]:
    """Return the places beside a model's own device that its device map names."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return [place for place in places if len(places) > 1]


def why_stock(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    assistant: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why a prepared call runs in transformers' loop, in a few words; None if it can be captured."""
    devices = {parameter.device for parameter in model.parameters()} | set(offloaded(model))
    state = find_state(model)
    embedded = kwargs.get("inputs_embeds") is not None
    reasons = (
        (assistant is not None or config.prompt_lookup_num_tokens, "an assistant drafts tokens on the host"),
        (config.num_beams > 1, f"{config.num_beams} beams are searched on the host"),
        (synced_gpus, "the processes wait for each other at every step"),
        (len(devices) > 1, "the model is spread over several devices"),
        (state is not None and state.streamer is not None,
         "weights are offloaded, so that a step waits for the link and not for the host"),
        (kwargs.get("use_cache") is False, "use_cache=False recomputes the whole sequence"),
        (config.output_attentions or config.output_hidden_states,
         "attentions and hidden states of each step are asked for"),
        (config.cache_implementation not in (None, "dynamic"),
         f"cache_implementation={config.cache_implementation!r} is asked for"),
        (input_ids.ndim != 2 or (input_ids.shape[1] == 0 and not embedded), "the prompt has no tokens"),
        (model.training, "the model is in training mode, where dropout changes each step"),
    )  # fmt: skip
    for holds, reason in reasons:
        if holds:
            return reason
    if (cache := kwargs.get(CACHE)) is not None:
        encoder = model.config.is_encoder_decoder
        for part in (cache.self_attention_cache, cache.cross_attention_cache) if encoder else (cache,):
            if (unsupported := unsupported_cache(part)) is not None:
                return unsupported
    known = STEP_INPUTS | {"encoder_outputs"} if model.config.is_encoder_decoder else STEP_INPUTS
    extra = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if extra:
        return f"the model also reads {', '.join(extra)}"
    return unsupported_processor(processors) or unsupported_criterion(criteria)

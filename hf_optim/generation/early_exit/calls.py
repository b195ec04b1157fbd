"""One call of ``generate`` with early exits: its arguments, its prefill, and how its tokens are chosen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...errors import ModelError
from ...toolkit.compat import CACHE
from ..reasons import STEP_INPUTS
from ..static_cache import next_logits
from .stack import why_unsupported


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``return_dict_in_generate``: stock's fields, and how much was computed.

    Attributes:
        layers: blocks that ran for each new token, int64 ``[rows, n]``; 0 for what stands after the end of a row.
            Without drafts alone.
        rounds, drafted, accepted: of lossless decoding: passes of the full model over drafts, drafted tokens, and those
            that were the full model's, summed over rows.
    """

    layers: Tensor | None = None
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None


class Call:
    """The arguments that transformers passes to a decoding method, and the prefill.

    Attributes:
        tokens: prompt ``[rows, P]``.
        logits: of the prefill's last position, float32 ``[rows, V]``.
        cache: after the prefill.
        mask: of the tokens in the cache, ``[rows, T]``, or None.
        positions: ``[rows or 1, 1]`` of the last token, or None of a model that takes none.
        ends: True if rows end at a token.
        pad: the token after the end.
        windowed: True if layers that see a window keep all tokens (``takes_back``).

    ``takes_back`` asks for a cache from which the latest tokens can be removed: layers with a sliding window, which
    have dropped what the window no longer covers, are made to keep it. The mask still has the window.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, kwargs: Any,
        takes_back: bool,
    ) -> None:  # fmt: skip
        self.model, self.tokens, self.processors, self.criteria = model, input_ids, processors, criteria
        self.config, self.streamer = config, streamer
        self.sampled = bool(config.do_sample)
        self.ends = any(hasattr(each, "eos_token_id") for each in criteria)
        pad = config._pad_token_tensor
        self.pad = int(pad) if self.ends and pad is not None else 0
        self.new_tokens = max(0, int(criteria.max_length) - input_ids.shape[1])
        given = kwargs.get(CACHE)
        sliding = [type(layer) is DynamicSlidingWindowLayer for layer in getattr(given, "layers", ())]
        self.windowed = takes_back and any(sliding) and given.get_seq_length() == 0
        if self.windowed:
            layers = [DynamicLayer() if slides else layer for slides, layer in zip(sliding, given.layers, strict=True)]
            kwargs = {**kwargs, CACHE: Cache(layers=layers)}
        outputs = model._prefill(input_ids, config, dict(kwargs))
        self.cache = outputs.get(CACHE)
        if (reason := why_unsupported(self.cache)) is not None:
            raise ModelError(f"early exits do not decode {type(model).__name__}: {reason}")
        self.logits = next_logits(outputs)
        self.mask = kwargs.get("attention_mask")
        takes = "position_ids" in inspect.signature(type(model.base_model).forward).parameters
        self.positions = self._positions(kwargs) if takes else None

    def _positions(self, kwargs: Any) -> Tensor:
        given = kwargs.get("position_ids")
        if given is not None:
            return given[..., -1:]
        if self.mask is None:
            return torch.full((1, 1), self.tokens.shape[1] - 1, device=self.tokens.device)
        return (self.mask.long().cumsum(-1) - 1).clamp_min(0)[:, -1:]

    def choose(self, scores: Tensor) -> Tensor:
        """Return the next tokens for scores ``[rows, V]``, as transformers' loop does."""
        if self.sampled:
            return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


def why_refused(model: Any, processors: Any, config: Any, synced_gpus: bool, assistant: Any, kwargs: Any) -> str | None:
    """Return why a prepared call cannot be decoded with early exits, in a few words; None if it can be."""
    reasons: Sequence[tuple[Any, str]] = (
        (model.config.is_encoder_decoder, "encoder-decoders are not supported"),
        (config.num_beams > 1, "beams share one score over rows, for which no exit is defined"),
        (assistant is not None or config.prompt_lookup_num_tokens, "an assistant drafts tokens of its own"),
        (synced_gpus, "the processes wait for each other at every step"),
        (kwargs.get("use_cache") is False, "use_cache=False recomputes the whole sequence"),
        (kwargs.get("inputs_embeds") is not None, "the prompt is given as embeddings"),
        (config.output_attentions or config.output_hidden_states, "attentions and hidden states are asked for"),
        (config.cache_implementation not in (None, "dynamic"), f"cache_implementation={config.cache_implementation!r}"),
        (model.training, "the model is in training mode, where dropout changes each step"),
    )
    if (found := next((reason for holds, reason in reasons if holds), None)) is not None:
        return found
    extra = sorted(name for name, value in kwargs.items() if name not in STEP_INPUTS and value is not None)
    return f"the model also reads {', '.join(extra)}" if extra else None

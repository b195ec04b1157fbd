"""One call of ``generate``: the prefill, the steps, and what is read back of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..toolkit.compat import CACHE
from .session import DecodeSession
from .static_cache import next_logits, unsupported_cache
from .stopping import Sequences

# Tokens are read back after the first step, then after this many. Meanwhile as many steps again are launched, so that
# the device does not wait for the host; at most twice as many are computed in vain after the end.
WINDOW = 4
# How far the logits of a session's first step may be from transformers': the root mean square of the differences as a
# share of the standard deviation of the logits. A wrong mask or position gives several tenths.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Decoding:
    """The state of one call; the arguments are those that transformers passes to a decoding method."""

    def __init__(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, kwargs: Any
    ) -> None:
        self.model = model
        self.input_ids = input_ids
        self.processors = list(processors)
        self.criteria = criteria
        self.config = config
        self.streamer = streamer
        # The prefill has a cache of its own: transformers' loop may still have to start from the one given.
        self.kwargs = {**kwargs, CACHE: copy.deepcopy(kwargs[CACHE])} if kwargs.get(CACHE) is not None else dict(kwargs)
        self.rows, self.prompt = input_ids.shape
        self.device = input_ids.device
        self.new_tokens = max(0, int(criteria.max_length) - self.prompt)
        self.first_nan: int | None = None
        ends = [each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)]
        self.ends = torch.cat([each.reshape(-1).to(self.device) for each in ends]) if ends else None
        pad = config._pad_token_tensor
        self.pad = int(pad) if ends and pad is not None else None
        self.cache: Any = None
        self.tokens = 0
        self._logits: Tensor = torch.empty(0)
        self._step: Callable[[], None] = lambda: None
        self._captured = False

    # -- before the first step ----------------------------------------------------------------------------------------
    def prefill(self) -> None:
        """Run transformers' prefill."""
        outputs = self.model._prefill(self.input_ids, self.config, dict(self.kwargs))
        self._logits = next_logits(outputs)
        self.cache = outputs.get(CACHE)
        self.tokens = 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def longest(self) -> int:
        """The tokens that the cache can come to hold."""
        return self.tokens + self.new_tokens

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the forward that follow from those of the prefill, besides mask and cache."""
        positions = self.kwargs.get("position_ids")
        return {} if positions is None else {"position_ids": positions}

    def why_stock(self) -> str | None:
        """Return why the steps after this prefill cannot be captured; None if they can be."""
        return "the model returns no cache" if self.cache is None else unsupported_cache(self.cache)

    def structure(self) -> tuple[Any, ...]:
        """Return what besides its size decides about the buffers of a session."""
        layers = tuple(
            (layer.keys.shape[1::2], layer.values.shape[1::2], layer.keys.dtype) if layer.is_initialized else None
            for layer in self.cache.layers
        )
        positions = self.inputs.get("position_ids")
        return layers, None if positions is None else (positions.dtype, positions.shape[:-2])

    def prepare(self, session: DecodeSession, compiled: bool, captured: bool, check: bool) -> str | None:
        """Load the prefilled batch into a session; return why it cannot be used, or None.

        Args:
            session: for the batch's bucket.
            compiled, captured: how its step is to run.
            check: compare the first step with transformers'.

        Raises ``CaptureError`` if the step cannot be captured.
        """
        self._captured = captured
        with decoding_experts(self.model):
            session.start(self.input_ids, self.kwargs.get("attention_mask"), self.inputs, self.cache, self._logits)
            self._step = session.step(self.model, self.tokens, compiled, captured)
            reason = self._check(session) if check else None
        if check:
            session.start(self.input_ids, self.kwargs.get("attention_mask"), self.inputs, self.cache, self._logits)
        return reason

    def _check(self, session: DecodeSession) -> str | None:
        """Compare the step of a session with transformers', on the most likely token."""
        token = self._logits.argmax(dim=-1, keepdim=True)
        mask, positions = self.kwargs.get("attention_mask"), self.kwargs.get("position_ids")
        inputs: dict[str, Any] = {CACHE: copy.deepcopy(self.cache), "use_cache": True}
        inputs["attention_mask"] = mask if mask is None else torch.cat([mask, mask.new_ones(self.rows, 1)], dim=1)
        if positions is not None:
            inputs["position_ids"] = positions[..., -1:] + 1
        prepared = self.model.prepare_inputs_for_generation(token, next_sequence_length=1, **inputs)
        expected = next_logits(self.model(**prepared, return_dict=True))
        session.tokens[: self.rows].copy_(token)
        session.tokens[self.rows :].copy_(token[:1])
        self._step()
        assert session.logits is not None
        error = (session.logits[: self.rows] - expected).square().mean().sqrt() / expected.std()
        if error.isnan() or error <= TOLERANCE.get(self.model.dtype, 0.1):
            return None
        return f"its first step differs from transformers' by {error:.2g} standard deviations of the logits"

    # -- the steps ----------------------------------------------------------------------------------------------------
    def run(self, session: DecodeSession) -> Any:
        """Generate from the prepared session; return what transformers' loop would."""
        sample = session.sampler(self.processors, self.ends, self.pad, self.config.do_sample, self._captured)
        found = Sequences(self.input_ids.cpu(), self.criteria, self.pad, self.new_tokens)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        wanted = [
            name for name in kept if self.config.return_dict_in_generate and getattr(self.config, f"output_{name}")
        ]
        done, waiting = 0, None
        with decoding_experts(self.model):
            while done < self.new_tokens and not found.complete:
                first = done
                for _ in range(min(WINDOW if done else 1, self.new_tokens - done)):
                    if done:
                        self._step()
                    sample()
                    for name in wanted:
                        kept[name].append(getattr(session, name)[: self.rows].clone())
                    done += 1
                window = _Window(session.sequences[: self.rows, self.prompt + first : self.prompt + done])
                if waiting is not None:
                    self._read(waiting, found)
                waiting = window
            if not found.complete and waiting is not None:
                self._read(waiting, found)
        if self.streamer is not None:
            self.streamer.end()
        self.first_nan = nan if (nan := int(session.first_nan)) >= 0 and nan < self.prompt + found.count else None
        sequences = found.sequences().to(self.device)
        if not self.config.return_dict_in_generate:
            return sequences
        session.keys_values.append_to(self.cache, self.tokens, self.tokens + found.count - 1)
        each = {name: tuple(kept[name][: found.count]) if name in wanted else None for name in kept}
        fields: dict[str, Any] = {"sequences": sequences, **each, CACHE: self.cache}
        return GenerateDecoderOnlyOutput(**fields)

    def _read(self, window: _Window, found: Sequences) -> None:
        for tokens in found.add(window.read()).unbind(dim=1):
            if self.streamer is not None:
                self.streamer.put(tokens)


class _Window:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._event = None
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))
        else:
            self._host = tokens.clone()

    def read(self) -> Tensor:
        """Return the tokens ``[rows, n]``, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def decoding_experts(model: Any) -> Any:
    """Return transformers' context in which the experts of a mixture use their implementation for decoding."""
    return model._optimize_model_for_decode()

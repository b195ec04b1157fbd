"""One call of ``generate``: the prefill, the steps, and what is read back of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..toolkit.attention import FIELD, is_detached
from ..toolkit.compat import CACHE
from ..toolkit.modules.graph_capture import CaptureMemoryError
from .batch import Prefilled
from .session import DecodeSession
from .static_cache import WINDOW, next_logits
from .stopping import Sequences

# How far the logits of a session's first step may be from transformers': the root mean square of the differences as a
# share of the standard deviation of the logits. A wrong mask or position gives several tenths.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class WrongStep(Exception):
    """The step of a new session does not compute what transformers' does; the message says by how much."""


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

    def prefill(self) -> Prefilled:
        """Run transformers' prefill."""
        outputs = self.model._prefill(self.input_ids, self.config, dict(self.kwargs))
        positions = self.kwargs.get("position_ids")
        self.batch = Prefilled(
            self.input_ids,
            self.kwargs.get("attention_mask"),
            None if positions is None else positions[..., -1:],
            outputs.get(CACHE),
            next_logits(outputs),
            self.kwargs["encoder_outputs"] if self.model.config.is_encoder_decoder else None,
            getattr(self.model.config, FIELD, None) is not None and not is_detached(self.model.config),
        )
        return self.batch

    @property
    def longest(self) -> int:
        """The tokens that the cache can come to hold."""
        return self.batch.tokens + self.new_tokens

    # -- the steps ----------------------------------------------------------------------------------------------------
    def run(self, session: DecodeSession, compiled: bool, captured: bool) -> Any:
        """Generate on a session for the batch's bucket; return what transformers' loop would.

        Args:
            session: its first step is compared with transformers', unless that has been done.
            compiled, captured: how the steps are to run.

        Raises ``CaptureError`` and ``WrongStep``, both before a token is given to the streamer.
        """
        session.load(self.batch)
        setting = session.setting(self.processors, self.ends, self.pad, self.config.do_sample)
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
                    if done == 0:
                        session.sample(setting)
                    elif done == 1:
                        step = session.step(self.model, setting, compiled, captured)
                        self._first_step(session, step)
                    else:
                        step()
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
        tokens = self.batch.tokens
        session.keys_values.append_to(self.batch.own, tokens, tokens + found.count - 1)
        each = {name: tuple(kept[name][: found.count]) if name in wanted else None for name in kept}
        fields: dict[str, Any] = {"sequences": sequences, **each, CACHE: self.batch.cache}
        return (GenerateDecoderOnlyOutput if self.batch.encoder is None else GenerateEncoderDecoderOutput)(**fields)

    def _first_step(self, session: DecodeSession, step: Any) -> None:
        """Run the first step; if the session has not been checked, compare its logits with transformers'."""
        if session.checked:
            step()
            return
        reason, differs = None, None
        tokens = session.tokens[: self.rows].clone()
        try:
            expected = self._expected(tokens)
            step()
            distance = _distance(session.logits[: self.rows], expected)
            differs = distance > TOLERANCE.get(self.model.dtype, 0.1) and distance > self._noise(tokens, expected)
        except torch.OutOfMemoryError:
            pass
        except Exception as error:  # of the model, which does not take a cache of fixed length
            text = " ".join(str(error).split())[:300]
            reason = f"its first step over fixed buffers fails ({type(error).__name__}: {text})"
        # Outside of the handlers, whose exceptions keep what was allocated.
        if reason is not None:
            raise WrongStep(reason)
        if differs is None:
            raise CaptureMemoryError(f"out of memory while the first step was checked on {self.device}")
        if differs:
            raise WrongStep(
                f"its first step differs from transformers' by {distance:.2g} standard deviations of the logits"
            )
        session.checked = True

    def _expected(self, tokens: Tensor) -> Tensor:
        """Return the logits of transformers' step after ``tokens [n, 1]``, float32 ``[n, V]``."""
        batch, mask = self.batch, self.batch.mask
        inputs: dict[str, Any] = {CACHE: copy.deepcopy(batch.cache), "use_cache": True, "attention_mask": mask}
        if batch.encoder is not None:
            inputs["encoder_outputs"] = batch.encoder
        elif mask is not None:
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(self.rows, 1)], dim=1)
        if batch.positions is not None:
            inputs["position_ids"] = batch.positions + 1
        prepared = self.model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **inputs)
        return next_logits(self.model(**prepared, return_dict=True))

    def _noise(self, tokens: Tensor, expected: Tensor) -> float:
        """Return how far right steps may be apart: four times what a last bit of the embeddings does to transformers'.

        Inputs in 8 bits turn a last bit into a step of their grid. In trained models that is below the tolerance;
        weights without structure amplify it from layer to layer.
        """

        def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
            signs = torch.ones_like(output)
            signs[..., ::2] = -1  # not random: the generator is that of the samples
            return output * (1 + torch.finfo(output.dtype).eps * signs)

        hook = self.model.get_input_embeddings().register_forward_hook(disturb)
        try:
            return 4 * _distance(self._expected(tokens), expected)
        finally:
            hook.remove()

    def _read(self, window: _Window, found: Sequences) -> None:
        for tokens in found.add(window.read()).unbind(dim=1):
            if self.streamer is not None:
                self.streamer.put(tokens)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the differences, in standard deviations of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


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

"""The decoding step of one model for one size of batch and cache: fixed buffers, and the graphs captured over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..toolkit.compat import CACHE
from ..toolkit.modules.graph_capture import CaptureError, CaptureMemoryError
from . import capture
from .attention import on_kernel
from .batch import Prefilled
from .encoder_memory import EncoderMemory
from .norms import fused_norms
from .one_row import one_row
from .sampling import Processor, choose, on_device, signature
from .static_cache import StaticKeyValues, next_logits

# Settings of the processors whose graphs are kept.
SETTINGS = 8


@dataclass
class _Setting:
    """A setting of the processors: what it runs, what its graph reads, and the replay of a step with it.

    ``samples`` is False if the graph has the forward alone.
    """

    processors: list[Processor]
    ends: Tensor | None
    pad: int | None
    do_sample: bool
    replay: Callable[[], None] | None = None
    samples: bool = True


class DecodeSession:
    """Buffers of a decoding step, and the step itself, eager or captured.

    Nothing in it refers to the model: a deleted model is freed, and its sessions with it.

    Args:
        batch: a prefilled batch, for the shapes of the buffers.
        rows, length: rows of the batch, and tokens that fit; both include what pads them to their bucket.
        encoder: positions of the encoder that fit; not used for a model without one.
    """

    def __init__(self, batch: Prefilled, rows: int, length: int, encoder: int = 0) -> None:
        self.rows = rows
        self.length = length
        self.device = batch.prompt.device
        self.checked = False  # against transformers' step
        self.uncompiled: str | None = None  # why torch.compile does not take the step
        self.keys_values = StaticKeyValues(batch.own, rows, length)
        self.memory = None
        if batch.encoder is not None:
            self.memory = EncoderMemory(batch.cache.cross_attention_cache, batch.encoder, batch.mask, rows, encoder)
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.device)
        self.sequences = zeros((rows, length))
        self.tokens = zeros((rows, 1))
        self.count = zeros(1)
        self.mask = zeros((rows, length))
        self.done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.first_nan = zeros(1)
        self.positions = None
        if (given := batch.positions) is not None:
            self.positions = torch.zeros((*given.shape[:-2], rows, 1), dtype=given.dtype, device=self.device)
        self.logits = torch.empty((rows, batch.logits.shape[-1]), dtype=torch.float32, device=self.device)
        self.scores = torch.empty_like(self.logits)
        self._settings: dict[tuple[Any, ...], _Setting] = {}
        self._pool: Any = None

    def load(self, batch: Prefilled) -> None:
        """Copy a prefilled batch to the buffers. Raises ``ModelError`` if it does not fit."""
        rows, length = batch.prompt.shape
        if rows > self.rows or max(length, batch.tokens) > self.length:
            raise ModelError(
                f"a batch of {rows} x {max(length, batch.tokens)} tokens does not fit in buffers for "
                f"{self.rows} x {self.length}"
            )
        self.sequences[:, :length].copy_(_padded(batch.prompt, self.rows))
        self.count.fill_(length)
        self.keys_values.fill(batch.own, batch.mask)
        self.mask.fill_(1)
        if self.memory is not None:
            self.memory.fill(batch.cache.cross_attention_cache, batch.encoder, batch.mask)
        elif batch.mask is not None:
            self.mask[:, : batch.mask.shape[1]].copy_(_padded(batch.mask, self.rows))
        self.done.fill_(False)
        self.done[rows:] = True
        self.first_nan.fill_(-1)
        if self.positions is not None:
            assert batch.positions is not None
            self.positions.copy_(_padded(batch.positions, self.rows, dim=-2) + 1)
        self.logits.copy_(_padded(batch.logits, self.rows))

    # -- one step -----------------------------------------------------------------------------------------------------
    def forward(self, model: Any, call: Callable[..., Any]) -> None:
        """Run the model on the last tokens, and leave the logits of the next in ``logits``."""
        inputs: dict[str, Any] = {CACHE: self.keys_values.cache, "use_cache": True}
        if self.memory is None:
            # Under a pattern, the cache itself knows which tokens are padding.
            inputs["attention_mask"] = None if self.keys_values.knows_padding else self.mask
        else:
            inputs |= {**self.memory.inputs(), CACHE: self.memory.with_own(self.keys_values.cache)}
            if _takes_decoder_mask(type(model).forward):
                # Without one, BART of transformers 5.17 makes one of as many positions as a tensor says, on the host.
                inputs["decoder_attention_mask"] = self.mask
        if self.positions is not None:
            inputs["position_ids"] = self.positions
        with on_kernel(model):
            prepared = model.prepare_inputs_for_generation(self.tokens, next_sequence_length=1, **inputs)
            self.logits.copy_(next_logits(call(model, prepared)))
        if self.positions is not None:
            self.positions.add_(1)

    def _forward_on_kernels(self, model: Any, call: Callable[..., Any]) -> None:
        """Run ``forward`` as it is captured: norms are PyTorch's own where torch.compile does not fuse them."""
        with fused_norms(model) if call is capture.call else nullcontext():
            self.forward(model, call)

    def sample(self, setting: _Setting) -> None:
        """Choose the next token of each row from ``logits``, and append it to ``sequences``."""
        broken = torch.isnan(self.logits).any()
        self.first_nan.copy_(torch.where((self.first_nan < 0) & broken, self.count, self.first_nan))
        scores = self.logits
        for processor in setting.processors:
            scores = processor(self.sequences, scores)
        self.scores.copy_(scores)
        tokens = choose(scores, setting.do_sample)
        if setting.pad is not None:
            tokens = tokens.masked_fill(self.done, setting.pad)
        if setting.ends is not None:
            # Not torch.isin: for more than a few tokens it sorts them, which cannot be captured.
            self.done.logical_or_((tokens[:, None] == setting.ends).any(dim=1))
        self.tokens.copy_(tokens[:, None])
        self.sequences.index_copy_(1, self.count, self.tokens)
        self.count.add_(1)

    def setting(self, processors: Iterable[Any], ends: Tensor | None, pad: int | None, do_sample: bool) -> _Setting:
        """Return the setting for a call's processors; calls whose operations are the same share one."""
        processors = list(processors)
        key = (signature(processors, do_sample), None if ends is None else tuple(ends.tolist()), pad)
        if key not in self._settings:
            while len(self._settings) >= SETTINGS:
                self._settings.pop(next(iter(self._settings)))
            made = on_device(processors, self.count, self.rows)
            self._settings[key] = _Setting(made, ends, pad, do_sample)
        found = self._settings[key]
        for mine, given in zip(found.processors, processors, strict=True):
            if hasattr(mine, "set"):
                mine.set(given)
        return found

    # -- the same, captured -------------------------------------------------------------------------------------------
    def step(self, model: Any, setting: _Setting, compiled: bool, captured: bool) -> Callable[[], None]:
        """Return the function that runs ``forward``, then ``sample``: one graph if captured.

        It is captured at the first use of a setting, over the buffers as they are loaded. A step that cannot be
        compiled is captured as it is, and processors that cannot be captured run eagerly. Raises
        ``CaptureError``.
        """
        if captured and setting.replay is None:
            self._capture_step(model, setting, compiled)
        forward = setting.replay if captured else partial(self.forward, model, capture.call)
        assert forward is not None
        if captured and setting.samples:
            return forward

        def step() -> None:
            forward()
            self.sample(setting)

        return step

    def _capture_step(self, model: Any, setting: _Setting, compiled: bool) -> None:
        """Capture what can be: compiled if that is possible, with the processors if that is possible."""
        reasons: list[str] = []
        compiled = compiled and not self.keys_values.knows_padding  # models with a pattern are left uncompiled
        for call in (capture.compiled_call(model), capture.call) if compiled else (capture.call,):
            forward = partial(self._forward_on_kernels, model, call)

            def step(forward: Callable[[], None] = forward) -> None:
                forward()
                self.sample(setting)

            for run, samples in ((step, True), (forward, False)):
                try:
                    with one_row(model, self.rows):
                        setting.replay, setting.samples = self._capture(run), samples
                except CaptureMemoryError:
                    raise
                except CaptureError as error:
                    reasons.append(str(error))
                    continue
                if compiled and call is capture.call:
                    self.uncompiled = reasons[0]
                return
        raise CaptureError(reasons[-1])

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        buffers = [self.tokens, self.count, self.done, self.first_nan, self.logits]
        if self.positions is not None:
            buffers.append(self.positions)
        kept = [each.clone() for each in buffers]
        put_back = self.keys_values.mark()

        def restore() -> None:
            for each, before in zip(buffers, kept, strict=True):
                each.copy_(before)
            put_back()

        pool, self._pool = self._pool, None  # a capture that fails spoils it
        try:
            replay, self._pool = capture.capture(run, restore, self.device, pool)
        except CaptureError:
            restore()
            raise
        return replay


@cache
def _takes_decoder_mask(forward: Callable[..., Any]) -> bool:
    """Return True if a model's forward takes a mask of the decoder's tokens, and no positions are made of it."""
    names = inspect.signature(forward).parameters
    return "decoder_attention_mask" in names and "decoder_position_ids" not in names


def _padded(rows: Tensor, count: int, dim: int = 0) -> Tensor:
    """Return ``count`` rows: those given, then copies of the first."""
    missing = count - rows.shape[dim]
    if missing == 0:
        return rows
    first = rows.narrow(dim, 0, 1)
    return torch.cat([rows, *[first] * missing], dim=dim)

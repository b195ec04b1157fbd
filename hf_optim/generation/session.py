"""The decoding step of one model for one size of batch and cache: fixed buffers, and the graphs captured over them."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..toolkit.compat import CACHE
from .attention import on_kernel
from .sampling import MinimumLength, Processor, RepetitionPenalty, choose, on_device, signature
from .static_cache import StaticKeyValues, next_logits

# Eager runs before a capture: libraries allocate their workspaces and Triton compiles its kernels in these.
WARM_UPS = 2
# Samplers of other settings that are kept.
SAMPLERS = 8
# torch.compile keeps a version of the step for each model and size of the buffers.
COMPILED_STEPS = 64


class CaptureError(Exception):
    """A step could not be compiled or captured; the message says why."""


@dataclass(frozen=True)
class _Sampler:
    """A setting of the processors: what it runs, what its graph reads, and the graph's replay, if it was captured."""

    processors: list[Processor]
    ends: Tensor | None
    replay: Callable[[], None] | None


class DecodeSession:
    """Buffers of a decoding step, and the step itself, eager or captured.

    Nothing in it refers to the model: a deleted model is freed, and its sessions with it.

    Args:
        source: the cache of a prefill, for the shapes of the layers.
        rows, length: rows of the batch, and tokens that fit; both include what pads them to their bucket.
        inputs: arguments of the forward after the prefill: ``position_ids`` of its last token, or nothing.
        device: where the model is.
    """

    def __init__(self, source: Cache, rows: int, length: int, inputs: dict[str, Any], device: torch.device) -> None:
        self.lock = threading.Lock()
        self.rows = rows
        self.length = length
        self.keys_values = StaticKeyValues(source, rows, length)
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        self.sequences = zeros((rows, length))
        self.tokens = zeros((rows, 1))
        self.count = zeros(1)
        self.mask = zeros((rows, length))
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.first_nan = zeros(1)
        self.positions = None
        if (given := inputs.get("position_ids")) is not None:
            shape = (*given.shape[:-2], rows, 1)
            self.positions = torch.zeros(shape, dtype=given.dtype, device=device)
        self.logits: Tensor | None = None
        self.scores: Tensor | None = None
        self._step: Callable[[], None] | None = None
        self._samplers: dict[tuple[Any, ...], _Sampler] = {}
        self._pool: Any = None

    def start(self, prompt: Tensor, mask: Tensor | None, inputs: dict[str, Any], source: Cache, logits: Tensor) -> int:
        """Load a prefilled batch into the buffers; return the number of tokens in the cache.

        Args:
            prompt: tokens ``[n, P]``, ``n <= rows``.
            mask: ``[n, P]`` with 0 for padding on the left; None without padding.
            inputs: the arguments of the forward, as for the constructor.
            source: the cache of the prefill.
            logits: of the last position, float32 ``[n, V]``.
        """
        rows, length = prompt.shape
        self.sequences[:, :length].copy_(_padded(prompt, self.rows))
        self.count.fill_(length)
        self.mask.fill_(1)
        tokens = self.keys_values.fill(source)
        if mask is not None:
            self.mask[:, : mask.shape[1]].copy_(_padded(mask, self.rows))
        self.done.fill_(False)
        self.done[rows:] = True
        self.first_nan.fill_(-1)
        if self.positions is not None:
            last = inputs["position_ids"][..., -1:]
            self.positions.copy_(_padded(last, self.rows, dim=-2) + 1)
        if self.logits is None:
            self.logits = torch.empty((self.rows, logits.shape[-1]), dtype=torch.float32, device=logits.device)
        self.logits.copy_(_padded(logits, self.rows))
        return tokens

    # -- one step -----------------------------------------------------------------------------------------------------
    def forward(self, model: Any, compiled: bool = False) -> None:
        """Run the model on the last tokens, and leave the logits of the next in ``logits``."""
        inputs = {
            "attention_mask": self.mask,
            CACHE: self.keys_values.cache,
            "use_cache": True,
            **({} if self.positions is None else {"position_ids": self.positions}),
        }
        call = _compiled_call if compiled else _call
        with on_kernel(model):
            prepared = model.prepare_inputs_for_generation(self.tokens, next_sequence_length=1, **inputs)
            self.logits.copy_(next_logits(call(model, prepared)))  # type: ignore[union-attr]
        if self.positions is not None:
            self.positions.add_(1)

    def sample(self, processors: list[Any], ends: Tensor | None, pad: int | None, do_sample: bool) -> None:
        """Choose the next token of each row from ``logits``, and append it to ``sequences``."""
        assert self.logits is not None
        broken = torch.isnan(self.logits).any()
        self.first_nan.copy_(torch.where((self.first_nan < 0) & broken, self.count, self.first_nan))
        scores = self.logits
        for processor in processors:
            scores = processor(self.sequences, scores)
        if self.scores is None:
            self.scores = torch.empty_like(self.logits)
        self.scores.copy_(scores)
        tokens = choose(scores, do_sample)
        if pad is not None:
            tokens = tokens.masked_fill(self.done, pad)
        if ends is not None:
            # Not torch.isin: for more than a few tokens it sorts them, which cannot be captured.
            self.done.logical_or_((tokens[:, None] == ends).any(dim=1))
        self.tokens.copy_(tokens[:, None])
        self.sequences.index_copy_(1, self.count, self.tokens)
        self.count.add_(1)

    # -- the same, captured -------------------------------------------------------------------------------------------
    def step(self, model: Any, tokens: int, compiled: bool, captured: bool) -> Callable[[], None]:
        """Return the function that runs ``forward``; the first call for a session compiles and captures it.

        ``tokens`` is the number of tokens in the cache; the warm-up writes behind them. Raises ``CaptureError``.
        """
        if not captured:
            return lambda: self.forward(model)
        if self._step is None:
            state = [each for each in (self.logits, self.positions) if each is not None]
            kept = [each.clone() for each in state]
            self._step = self._capture(lambda: self.forward(model, compiled))
            for each, before in zip(state, kept, strict=True):
                each.copy_(before)
            self.keys_values.set_tokens(tokens)
        return self._step

    def sampler(
        self, processors: Iterable[Any], ends: Tensor | None, pad: int | None, do_sample: bool, captured: bool
    ) -> Callable[[], None]:
        """Return the function that runs ``sample``, captured once for each setting of the processors.

        If a processor cannot be captured, it runs eagerly, which costs the host some launches a step.
        """
        processors = list(processors)
        key = (signature(processors, do_sample), None if ends is None else tuple(ends.tolist()), pad)
        if key not in self._samplers:
            while len(self._samplers) >= SAMPLERS:
                self._samplers.pop(next(iter(self._samplers)))
            work = on_device(processors, self.count, self.rows)
            run = partial(self.sample, work, ends, pad, do_sample)
            self._samplers[key] = _Sampler(work, ends, self._capture_sampler(run) if captured else None)
        found = self._samplers[key]
        for mine, given in zip(found.processors, processors, strict=True):
            if isinstance(mine, (MinimumLength, RepetitionPenalty)):
                mine.set(given)
        return found.replay or partial(self.sample, found.processors, found.ends, pad, do_sample)

    def _capture_sampler(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Capture a sampler, and restore the buffers and the random state that its warm-up changed."""
        device = self.tokens.device
        buffers = [self.sequences, self.tokens, self.count, self.done, self.first_nan]
        kept = [each.clone() for each in buffers]
        random = torch.cuda.get_rng_state(device)
        try:
            return self._capture(run)
        except CaptureError:
            return None
        finally:
            torch.cuda.set_rng_state(random, device)
            for each, before in zip(buffers, kept, strict=True):
                each.copy_(before)

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture a function over the session's buffers; return its replay. Raises ``CaptureError``."""
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        try:
            with _compiling():
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        run()
                torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile: only this one must not do what a capture forbids.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _end_capture(self.tokens.device)
            raise CaptureError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        self._pool = self._pool or graph.pool()
        return graph.replay


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, return_dict=True)


_COMPILED: list[Callable[..., Any]] = []


def _compiled_call(model: Any, inputs: dict[str, Any]) -> Any:
    if not _COMPILED:
        _COMPILED.append(torch.compile(_call, fullgraph=True, dynamic=False))
    return _COMPILED[0](model, inputs)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let ``torch.compile`` keep many versions of the step, and give its advice (TF32, say) to nobody."""
    from torch._dynamo import config

    limits: dict[str, Any] = {"recompile_limit": COMPILED_STEPS, "accumulated_recompile_limit": COMPILED_STEPS}
    with warnings.catch_warnings(), config.patch(**limits):
        warnings.simplefilter("ignore")
        yield


def _end_capture(device: torch.device) -> None:
    """Leave the device as before a capture that failed: torch's random generator would stay in its state for captures.

    A capture that succeeds takes it out of that state.
    """
    torch.cuda.synchronize(device)
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            torch.zeros(1, device=device)


def _padded(rows: Tensor, count: int, dim: int = 0) -> Tensor:
    """Return ``count`` rows: those given, then copies of the first."""
    missing = count - rows.shape[dim]
    if missing == 0:
        return rows
    first = rows.narrow(dim, 0, 1)
    return torch.cat([rows, *[first] * missing], dim=dim)

"""``hf_optim.generate``: transformers' ``generate`` with a decoding step that is one captured CUDA graph."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..toolkit import compat
from ..toolkit.modules.graph_capture import (
    CaptureError,
    CaptureMemoryError,
    has_graphs,
    random_state,
    set_random_state,
)
from . import sessions
from .attention import on_kernel
from .early_exit import door as early_exits
from .inputs import most_positions, require_device, require_room, require_tokens
from .loop import Decoding, WrongStep
from .quantized_cache import reads_codes, with_wanted_cache
from .reasons import why_stock
from .session import DecodeSession
from .watched_logits import WatchedLogits

INSIDE = ("hf_optim", "transformers", "torch")
NOT_NUMBERS = "the logits have NaN from token {} of the sequence on"
MODES = ("auto", "captured", "eager", "stock")


class GenerationWarning(UserWarning):
    """A call of ``hf_optim.generate`` runs in transformers' own loop, or saw logits that are not numbers."""


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    mode: str = "auto",
    streamer: Any = None,
    synced_gpus: bool = False,
    early_exit: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate as ``model.generate`` does, with the decoding step captured as one CUDA graph.

    Two ways to call it, with the arguments of ``model.generate``::

        model.generate(**inputs, max_new_tokens=128, custom_generate=hf_optim.generate)
        hf_optim.generate(model, **inputs, max_new_tokens=128)

    The prefill is transformers' own, the encoder of an encoder-decoder included. Then each step (the model, its cache,
    the processors of the logits, the choice of the token) is a graph that is replayed without waiting for the host:
    tokens are read some steps late, and those after the end of a sequence are discarded. Graphs are kept with the
    model by buckets of batch size and length, so that a later call with other lengths compiles nothing; they are
    dropped when the model's tensors, classes or settings change. The first step of a new session is compared with
    transformers'.

    What cannot be captured (beams, assistants, processors and criteria with Python state, caches that are not plain
    keys and values, models on several devices) runs in transformers' loop, with one ``GenerationWarning`` that names
    the reason. So do models on a CPU, without a warning. Greedy tokens are those of transformers up to rounding;
    samples are reproducible for a seed.

    A model whose configuration names early exits (``calm``) decodes with them, unless ``mode`` is ``stock``: outside of
    graphs, and without another loop for calls that exits do not serve, which are refused.

    Args:
        model: a model with ``generate``.
        input_ids, logits_processor, stopping_criteria, generation_config, kwargs: as for ``model.generate``.
        mode: ``auto`` compiles the step with ``torch.compile`` and captures it on CUDA, and is transformers' loop on a
            CPU; ``captured`` captures it without compiling, which starts sooner; ``eager`` runs the same step over the
            same buffers without a graph, on any device; ``stock`` is transformers' loop.
        streamer: gets tokens while they are generated, a few steps late.
        synced_gpus: as for ``model.generate``; runs in transformers' loop.
        early_exit: an ``early_exit.EarlyExit`` in place of the one in the configuration; False for none.

    Returns what ``model.generate`` returns: tokens ``[rows, P + n]``, or with ``return_dict_in_generate`` an
    output with ``sequences``, ``scores``, ``logits`` and the cache. Raises ``ModelError`` for an unknown mode, tokens
    that are none, a streamer with beams, inputs on another device than the model, a static cache that is too short, a
    cache of another number of rows, a model without ``generate``, and logits with NaN where samples are drawn on a CPU.
    """
    if not callable(getattr(model, "generate", None)):
        raise ModelError(f"{type(model).__name__} has no generate: load a model with a language modelling head first")
    if mode not in MODES:
        raise ModelError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if compat.is_prepared(generation_config):
        given = compat.arguments_of_generate()
        streamer = streamer if streamer is not None else given.get("streamer")
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, mode, streamer, synced_gpus,
            given.get("assistant_model"), kwargs, early_exit,
        )  # fmt: skip
    for name, value in (
        ("input_ids", input_ids),
        ("logits_processor", logits_processor),
        ("stopping_criteria", stopping_criteria),
        ("generation_config", generation_config),
        ("streamer", streamer),
    ):
        if value is not None:
            kwargs[name] = value
    if input_ids is not None:
        require_tokens(input_ids, kwargs.get("inputs_embeds") is not None)
    _add_stop_strings(model, kwargs)
    if synced_gpus:
        kwargs["synced_gpus"] = True
    require_device(model, kwargs)
    return model.generate(**kwargs, custom_generate=partial(generate, mode=mode, early_exit=early_exit))


def _add_stop_strings(model: Any, kwargs: dict[str, Any]) -> None:
    """Make the criterion of ``stop_strings`` here: transformers gives a custom loop no tokenizer to make it with."""
    from transformers import StoppingCriteriaList
    from transformers.generation.stopping_criteria import StopStringCriteria

    tokenizer = kwargs.pop("tokenizer", None)
    strings = kwargs.pop("stop_strings", None)
    if strings is None:
        config = kwargs.get("generation_config")
        strings = getattr(config, "stop_strings", None)
        if strings is not None and tokenizer is not None:
            import copy

            kwargs["generation_config"] = copy.deepcopy(config)
            kwargs["generation_config"].stop_strings = None
    if strings is None:
        return
    if tokenizer is None:
        raise ModelError("stop_strings need the tokenizer: pass tokenizer=")
    criteria = [*kwargs.get("stopping_criteria", ()), StopStringCriteria(tokenizer, strings)]
    kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)


def _generate(
    model: Any,
    input_ids: Tensor | None,
    processors: Any,
    criteria: Any,
    config: Any,
    mode: str,
    streamer: Any,
    synced_gpus: bool,
    assistant: Any,
    kwargs: dict[str, Any],
    early_exit: Any = None,
) -> Any:
    assert input_ids is not None
    device = input_ids.device
    require_device(model, {"input_ids": input_ids, **kwargs})
    require_room(input_ids, criteria, kwargs)
    if streamer is not None and config.num_beams > 1:  # transformers does not look at it for a custom loop
        raise ModelError("beams change until the last token, so that none can be streamed: num_beams=1, or no streamer")
    kwargs = with_wanted_cache(model, kwargs)
    if mode != "stock" and (settings := early_exits.wanted(model, early_exit)) is not None:
        return early_exits.generate(
            model, input_ids, processors, criteria, config, streamer, synced_gpus, assistant, kwargs, settings
        )

    def stock() -> Any:
        loop = compat.decoding_method(model, config, assistant)
        extra = {"streamer": streamer, **({"assistant_model": assistant} if assistant is not None else {})}
        watched = WatchedLogits()
        try:
            with on_kernel(model) if reads_codes(model, kwargs) else nullcontext():
                result = loop(
                    model, input_ids, logits_processor=watched.before(processors), stopping_criteria=criteria,
                    generation_config=config, synced_gpus=synced_gpus, **extra, **kwargs,
                )  # fmt: skip
        except RuntimeError as error:
            # After an assertion on a GPU, nothing can be read there.
            if device.type != "cuda" and (first := watched.first_nan()) is not None:
                raise ModelError(f"{NOT_NUMBERS.format(first)}, so no token can be drawn") from error
            raise
        if (first := watched.first_nan()) is not None:
            _warn(f"{NOT_NUMBERS.format(first)}: later tokens mean nothing")
        return result

    if mode == "stock" or (mode == "auto" and not has_graphs(device)):
        return stock()
    reason = why_stock(model, input_ids, processors, criteria, config, synced_gpus, assistant, kwargs)
    if reason is None and mode == "captured" and not has_graphs(device):
        reason = f"there are no CUDA graphs on {device}"
    if reason is None:
        random = random_state(device) if config.do_sample else None
        try:
            decoding = Decoding(model, input_ids, processors, criteria, config, streamer, kwargs)
            # The buffers are used in later calls: in inference mode they could only be used there.
            with torch.inference_mode(False), torch.no_grad():
                return _decode(model, decoding, mode)
        except StockLoop as error:
            reason = str(error)
        # Outside of the handler: its exception keeps the frames, and with them the memory, of what failed.
        del decoding
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if random is not None:
            set_random_state(device, random)
    _warn(f"generating in transformers' loop: {reason}")
    return stock()


class StockLoop(Exception):
    """A call runs in transformers' loop, for the reason in the message."""


def _decode(model: Any, decoding: Decoding, mode: str) -> Any:
    """Generate on the session for a batch, made if necessary. Raises ``StockLoop``."""
    lock = sessions.lock(model)
    if not lock.acquire(blocking=False):
        raise StockLoop("another call is generating on this model's graphs")
    try:
        if isinstance(reason := sessions.find(model, (mode,)), str):
            raise StockLoop(reason)
        batch = decoding.prefill()
        if (reason := batch.why_stock()) is not None:
            if batch.cache is None:
                sessions.keep(model, (mode,), reason)  # the next call does without this prefill
            raise StockLoop(reason)
        rows = sessions.rows_bucket(decoding.rows)
        length = sessions.length_bucket(decoding.longest, most=most_positions(model.config))
        encoder = _encoder_bucket(batch.encoder, batch.mask)
        key = (rows, length, encoder, mode, batch.structure())
        found = sessions.find(model, key)
        assert not isinstance(found, str)
        session = found or _make_session(decoding, rows, length, encoder)
        result = _run(model, key, session, decoding, mode)
        if session is not found:
            sessions.keep(model, key, session)
            if session.uncompiled is not None:
                _warn(f"the step is captured without torch.compile ({session.uncompiled})")
    finally:
        lock.release()
    if decoding.first_nan is not None:
        _warn(f"{NOT_NUMBERS.format(decoding.first_nan)}: later tokens mean nothing")
    return result


def _run(model: Any, key: tuple[Any, ...], session: DecodeSession, decoding: Decoding, mode: str) -> Any:
    """Generate on a session.

    Raises ``StockLoop``. A step that cannot be captured, or that differs from transformers', is not tried again for
    this model and mode. After any other error the session is dropped: its buffers are in the middle of a step.
    """
    try:
        return decoding.run(session, compiled=mode == "auto", captured=mode != "eager")
    except CaptureMemoryError as error:
        sessions.drop(model, key)
        raise StockLoop(str(error)) from None
    except (CaptureError, WrongStep) as error:
        reason = str(error) if isinstance(error, WrongStep) else f"the step cannot be captured ({error})"
        sessions.drop(model, key)
        sessions.keep(model, (mode,), reason)
        raise StockLoop(reason) from None
    except BaseException:
        sessions.drop(model, key)
        raise


def _encoder_bucket(outputs: Any, mask: Tensor | None) -> int:
    if outputs is None:
        return 0
    # Positions that pad an encoder's output must be masked.
    length = outputs[0].shape[1]
    return length if mask is None else sessions.length_bucket(length, sessions.SHORTEST_ENCODER)


def _make_session(decoding: Decoding, rows: int, length: int, encoder: int) -> DecodeSession:
    try:
        return DecodeSession(decoding.batch, rows, length, encoder)
    except torch.OutOfMemoryError:
        raise StockLoop(f"a cache of {rows} x {length} tokens does not fit on {decoding.device}") from None


def _warn(message: str) -> None:
    """Warn at the line of the caller, outside of what it called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GenerationWarning, stacklevel=level)

"""``hf_optim.generate``: transformers' ``generate`` with a decoding step that is one captured CUDA graph."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..toolkit import compat
from . import sessions
from .loop import Decoding
from .reasons import why_stock
from .session import CaptureError, DecodeSession

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
    **kwargs: Any,
) -> Any:
    """Generate as ``model.generate`` does, with the decoding step captured as one CUDA graph.

    Two ways to call it, with the arguments of ``model.generate``::

        model.generate(**inputs, max_new_tokens=128, custom_generate=hf_optim.generate)
        hf_optim.generate(model, **inputs, max_new_tokens=128)

    The prefill is transformers' own. Then each step (the model, its cache, the processors of the logits, the choice
    of the token) is a graph that is replayed without waiting for the host: tokens are read some steps late, and those
    after the end of a sequence are discarded. Graphs are kept with the model by buckets of batch size and length, so
    that a later call with other lengths compiles nothing; they are dropped when the model's tensors, classes or
    settings change. A session that is new is compared with transformers' step before it is used.

    What cannot be captured (beams, assistants, processors and criteria with Python state, caches that are not plain
    keys and values, models on several devices) runs in transformers' loop, with one warning that names the reason. So
    do models on a CPU, without a warning. Greedy tokens are those of transformers up to rounding; samples are
    reproducible for a seed.

    Args:
        model: a model with ``generate``.
        input_ids, logits_processor, stopping_criteria, generation_config, kwargs: as for ``model.generate``.
        mode: ``auto`` compiles the step with ``torch.compile`` and captures it on CUDA, and is transformers' loop on a
            CPU; ``captured`` captures it without compiling, which starts sooner; ``eager`` runs the same step over the
            same buffers without a graph, on any device; ``stock`` is transformers' loop.
        streamer: gets tokens while they are generated, a few steps late.
        synced_gpus: as for ``model.generate``; runs in transformers' loop.

    Returns what ``model.generate`` returns: tokens ``[rows, P + n]``, or with ``return_dict_in_generate`` an
    output with ``sequences``, ``scores``, ``logits`` and the cache. Raises ``ModelError`` for inputs on another device
    than the model, and for an unknown mode.
    """
    if mode not in MODES:
        raise ModelError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if compat.is_prepared(generation_config):
        given = compat.arguments_of_generate()
        streamer = streamer if streamer is not None else given.get("streamer")
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, mode, streamer, synced_gpus,
            given.get("assistant_model"), kwargs,
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
    _add_stop_strings(model, kwargs)
    if synced_gpus:
        kwargs["synced_gpus"] = True
    _require_device(model, kwargs)
    return model.generate(**kwargs, custom_generate=partial(generate, mode=mode))


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


def _require_device(model: Any, kwargs: dict[str, Any]) -> None:
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        return
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.device != model.device:
            raise ModelError(f"{name} is on {value.device}, the model on {model.device}: move one of them")


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
) -> Any:
    assert input_ids is not None
    _require_device(model, {"input_ids": input_ids})

    def stock() -> Any:
        loop = compat.decoding_method(model, config, assistant)
        extra = {"streamer": streamer, **({"assistant_model": assistant} if assistant is not None else {})}
        return loop(
            model, input_ids, logits_processor=processors, stopping_criteria=criteria, generation_config=config,
            synced_gpus=synced_gpus, **extra, **kwargs,
        )  # fmt: skip

    on_cpu = input_ids.device.type != "cuda"
    if mode == "stock" or (on_cpu and mode == "auto"):
        return stock()
    reason = why_stock(model, input_ids, processors, criteria, config, synced_gpus, assistant, kwargs)
    if reason is None and on_cpu and mode == "captured":
        reason = "a CPU has no CUDA graphs"
    if reason is None:
        try:
            return _decode(model, Decoding(model, input_ids, processors, criteria, config, streamer, kwargs), mode)
        except StockLoop as error:
            reason = str(error)
    # Outside of the handler: its exception keeps the frames, and with them the memory, of what failed.
    _warn(f"generating in transformers' loop: {reason}")
    return stock()


class StockLoop(Exception):
    """A call runs in transformers' loop, for the reason in the message."""


def _decode(model: Any, decoding: Decoding, mode: str) -> Any:
    """Generate on the session for a batch, made if necessary. Raises ``StockLoop``."""
    decoding.prefill()
    if (reason := decoding.why_stock()) is not None:
        raise StockLoop(reason)
    rows, length = sessions.rows_bucket(decoding.rows), sessions.length_bucket(decoding.longest)
    key = (rows, length, mode, decoding.structure())
    found = sessions.find(model, key)
    if isinstance(found, str):
        raise StockLoop(found)
    session = found or _make_session(decoding, rows, length)
    if not session.lock.acquire(blocking=False):
        raise StockLoop("another thread is generating on this model's graphs")
    try:
        _prepare(model, key, session, decoding, mode, new=found is None)
        result = decoding.run(session)
    except BaseException as error:
        if not isinstance(error, StockLoop):
            sessions.drop(model, key)  # interrupted, or out of memory: its buffers are in the middle of a step
        raise
    finally:
        session.lock.release()
    if decoding.first_nan is not None:
        _warn(f"the logits have NaN from token {decoding.first_nan} of the sequence on: later tokens mean nothing")
    return result


def _make_session(decoding: Decoding, rows: int, length: int) -> DecodeSession:
    try:
        return DecodeSession(decoding.cache, rows, length, decoding.inputs, decoding.device)
    except torch.OutOfMemoryError:
        raise StockLoop(f"a cache of {rows} x {length} tokens does not fit on {decoding.device}") from None


def _prepare(
    model: Any, key: tuple[Any, ...], session: DecodeSession, decoding: Decoding, mode: str, new: bool
) -> None:
    """Load the batch into the session, and keep it if it is new.

    Raises ``StockLoop``. A step that cannot be captured, or that differs from transformers', is not tried again for
    this model and size.
    """
    try:
        reason = decoding.prepare(session, compiled=mode == "auto", captured=mode != "eager", check=new)
    except CaptureError as error:
        reason = f"the step cannot be captured ({error})"
    except torch.OutOfMemoryError:
        sessions.drop(model, key)
        torch.cuda.empty_cache()
        raise StockLoop(f"out of memory while the step was captured on {decoding.device}") from None
    if new or reason is not None:
        sessions.keep(model, key, session if reason is None else reason)
    if reason is not None:
        raise StockLoop(reason)


def _warn(message: str) -> None:
    warnings.warn(message, GenerationWarning, stacklevel=5)

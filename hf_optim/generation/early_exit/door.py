"""Generation with early exits, as transformers' ``custom_generate``."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError
from ...toolkit.compat import arguments_of_generate
from ...toolkit.exits import exits_of
from ...toolkit.offloading import stored_weights
from .. import sessions
from ..inputs import require_room
from ..quantized_cache import with_wanted_cache
from . import drafting, leaving
from .calls import Call, why_refused
from .classifier import classifier_of
from .confidence import Confidence
from .fingerprint import fingerprint, glance
from .settings import PROCESSORS, EarlyExit, certified_settings, settings_of
from .stack import Stack

# Fingerprints of weights, as long as the model's tensors are the same.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
# Attributes of logits processors that follow from the length of the prompt.
OF_THE_PROMPT = ("prompt_length_to_skip", "max_length", "min_length", "begin_index", "prompt_ignore_length", "device")


class GuaranteeWarning(UserWarning):
    """A call of ``generate`` with a certificate is not one that the certificate is for."""


def wanted(model: Any, early_exit: Any) -> EarlyExit | None:
    """Return the early exits of a call: those given, those in the model's configuration, or None.

    ``early_exit`` False is a call without exits. Raises ``ModelError`` for anything else.
    """
    if early_exit is None:
        return settings_of(model.config)
    if early_exit is False:
        return None
    if not isinstance(early_exit, EarlyExit):
        raise ModelError(f"early_exit must be an EarlyExit, False or None, not {type(early_exit).__name__}")
    return early_exit


def generate(
    model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, synced_gpus: bool,
    assistant: Any, kwargs: dict[str, Any], settings: EarlyExit,
) -> Any:  # fmt: skip
    """Decode a prepared call with early exits.

    Raises ``ModelError``, with the reason, for a call or a model that they do not serve, and for a certificate of other
    weights or settings; warns where a certificate is for another limit of new tokens, other processors of logits, or
    greedy tokens.
    """
    if (reason := why_refused(model, processors, config, synced_gpus, assistant, kwargs)) is not None:
        raise ModelError(f'early exits do not serve this call: {reason}; generate with mode="stock", at full depth')
    stack = Stack(model, settings)
    if settings.certificate is not None:
        _check_certificate(model, input_ids, processors, criteria, config, settings)
    stack.prove()
    call = Call(model, input_ids, processors, criteria, config, streamer, kwargs, settings.lossless)
    classifier = classifier_of(model) if settings.confidence == "classifier" else None
    confidence = Confidence(settings, stack, classifier)
    method = drafting.decode if settings.lossless else leaving.decode
    return method(call, stack, settings, confidence)


def custom(settings: EarlyExit) -> Any:
    """Return a function for ``model.generate(custom_generate=...)`` that decodes with these settings."""
    return partial(_custom, settings=settings)


def _custom(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    settings: EarlyExit, synced_gpus: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    given = arguments_of_generate()
    require_room(input_ids, stopping_criteria, kwargs)
    return generate(
        model, input_ids, logits_processor, stopping_criteria, generation_config, given.get("streamer"), synced_gpus,
        given.get("assistant_model"), with_wanted_cache(model, kwargs), settings,
    )  # fmt: skip


def weights_of(model: Any) -> str:
    """Return the fingerprint of a model's weights; computed again when its tensors are others or were written to.

    A write through ``.data``, as adapters are merged, leaves a tensor's version: so some values are compared, too.
    """
    with stored_weights(model):  # of an offloaded model
        now = (sessions.fingerprint(model), tuple(each._version for each in _tensors(model)), glance(_tensors(model)))
        if _KNOWN.get(model, (None, ""))[0] != now:
            _KNOWN[model] = (now, fingerprint(model))
    return _KNOWN[model][1]


def _tensors(model: Any) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    if (exits := exits_of(model)) is not None:
        yield from exits.parameters()


def described(processors: Iterable[Any]) -> list[str]:
    """Return what a list of logits processors does, as texts: classes and settings, without what follows the prompt."""
    found = []
    for each in processors:
        settings = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(each).items()}
        plain = [
            f"{name}={value}"
            for name, value in sorted(settings.items())
            if isinstance(value, (bool, int, float, str, list, tuple)) and name not in OF_THE_PROMPT
        ]
        found.append(f"{type(each).__name__}({', '.join(plain)})")
    return found


def _check_certificate(
    model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, settings: EarlyExit
) -> None:
    """Raise ``ModelError`` for a certificate of other weights or settings; warn of a call that it is not for."""
    certificate = settings.certificate
    assert certificate is not None
    again = "calibrate again with calm, or pass early_exit=dataclasses.replace(settings, certificate=None)"
    now = certified_settings(settings)
    if changed := [name for name, value in now.items() if certificate.settings.get(name) != value]:
        raise ModelError(
            f"the certificate of the early exits is for {changed[0]} {certificate.settings.get(changed[0])!r}, and the "
            f"setting is {now[changed[0]]!r}: {again} without a guarantee"
        )
    if weights_of(model) != certificate.model:
        raise ModelError(
            "the certificate of the early exits is for other weights than the model has (trained, quantized or cast "
            f"since): {again} without a guarantee"
        )
    reasons = []
    if (new := int(criteria.max_length) - input_ids.shape[1]) != settings.length:
        reasons.append(f"a limit of {new} new tokens, calibrated for {settings.length}")
    if config.do_sample:
        reasons.append("sampling, calibrated for greedy decoding")
    elif (used := described(processors)) != (then := list(certificate.settings.get(PROCESSORS, ()))):
        reasons.append(f"{', '.join(used) or 'no'} processors of logits, calibrated with {', '.join(then) or 'none'}")
    if reasons:
        _warn(f"the certificate of the early exits does not hold for this call: {'; '.join(reasons)}")


def _warn(message: str) -> None:
    level, frame = 1, sys._getframe()
    inside = ("hf_optim", "transformers", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GuaranteeWarning, stacklevel=level)

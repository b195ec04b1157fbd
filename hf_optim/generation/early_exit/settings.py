"""The settings of early exits in generation, and where a model keeps them.

A model's setting is the entry ``hf_optim_early_exit`` of its configuration. It changes no weight, and stock
transformers ignores it. All its fields are written, and all are required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import exp, isfinite
from typing import Any

from ...errors import ModelError, RecipeError
from ...toolkit.exits import EARLY_EXIT as SETTING
from ...trust.bounds import shown

CONFIDENCES = ("softmax_gap", "softmax_max", "state", "classifier")
DECAYS = ("none", "code", "paper")
LONGEST = 1 << 20
MOST_DRAFTS = 64


@dataclass(frozen=True)
class EarlyExit:
    """When ``hf_optim.generate`` stops computing a token.

    Attributes:
        confidence: ``"softmax_gap"``: of the two largest probabilities of an exit; ``"softmax_max"``: the largest;
            ``"state"``: the cosine of the states after the exit's block and the one before; ``"classifier"``: the
            probability, by a trained linear function of the state, that the exit's token is the full model's.
        threshold: a token leaves at the first exit whose confidence is not below; above 1 none leaves.
        layers: indices of the blocks after which a token may leave, counted from 0, ascending; empty for those of the
            model's exits, or every block but the last of a model without exits of its own.
        decay: how the threshold falls with the number t of tokens that were generated before, of ``length``:
            ``"none"``; ``"code"``: 0.9 threshold + 0.1 threshold exp(-temperature t / length), of the authors' code;
            ``"paper"``: 0.9 threshold + 0.1 exp(-temperature t / length), at most 1.
        temperature: of the decay.
        length: the limit of new tokens that the decay, and a certificate, are for.
        lossless: the exit drafts tokens, and the full model verifies them: its own tokens, sooner. Needs one layer.
        drafts: the most tokens drafted at once.
        draft_threshold: drafting ends where no row's confidence reaches it; 0 drafts always.
        classifier: checksum of the file of the trained classifier; None without one.
        certificate: what calibration proved (``Certificate``); None of a threshold that is just given.

    Raises ``RecipeError`` for other values.
    """

    confidence: str = "softmax_gap"
    threshold: float = 0.9
    layers: tuple[int, ...] = ()
    decay: str = "none"
    temperature: float = 4.0
    length: int = 128
    lossless: bool = False
    drafts: int = 4
    draft_threshold: float = 0.0
    classifier: str | None = None
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name, known in (("confidence", CONFIDENCES), ("decay", DECAYS), ("lossless", (True, False))):
            value = getattr(self, name)
            if value not in known or (name == "lossless" and not isinstance(value, bool)):
                raise RecipeError(f"{name} must be one of {', '.join(map(str, known))}, not {shown(value)}")
        for name in ("threshold", "temperature", "draft_threshold"):
            require_number(name, getattr(self, name), -1.0 if name == "threshold" else 0.0, 1e6)
        for name, most in (("length", LONGEST), ("drafts", MOST_DRAFTS)):
            require_count(name, getattr(self, name), most)
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not all(is_index(each) for each in layers):
            raise RecipeError(f"layers must be indices of blocks, counted from 0, not {shown(layers)}")
        if list(layers) != sorted(set(layers)):
            raise RecipeError(f"layers must ascend, each named once, not {shown(list(layers))}")
        if self.confidence == "state" and 0 in layers:
            raise RecipeError("with confidence state, no token can leave after block 0, which has no block before it")
        object.__setattr__(self, "layers", tuple(layers))
        if self.classifier is not None and not isinstance(self.classifier, str):
            raise RecipeError(f"classifier must be a checksum or null, not {shown(self.classifier)}")
        if isinstance(self.certificate, Mapping):
            object.__setattr__(self, "certificate", read_certificate(self.certificate))
        if self.certificate is not None and not isinstance(self.certificate, Certificate):
            raise RecipeError(f"certificate must be a mapping or null, not {shown(self.certificate)}")
        if self.lossless and len(self.layers) != 1:
            raise RecipeError("lossless decoding drafts after one block: name it in layers, as one index")
        if self.lossless and self.certificate is not None:
            raise RecipeError("lossless decoding gives the full model's tokens, and needs no certificate")

    def limit(self, step: int) -> float:
        """Return the threshold of the token before which ``step`` tokens were generated."""
        if self.decay == "none" or self.threshold > 1:
            return self.threshold
        fading = exp(-self.temperature * step / self.length)
        if self.decay == "code":
            return 0.9 * self.threshold + 0.1 * self.threshold * fading
        return min(1.0, max(0.0, 0.9 * self.threshold + 0.1 * fading))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for a configuration."""
        return asdict(self) | {
            "layers": list(self.layers),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }


@dataclass(frozen=True)
class Certificate:
    """What Learn-then-Test proved of a threshold, and of what it depends on.

    With a probability of at least 1 - epsilon over calibration sets, the expected loss of a prompt from the same
    source is at most delta.

    Attributes:
        guarantee: ``"consistency"``: the loss is the distance from the full model's output; ``"risk"``: by how much the
            distance from a reference is larger than the full model's.
        distance: ``"rouge_l"`` or ``"edit_distance"``.
        delta, epsilon: bound and level.
        examples: of the calibration set.
        mean: loss over them, at the threshold.
        p_value: at the threshold.
        tested: (threshold, mean, p-value) of all thresholds, in the order they were tested.
        settings: the fields of ``EarlyExit`` that the certificate is for, and the processors of logits.
        model: fingerprint of the weights.
        prompt: tokens of the prompts.
    """

    guarantee: str
    distance: str
    delta: float
    epsilon: float
    examples: int
    mean: float
    p_value: float
    tested: tuple[tuple[float, float, float], ...]
    settings: Mapping[str, Any] = field(hash=False)
    model: str
    prompt: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for a configuration."""
        return asdict(self) | {"tested": [list(each) for each in self.tested], "settings": dict(self.settings)}


# The fields that decide which token is generated: a certificate is for their values.
CERTIFIED = ("confidence", "threshold", "layers", "decay", "temperature", "length", "classifier")
# Beside them in a certificate's settings: the processors of logits that the model's generation configuration made.
PROCESSORS = "processors"


def certified_settings(settings: EarlyExit) -> dict[str, Any]:
    """Return the fields that a certificate is for, as JSON types."""
    return {name: value for name, value in settings.to_dict().items() if name in CERTIFIED}


def read_certificate(found: Mapping[str, Any]) -> Certificate:
    """Return the certificate of an entry of a configuration. Raises ``RecipeError`` for a malformed one."""
    known = [each.name for each in fields(Certificate)]
    require_fields("certificate", found, known)
    given = dict(found)
    try:
        given["tested"] = tuple((float(a), float(b), float(c)) for a, b, c in given["tested"])
    except (TypeError, ValueError) as error:
        raise RecipeError("certificate.tested must be a list of [threshold, mean, p-value]") from error
    for name in ("delta", "epsilon", "mean", "p_value"):
        require_number(f"certificate.{name}", given[name], 0.0, 1.0)
    for name in ("examples", "prompt"):
        require_count(f"certificate.{name}", given[name], 1 << 40)
    for name in ("guarantee", "distance", "model"):
        if not isinstance(given[name], str):
            raise RecipeError(f"certificate.{name} must be a text, not {shown(given[name])}")
    if not isinstance(given["settings"], Mapping):
        raise RecipeError(f"certificate.settings must be a mapping, not {shown(given['settings'])}")
    return Certificate(**given)


def require_fields(what: str, found: Mapping[str, Any], known: list[str]) -> None:
    """Raise ``RecipeError`` unless a mapping has these fields and no others."""
    if unknown := sorted(str(key) for key in found if key not in known):
        raise RecipeError(f"{what} has {shown(unknown[0])}; it has {', '.join(known)}")
    if missing := [name for name in known if name not in found]:
        raise RecipeError(f"{what} has no {missing[0]}: it is incomplete")


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ``RecipeError`` unless a value is a finite number from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not isfinite(value) or not low <= value <= high:
        raise RecipeError(f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}")


def require_count(name: str, value: Any, most: int) -> None:
    """Raise ``RecipeError`` unless a value is a whole number from 1 to ``most``."""
    if not is_count(value) or value > most:
        raise RecipeError(f"{name} must be a whole number from 1 to {most}, not {shown(value)}")


def is_count(value: Any) -> bool:
    """Return True for a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_index(value: Any) -> bool:
    """Return True for a whole number from 0 on that a block may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LONGEST


def settings_of(config: Any) -> EarlyExit | None:
    """Return the early exits in the configuration of a model (or of its text part); None if there are none.

    Raises ``ModelError`` for an entry that is incomplete or has other values.
    """
    found = getattr(config.get_text_config(decoder=True), SETTING, None)
    if found is None:
        return None
    where = f"{SETTING} in the configuration"
    if not isinstance(found, Mapping):
        raise ModelError(f"{where} is {shown(found)}, not a mapping")
    try:
        require_fields(where, found, [each.name for each in fields(EarlyExit)])
        return EarlyExit(**found)
    except RecipeError as error:
        raise ModelError(f"{where}: {error}" if where not in str(error) else str(error)) from error


def set_settings(config: Any, settings: EarlyExit | None) -> None:
    """Write early exits into the configuration of a model, or remove them."""
    own = config.get_text_config(decoder=True)
    if settings is not None:
        setattr(own, SETTING, settings.to_dict())
    elif hasattr(own, SETTING):
        delattr(own, SETTING)

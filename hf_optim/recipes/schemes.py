"""Quantization schemes by the names of the field: ``W4A16``, ``W8A8``, ``FP8_DYNAMIC`` and so on.

The names and their meaning are those of compressed-tensors (``compressed_tensors.quantization.PRESET_SCHEMES``), which
vLLM and llm-compressor use. A scheme says what is stored, not how the codes are found: it can be given to any step that
quantizes (``scheme: W4A16``), which takes its fields from it, or stand alone as a recipe with the step that
``scheme_steps.yaml`` names for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from ..errors import RecipeError
from ..trust.bounds import shown
from .field_checks import admits, did_you_mean

GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """What is stored of a linear layer, and how its inputs are rounded.

    Attributes:
        bits: of a weight.
        type: ``"int"``, ``"float"``: float8 (e4m3), or the 4-bit floats ``"nvfp4"`` and ``"mxfp4"``.
        strategy: which weights share a scale: ``"tensor"``, ``"channel"`` (an output channel) or ``"group"``.
        group_size: inputs that share a scale, with the strategy ``"group"``.
        symmetric: no zero points.
        activations: the type to which inputs are rounded; None leaves them as they are.
        dynamic: scales of the inputs are computed per token at run time, not calibrated per tensor.
    """

    bits: int
    type: Literal["int", "float", "nvfp4", "mxfp4"] = "int"
    strategy: Literal["tensor", "channel", "group"] = "group"
    group_size: int | None = GROUP
    symmetric: bool = True
    activations: Literal["int8", "fp8", "int4"] | None = None
    dynamic: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        """The scheme in the field names that quantizing techniques share."""
        return {
            "bits": self.bits,
            "format": "fp8" if self.type == "float" else self.type,
            "strategy": "tensor" if self.strategy == "tensor" else None,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activations": self.activations,
            "dynamic": self.dynamic,
            "symmetric_activations": True,
        }


_CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}
_INT8 = Scheme(8, activations="int8", **_CHANNEL)
SCHEMES: dict[str, Scheme] = {
    **{f"W{bits}A16": Scheme(bits) for bits in range(2, 9)},
    "W4A16_ASYM": Scheme(4, symmetric=False),
    **{f"W{bits}A8": Scheme(bits, activations="int8") for bits in range(2, 8)},
    **{f"W{bits}A4": Scheme(bits, activations="int4") for bits in range(2, 5)},
    "W8A8": _INT8,
    "INT8": _INT8,
    "W4AFP8": Scheme(4, activations="fp8"),
    "FP8": Scheme(8, "float", "tensor", None, activations="fp8", dynamic=False),
    "FP8_DYNAMIC": Scheme(8, "float", activations="fp8", **_CHANNEL),
    "NVFP4A16": Scheme(4, "nvfp4", group_size=16),
    "MXFP4A16": Scheme(4, "mxfp4", group_size=32),
}
# What a field means if a technique does not have it; any other value of the scheme is refused.
_ABSENT = {
    "format": ("int", "float8 or float4 weights"),
    "strategy": (None, "one scale per tensor"),
    "symmetric": (True, "zero points"),
    "activations": (None, "quantized inputs"),
    "dynamic": (True, "static scales of the inputs"),
    "symmetric_activations": (True, "zero points of the inputs"),
}
_FLOAT4 = "inputs of 4-bit floats are not among hf_optim's formats; {} has the same weights, and plain inputs"
_MICROSCALED = "MX formats of other bits than 4, or of inputs, are not among hf_optim's formats"
REFUSED = {
    "UNQUANTIZED": "it quantizes nothing: leave the layers out with skip",
    "NVFP4": _FLOAT4.format("NVFP4A16"),
    "MXFP4": _FLOAT4.format("MXFP4A16"),
    "FP8_BLOCK": "float8 weights with a scale per block of 128 x 128 are not among hf_optim's formats; FP8_DYNAMIC "
    "has one scale per output channel",
    **dict.fromkeys(("MXFP4XFP8", "MXFP6A8", "MXFP6A16", "MXFP8", "MXFP8A16"), _MICROSCALED),
}


@cache
def _steps() -> dict[str, str]:
    text = (resources.files("hf_optim.recipes") / "scheme_steps.yaml").read_text(encoding="utf-8")
    return {scheme: technique for technique, schemes in yaml.safe_load(text).items() for scheme in schemes}


def technique_of(name: str) -> str:
    """Return the technique that a recipe of a scheme's name alone runs."""
    return _steps()[name]


def describe_scheme(name: str) -> dict[str, str]:
    """Return the name of a scheme, the step that it runs alone, and what it stores, in words."""
    scheme = SCHEMES[name]
    kind = {"float": "float8", "int": f"int{scheme.bits}"}.get(scheme.type, "float4 (e2m1)")
    shared = {"group": f"a group of {scheme.group_size} inputs", "channel": "an output channel", "tensor": "a tensor"}
    zero = "" if scheme.symmetric else " and one zero point"
    inputs = "inputs as they are"
    if scheme.activations is not None:
        inputs_kind = "float8" if scheme.activations == "fp8" else scheme.activations
        inputs = f"inputs {inputs_kind}, one scale for {'a token' if scheme.dynamic else 'a tensor, calibrated'}"
    one = {"nvfp4": "one e4m3 scale", "mxfp4": "one power of two"}.get(scheme.type, "one scale")
    stored = f"weights {kind}, {one}{zero} for {shared[scheme.strategy]}; {inputs}"
    return {"name": name, "technique": technique_of(name), "stored": stored}


def is_scheme(name: str) -> bool:
    """Return True if a name is that of a scheme, in upper or lower case, whether hf_optim can express it or not."""
    return len(name) < 40 and name.upper() in {*SCHEMES, *REFUSED}


def find_scheme(name: Any) -> tuple[str, Scheme]:
    """Return the name of a scheme as compressed-tensors writes it, and the scheme.

    Raises ``RecipeError`` for an unknown name, and for a scheme that no format of hf_optim can express.
    """
    key = name.upper() if isinstance(name, str) and len(name) < 40 else None
    if key in REFUSED:
        raise RecipeError(f"scheme {key} cannot be written: {REFUSED[key]} (schemes: {', '.join(sorted(SCHEMES))})")
    if key not in SCHEMES:
        hint = did_you_mean(str(key), SCHEMES) if key else ""
        raise RecipeError(f"no scheme {shown(name)}{hint} (the schemes are {', '.join(sorted(SCHEMES))})")
    return key, SCHEMES[key]


def takes_scheme(hints: Mapping[str, Any]) -> bool:
    """Return True if a technique with fields of these types quantizes uniformly, so that a scheme says its fields."""
    return {"bits", "group_size"} <= set(hints) and "scheme" not in hints


def fields_of_scheme(technique: str, hints: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return the fields of a technique that make it quantize by a scheme.

    Args:
        technique: its name, for messages.
        hints: the types of its fields, by name.
        name: the scheme.

    Raises ``RecipeError`` if the technique cannot produce the scheme.
    """
    key, scheme = find_scheme(name)
    if not takes_scheme(hints):
        raise RecipeError(f"{technique} has a format of its own, which no scheme describes: leave scheme out")
    fields = {}
    for field, value in scheme.fields.items():
        if field in hints:
            if not admits(hints[field], value):
                raise RecipeError(f"{technique} cannot quantize to {key}: its {field} cannot be {value!r}; use rtn")
            fields[field] = value
        elif field in _ABSENT and value != _ABSENT[field][0]:
            raise RecipeError(f"{technique} cannot quantize to {key}: it has no {_ABSENT[field][1]}; use rtn")
    return fields


def with_scheme(technique: str, hints: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a step with its ``scheme`` written out.

    Raises ``RecipeError`` if the technique cannot produce the scheme, and if another field contradicts it.
    """
    given = {key: value for key, value in fields.items() if key != "scheme"}
    implied = fields_of_scheme(technique, hints, fields["scheme"])
    for key, value in implied.items():
        if key in given and given[key] != value:
            raise RecipeError(
                f"{technique}: scheme {str(fields['scheme']).upper()} means {key}: {_written(value)}, not "
                f"{shown(given[key])}; leave out {key}, or leave out scheme and give its fields"
            )
    return {**implied, **given}


def _written(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or value in (True, False) else str(value)
    )

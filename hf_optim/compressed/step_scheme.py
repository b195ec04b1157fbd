"""How the codes of a step will be stored, from its fields alone: before any work, and without weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..recipes.technique import Technique
from ..toolkit.quantization import float4
from .quantizer import packing_fits
from .schemes import scheme

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


def scheme_of_step(step: Technique) -> QuantizationScheme:
    """Return the scheme that a step which writes a compressed format gives its layers; one scale for each channel.

    Groups of scales do not decide how codes are stored, so they are left out; so are those of 4-bit floats, which not
    every layer fits.
    """
    bits = getattr(step, "bits", 8)
    return scheme(
        bits,
        "int" if bits is not None and getattr(step, "format", "int") == "int" else "float",
        symmetric=getattr(step, "symmetric", True),
        activations=getattr(step, "activations", None),
        static=not getattr(step, "dynamic", True),
        symmetric_activations=getattr(step, "symmetric_activations", True),
    )


def packs_codes(step: Technique, model: Any, names: Collection[str]) -> bool:
    """Return True if a checkpoint of ``model`` will have the codes of a step without gaps, False for a byte each.

    4-bit floats are packed always.

    Args:
        step: a step that quantizes weights.
        model: the model; it may be on the meta device.
        names: the linear layers that the step quantizes.
    """
    if getattr(step, "format", "int") in float4.GROUPS:
        return True
    format = scheme_of_step(step).format
    if str(getattr(format, "value", format)) != "pack-quantized":
        return False
    return packing_fits(model, names) if names else True

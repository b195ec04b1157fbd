"""Conversions of dense weights, which transformers cannot combine with codes.

transformers builds some parameters from several tensors of a checkpoint, or several from one: the convolutions of
linear attention from one each for q, k and v, the projections of a vision tower from a fused one. When it reads a
compressed-tensors checkpoint, it decodes codes in front of each such conversion and drops what is not a code
(transformers 5.24, ``CompressedTensorsDequantize``), so these parameters find no tensor. In a quantized checkpoint they
therefore have the names and shapes of the model, which transformers reads as they are.

One tensor that becomes several parameters has no such way out: transformers raises when it puts the decoding in front of
the conversion, whatever the checkpoint holds. It does not if one of the parameters has codes (``unreadable_reason``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..toolkit import compat
from ..trust.bounds import first_line

WEIGHT = ".weight"


def keep_model_names(model: Any) -> None:
    """Make ``save_pretrained`` write the parameters that come from conversions of dense weights as the model has them.

    Conversions of experts stay: their codes are stored one matrix for each expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = compat.weight_conversions(model)
    if not used:  # the model was not loaded: transformers would take its own, without changes of prefixes
        own = get_model_conversion_mapping(model, add_legacy=False)
        used = [each for each in own if not isinstance(each, PrefixChange)]
    kept = [each for each in used if not _converts_dense_weights(each)]
    if len(kept) < len(used):
        model._weight_conversions = kept


def _converts_dense_weights(conversion: Any) -> bool:
    from transformers.core_model_loading import WeightConverter

    if not isinstance(conversion, WeightConverter):
        return False
    sources = conversion._original_source_patterns
    return all(source.endswith(WEIGHT) for source in sources) and not any("experts" in source for source in sources)


def unreadable_reason(model: Any, quantized: Iterable[str]) -> str:
    """Return why stock transformers cannot read a checkpoint of a model with codes in these layers, or ``""``.

    Args:
        model: an unquantized model.
        quantized: the names of the layers that get codes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not any(_converts_dense_weights(each) for each in conversions):
        return ""
    quantizer = CompressedTensorsHfQuantizer.__new__(CompressedTensorsHfQuantizer)
    quantizer.pre_quantized, quantizer.use_fp8_kernel = True, False  # type: ignore[attr-defined]
    try:
        quantizer.update_weight_conversions(conversions, _WithScales(model, quantized))
    except ValueError as error:
        return f"it cannot decode codes in front of its conversions for this class ({first_line(error)[:200]})"
    except (TypeError, AttributeError):
        return ""  # this version does not combine decoding with conversions of dense weights
    return ""


class _WithScales:
    """The parameters of a model, with the scales of layers that will be quantized."""

    def __init__(self, model: nn.Module, quantized: Iterable[str]) -> None:
        self._model, self._quantized = model, tuple(quantized)

    def named_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from self._model.named_parameters()
        yield from ((f"{name}.weight_scale", None) for name in self._quantized)

"""Conversions of dense weights, which transformers cannot combine with codes.

transformers builds some parameters from several tensors of a checkpoint, or several from one: the convolutions of
linear attention from one each for q, k and v, the projections of a vision tower from a fused one. When it reads a
compressed-tensors checkpoint, it decodes codes in front of each such conversion and drops what is not a code
(transformers 5.24, ``CompressedTensorsDequantize``), so these parameters find no tensor. In a quantized checkpoint they
therefore have the names and shapes of the model, which transformers reads as they are.
"""

from __future__ import annotations

from typing import Any

from ..toolkit import compat

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

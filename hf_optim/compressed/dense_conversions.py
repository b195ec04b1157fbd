"""Conversions of weights that are not codes, which transformers cannot combine with codes.

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

    Conversions of experts stay, since transformers reads the experts of its own classes only as one matrix for each;
    but see ``keep_float_stacks``.
    """
    used = compat.weight_conversions(model) or _own_conversions(model)
    kept = [each for each in used if not _converts_dense_weights(each)]
    if len(kept) < len(used):
        model._weight_conversions = kept
    keep_float_stacks(model)


def forget_conversions(model: Any) -> None:
    """Make ``save_pretrained`` write the tensors that the loader of the model's class reads; call it if that changed.

    transformers keeps the conversions with which it loaded a model, and saves under the names of that checkpoint. They
    belong to the class that was loaded: those of Mixtral's experts are looked up by its ``model_type``, and another
    type would find no weights of experts. Without them, transformers saves as it would load.
    """
    vars(model).pop("_weight_conversions", None)


def keep_float_stacks(model: Any) -> None:
    """Make ``save_pretrained`` write experts in floating point stacked, if the class of the model reads them so.

    Codes have the names of one matrix for each expert before ``save_pretrained`` renames anything.
    """
    if reads_float_stacks(model):
        used = getattr(model, "_weight_conversions", None)
        used = _own_conversions(model) if used is None else used
        model._weight_conversions = [each for each in used if not _converts_experts(each)]


def reads_float_stacks(model: Any) -> bool:
    """Return True if experts in floating point can be stored beside the integer codes of other layers.

    This holds for classes whose code is saved with the checkpoint (``toolkit.modules.coded_experts``).
    """
    return bool(getattr(type(model), "keeps_float_stacks", False))


def _own_conversions(model: Any) -> list[Any]:
    """Return the conversions with which transformers saves a model that was not loaded: without changes of prefixes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    own = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in own if not isinstance(each, PrefixChange)]


def _converts_dense_weights(conversion: Any) -> bool:
    sources = _sources(conversion)
    return bool(sources) and all(s.endswith(WEIGHT) for s in sources) and not _converts_experts(conversion)


def _converts_experts(conversion: Any) -> bool:
    return any("experts" in source for source in _sources(conversion))


def _sources(conversion: Any) -> list[str]:
    """Return the patterns of the tensors that are converted; none for a conversion that only renames."""
    from transformers.core_model_loading import WeightConverter

    return list(conversion._original_source_patterns) if isinstance(conversion, WeightConverter) else []

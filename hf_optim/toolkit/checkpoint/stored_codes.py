"""What a quantized checkpoint must hold before it is loaded: a known format, and all tensors of each layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CheckpointError
from ...trust.bounds import shown
from ...trust.patterns import compile_pattern
from .safetensors import FLOAT_DTYPES, TensorInfo

INTEGERS = ("I8", "U8", "I16", "I32", "I64")
# The values of ``quant_method`` whose tensors are checked; None is a checkpoint that is not quantized.
CHECKED_METHODS = (None, "compressed-tensors")
# Local names that only tensors of quantized layers have.
CODE_NAMES = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale"),
        *("input_scale", "input_zero_point", "weight_scale_inv", "activation_scale"),
        *("qweight", "qzeros", "scales", "g_idx", "SCB", "absmax", "quant_map", "weight_format"),
    }
)


def require_known_format(config: Any, where: str) -> str | None:
    """Return the ``quant_method`` of a checkpoint's configuration; None if it is not quantized.

    Raises ``CheckpointError`` for a method that transformers cannot load: it would skip the quantization, and leave the
    layers at random values.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None and hasattr(config, "get_text_config"):
        stored = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        stored = stored.to_dict() if hasattr(stored, "to_dict") else {}
    _require_fast_patterns(stored, where)
    method = stored.get("quant_method")
    method = str(getattr(method, "value", method))
    if stored.get("load_in_8bit") or stored.get("load_in_4bit"):
        method = "bitsandbytes_4bit" if stored.get("load_in_4bit") else "bitsandbytes_8bit"
    known = _known_methods()
    if method not in known:
        raise CheckpointError(
            f"{where}: the quantization_config of config.json has quant_method {shown(method)}, which transformers "
            f"cannot load (it knows {', '.join(sorted(known))})"
        )
    if method == "compressed-tensors":
        groups = stored.get("config_groups")
        others = stored.get("sparsity_config") or stored.get("kv_cache_scheme")
        if not (isinstance(groups, Mapping) and groups) and not others:
            raise CheckpointError(
                f"{where}: the quantization_config of config.json has no config_groups, so that no layer would be "
                "decoded; restore the file that belongs to these weights"
            )
    return method


def _require_fast_patterns(stored: Mapping[str, Any], where: str) -> None:
    """Raise ``CheckpointError`` for a regular expression among targets or exceptions that could take for ever."""
    waiting: list[Any] = [stored]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            waiting += part
        elif isinstance(part, str) and part.startswith("re:"):
            try:
                compile_pattern(part[3:])
            except ValueError as error:
                raise CheckpointError(f"{where}: the quantization_config of config.json: {error}") from error


def _known_methods() -> set[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return {str(getattr(name, "value", name)) for name in AUTO_QUANTIZATION_CONFIG_MAPPING}


def require_whole_codes(entries: Mapping[str, TensorInfo], method: str | None, where: str) -> None:
    """Raise ``CheckpointError`` for codes or scales of a wrong dtype, and for a GPTQ or AWQ layer that lacks tensors.

    Checked for compressed-tensors, GPTQ, AWQ and AutoRound; ``method`` is the ``quant_method``.
    """
    layers: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for key, entry in entries.items():
        layer, _, leaf = key.rpartition(".")
        layers[layer][leaf] = entry
    from transformers.utils.quantization_config import QuantizationMethod as Method

    words = dict.fromkeys((Method.GPTQ.value, Method.AWQ.value, Method.AUTOROUND.value), _words)
    checks = {Method.COMPRESSED_TENSORS.value: _compressed_tensors, **words}
    check = checks.get(method or "")
    if check is None:
        return
    for name, own in layers.items():
        if problem := check(own):
            raise CheckpointError(f"{where}: {problem.format(layer=name)}")


def _compressed_tensors(own: Mapping[str, TensorInfo]) -> str:
    """Return what is wrong with the tensors of one module, ``{layer}``, or ``""``."""
    if any(key.startswith("weight_") and key not in CODE_NAMES for key in own) or "compressed" in own:
        return ""  # sparse formats have tensors of their own
    weight, packed, scale = own.get("weight"), own.get("weight_packed"), own.get("weight_scale")
    if packed is not None and packed.type not in INTEGERS:
        return f"{{layer}}.weight_packed is stored as {packed.type}, not as integer words"
    for key in ("weight_scale", "weight_global_scale", "input_scale"):
        if key in own and own[key].type in INTEGERS and not (key == "weight_scale" and own[key].type == "U8"):
            return f"{{layer}}.{key} is stored as {own[key].type}, not in floating point"
    if "weight_shape" in own and own["weight_shape"].type not in ("I32", "I64"):
        return f"{{layer}}.weight_shape is stored as {own['weight_shape'].type}, not as integers"
    if scale is not None and weight is not None and packed is None and weight.type in (*FLOAT_DTYPES, "I32", "I64"):
        return f"{{layer}}.weight is stored as {weight.type}, but it has a weight_scale: its codes are I8 or F8_E4M3"
    codes = packed if packed is not None else weight
    rows = codes.shape[0] if codes is not None and codes.type in INTEGERS and codes.shape else None
    if rows is not None and scale is not None and scale.shape and scale.shape[0] not in (1, rows):
        # Some versions of transformers take any shape.
        return f"{{layer}}.weight_scale has {scale.shape[0]} rows, and the codes of this layer have {rows}"
    return _first_type(own, ("weight_zero_point", "weight_g_idx", "input_zero_point"), INTEGERS)


def _words(own: Mapping[str, TensorInfo]) -> str:
    if "qweight" not in own and "qzeros" not in own:
        return ""
    for name in ("qweight", "qzeros", "scales"):
        if name not in own:
            return f"the checkpoint has no {{layer}}.{name}, but {', '.join(sorted(own))} of this layer"
    return _first_type(own, ("qweight", "qzeros", "g_idx"), ("I32",)) or _first_type(own, ("scales",), FLOAT_DTYPES)


def _first_type(own: Mapping[str, TensorInfo], names: Iterable[str], types: tuple[str, ...]) -> str:
    for name in names:
        if name in own and own[name].type not in types:
            return f"{{layer}}.{name} is stored as {own[name].type}, expected {' or '.join(types)}"
    return ""

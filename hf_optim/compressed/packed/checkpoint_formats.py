"""Checkpoint formats: from the ``quantization_config`` of a checkpoint to the tensor layouts of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import CheckpointError, ModelError
from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, SafetensorsHeaders, UnsupportedCheckpoint
from ...trust.bounds import first_line
from ..float4 import FORMATS as FLOAT4
from ..float4 import float4_format
from .describe import scheme_unsupported_reason
from .layouts import CompressedTensorsLayout, Layout
from .word_formats import CheckpointFormat, auto_round_format, awq_format, gptq_format

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
# The module with which compressed-tensors quantizes keys and values, where it knows the model's attention.
APPLIES_SCALES = "QuantizedKVCache"
# In the dict of a loaded model: what ``unapplied_cache_scheme`` found.
UNAPPLIED_CACHE = "_hf_optim_unapplied_cache"
# The keys of a compressed-tensors configuration that are read here, or do not affect the layers.
KNOWN_KEYS = ("version", "quant_method", "config_groups", "format", "ignore", "quantization_status")


def parse_checkpoint_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of checkpoints with this ``quantization_config``. Raises ``UnsupportedCheckpoint``."""
    from transformers.utils.quantization_config import QuantizationMethod as Method

    method = config.get("quant_method")
    parsers = {
        Method.COMPRESSED_TENSORS.value: _compressed_tensors,
        Method.GPTQ.value: gptq_format,
        Method.AWQ.value: awq_format,
        Method.AUTOROUND.value: auto_round_format,
        Method.MXFP4.value: _mxfp4,
    }
    if not isinstance(method, str) or method not in parsers:
        raise UnsupportedCheckpoint(f"quant_method {method!r}")
    try:
        return parsers[method](config)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        # A value of another type than the format has. Stock transformers refuses it in its own words.
        raise UnsupportedCheckpoint(f"quantization_config: {first_line(error)}") from error


def _compressed_tensors(config: Mapping[str, Any]) -> CheckpointFormat:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    if not config.get("config_groups"):
        raise UnsupportedCheckpoint("no config_groups")
    _require_no_online_transforms(config.get("transform_config"))
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise UnsupportedCheckpoint(f"a sparsity_config with format {sparsity['format']!r}: save it uncompressed")
    if config.get("quantization_status") != "compressed":
        raise UnsupportedCheckpoint("its weights are not compressed")
    try:
        known = {key: value for key, value in config.items() if key in KNOWN_KEYS and key != "version"}
        known["config_groups"] = {name: _without_actorder(group) for name, group in config["config_groups"].items()}
        parsed = QuantizationConfig.model_validate(known)
    except (ValidationError, ValueError) as error:
        raise UnsupportedCheckpoint(f"quantization_config: {first_line(error)}") from error
    layouts = {name: _layout(scheme, config.get("format")) for name, scheme in parsed.config_groups.items()}
    targets = {target: layouts[name] for name, scheme in parsed.config_groups.items() for target in scheme.targets}
    return lambda model, headers: _matched(model, headers, targets, parsed.ignore or [])


def _require_no_online_transforms(config: Any) -> None:
    """Raise ``CheckpointError`` for rotations of activations, which stock transformers would leave out in silence.

    Those of weights (``weight_input``, ``weight_output``) are in the weights already.
    """
    for name, scheme in ((config or {}).get("config_groups") or {}).items():
        places = {str(each.get("location")) for each in scheme.get("apply") or ()}
        if online := sorted(place for place in places if not place.startswith("weight_")):
            raise CheckpointError(
                f"its transform_config rotates activations while the model runs ({name}: {', '.join(online)}), which "
                "is not supported, and without it the weights compute something else: use a checkpoint whose rotations "
                "are all folded into the weights"
            )


def unapplied_cache_scheme(model: nn.Module, config: Any) -> str:
    """Return the kind of keys and values (``"int8"``) that a checkpoint asks for and its loaded model does not have.

    ``config`` is the model's configuration as it was stored. Empty if there is nothing of the kind.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if not isinstance(stored, Mapping):
        stored = stored.to_dict() if hasattr(stored, "to_dict") else {}
    scheme = stored.get("kv_cache_scheme")
    if not scheme or any(type(module).__name__ == APPLIES_SCALES for module in model.modules()):
        return ""
    scheme = scheme if isinstance(scheme, Mapping) else scheme.model_dump()
    return f"{'float' if scheme.get('type') == 'float' else 'int'}{scheme.get('num_bits')}"


def unapplied_cache_warning(kind: str) -> str:
    """Return what a checkpoint's scales of keys and values would have done, and what to do instead."""
    return (
        f"keys and values stay in full precision: the checkpoint's kv_cache_scheme ({kind}, scales in the file) is not "
        "applied, so that its results are those of the weights alone, and its cache takes the memory of the model's "
        "dtype; save_pretrained writes neither scheme nor scales. For a cache of 8 bits with scales of its own, give "
        "generate past_key_values=hf_optim.key_value_cache(model, hf_optim.KeyValueScheme(bits=8))"
    )


def require_divisible_inputs(model: nn.Module) -> None:
    """Raise ``ModelError`` for a layer whose inputs are quantized in groups that they are not a multiple of."""
    for name, module in model.named_modules():
        inputs: Any = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        size = getattr(inputs, "group_size", None)
        if isinstance(module, nn.Linear) and inputs is not None and size and module.in_features % size:
            raise ModelError(
                f"the inputs of {name} are quantized in groups of {size}, and {module.in_features} columns are not a "
                "multiple of that: neither hf_optim nor compressed-tensors runs it; quantize it per token"
            )


def _without_actorder(group: Any) -> Any:
    # Newer releases reject the value "group". The tensors (weight_g_idx) show if columns were sorted.
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return {**group, "weights": {**weights, "actorder": None}} if weights else group


def _layout(scheme: QuantizationScheme, default_format: Any) -> CompressedTensorsLayout:
    from compressed_tensors.config import CompressionFormat

    if reason := scheme_unsupported_reason(scheme):
        raise UnsupportedCheckpoint(reason)
    format = scheme.format or default_format
    stored = str(getattr(format, "value", format))
    kind = float4_format(scheme.weights)
    if stored not in FORMATS and stored != FLOAT4.get(kind):
        raise UnsupportedCheckpoint(f"format {stored!r}")
    kept = scheme.model_copy(deep=True)
    kept.format = CompressionFormat(stored)
    if stored == "pack-quantized" and not kept.weights.symmetric:
        # For saving the model again: see ``schemes.scheme``.
        kept.format = CompressionFormat.naive_quantized
    return CompressedTensorsLayout(kept, stored)


def _matched(
    model: nn.Module, headers: SafetensorsHeaders, targets: Mapping[str, CompressedTensorsLayout], ignore: list[str]
) -> dict[str, Layout]:
    from compressed_tensors.utils.match import match_named_modules, match_targets

    found: dict[str, Layout] = {}
    for name, module in match_named_modules(model, list(targets), ignore):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
        layout = targets[match_targets(name, module, list(targets))[0]]
        entry = headers.find(f"{name}.{layout.key}")
        if entry is None and headers.find(f"{name}.weight_scale") is None:
            continue  # a layer that is new (a head) or was left dense
        if entry is not None and layout.key == "weight" and entry.type in FLOAT_DTYPES:
            continue
        found[name] = layout
    return found


def _mxfp4(config: Mapping[str, Any]) -> CheckpointFormat:
    if config.get("dequantize"):
        raise UnsupportedCheckpoint("its configuration asks for decoded weights")
    return lambda model, headers: {}  # experts alone are quantized: ``mxfp4_experts``

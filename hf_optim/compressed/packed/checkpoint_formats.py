"""Checkpoint formats: from the ``quantization_config`` of a checkpoint to the tensor layouts of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, SafetensorsHeaders, UnsupportedCheckpoint
from ...trust.bounds import first_line
from .describe import scheme_unsupported_reason
from .layouts import AWQLayout, CompressedTensorsLayout, GPTQLayout, Layout

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

# (model, tensors of its checkpoint) -> the layout of each of its compressed linears, by name.
CheckpointFormat = Callable[[nn.Module, SafetensorsHeaders], dict[str, Layout]]

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
# The keys of a compressed-tensors configuration that are read here, or do not affect the layers.
KNOWN_KEYS = ("version", "quant_method", "config_groups", "format", "ignore", "quantization_status")


def parse_checkpoint_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of checkpoints with this ``quantization_config``. Raises ``UnsupportedCheckpoint``."""
    from transformers.utils.quantization_config import QuantizationMethod as Method

    method = config.get("quant_method")
    parsers = {
        Method.COMPRESSED_TENSORS.value: _compressed_tensors,
        Method.GPTQ.value: _gptq,
        Method.AWQ.value: _awq,
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
    for key, value in config.items():
        # These do not concern linear layers only.
        if value and key in ("kv_cache_scheme", "transform_config"):
            raise UnsupportedCheckpoint(f"a {key}")
        if key == "sparsity_config" and value and value.get("format", "dense") != "dense":
            raise UnsupportedCheckpoint(f"a {key}")
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
    if stored not in FORMATS:
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
        if type(module).forward is not nn.Linear.forward:
            raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
        layout = targets[match_targets(name, module, list(targets))[0]]
        entry = headers.find(f"{name}.{layout.key}")
        if entry is None and headers.find(f"{name}.weight_scale") is None:
            continue  # a layer that is new (a head) or was left dense
        if entry is not None and layout.key == "weight" and entry.type in FLOAT_DTYPES:
            continue
        found[name] = layout
    return found


def _gptq(config: Mapping[str, Any]) -> CheckpointFormat:
    bits, size = config.get("bits"), config.get("group_size", 128)
    version_1 = str(config["quant_method"])  # the first version of the format has no suffix
    version = config.get("checkpoint_format") or version_1
    if bits not in (2, 3, 4, 8) or version not in (version_1, f"{version_1}_v2") or config.get("dynamic"):
        raise UnsupportedCheckpoint(
            f"GPTQ with bits {bits}, checkpoint_format {version!r}, dynamic {config.get('dynamic')}"
        )
    layout = GPTQLayout(bits, _group_size(size), zero_points_minus_one=version == version_1)
    return lambda model, headers: _named(model, headers, layout)


def _awq(config: Mapping[str, Any]) -> CheckpointFormat:
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size", 128))
    version = str(getattr(config.get("version"), "value", config.get("version") or "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedCheckpoint(f"AWQ with bits {bits}, version {version!r}")
    layout = AWQLayout(_group_size(size))
    return lambda model, headers: _named(model, headers, layout)


def _group_size(size: Any) -> int | None:
    return None if size in (None, -1) else int(size)


def _named(model: nn.Module, headers: SafetensorsHeaders, layout: Layout) -> dict[str, Layout]:
    """Assign ``layout`` to the linears with a ``qweight`` in the checkpoint; the configuration does not list them."""
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        if headers.find(f"{name}.{layout.key}") is not None:
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
            found[name] = layout
    if len(found) != headers.count(f".{layout.key}"):
        raise UnsupportedCheckpoint(
            f"{headers.count(f'.{layout.key}') - len(found)} of its layers do not exist in the model"
        )
    return found

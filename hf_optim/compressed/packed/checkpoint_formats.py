"""From the ``quantization_config`` of a checkpoint to the layouts of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...toolkit.checkpoint.safetensors import FLOAT_DTYPES, SafetensorsHeaders, UnsupportedCheckpoint
from .describe import scheme_unsupported_reason
from .layouts import AWQ, GPTQ, Compressed, Layout

# A model and what its checkpoint holds -> the layout of each of its linears that is compressed.
CheckpointFormat = Callable[[nn.Module, SafetensorsHeaders], dict[str, Layout]]

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
# What a compressed-tensors configuration may hold beside its schemes that says nothing about the layers.
HARMLESS = ("version", "quant_method", "config_groups", "format", "ignore", "quantization_status")


def parse_checkpoint_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """How to read a checkpoint with this ``quantization_config``. Raises ``UnsupportedCheckpoint``."""
    from transformers.utils.quantization_config import QuantizationMethod as Method

    method = config.get("quant_method")
    plans = {
        Method.COMPRESSED_TENSORS.value: _compressed_tensors,
        Method.GPTQ.value: _gptq,
        Method.AWQ.value: _awq,
    }
    if method not in plans:
        raise UnsupportedCheckpoint(f"quant_method {method!r}")
    return plans[method](config)


def _compressed_tensors(config: Mapping[str, Any]) -> CheckpointFormat:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    if not config.get("config_groups"):
        raise UnsupportedCheckpoint("no config_groups")
    for key, value in config.items():
        # kv_cache_scheme, transform_config, sparsity_config: a layer is not all that they concern.
        if key not in HARMLESS and value and key in ("kv_cache_scheme", "transform_config"):
            raise UnsupportedCheckpoint(f"a {key}")
        if key == "sparsity_config" and value and value.get("format", "dense") != "dense":
            raise UnsupportedCheckpoint(f"a {key}")
    if config.get("quantization_status") != "compressed":
        raise UnsupportedCheckpoint("its weights are not compressed")
    try:
        known = {key: value for key, value in config.items() if key in HARMLESS and key != "version"}
        known["config_groups"] = {name: _unordered(group) for name, group in config["config_groups"].items()}
        parsed = QuantizationConfig.model_validate(known)
    except (ValidationError, ValueError) as error:
        raise UnsupportedCheckpoint(f"quantization_config: {error}") from error
    layouts = {name: _layout(scheme, config.get("format")) for name, scheme in parsed.config_groups.items()}
    targets = {target: layouts[name] for name, scheme in parsed.config_groups.items() for target in scheme.targets}
    return lambda model, headers: _matched(model, headers, targets, parsed.ignore or [])


def _unordered(group: Any) -> Any:
    # Newer releases refuse the word "group" here. Whether columns were sorted shows in the tensors (weight_g_idx).
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return {**group, "weights": {**weights, "actorder": None}} if weights else group


def _layout(scheme: Any, format_of_all: Any) -> Compressed:
    from compressed_tensors.config import CompressionFormat

    if reason := scheme_unsupported_reason(scheme):
        raise UnsupportedCheckpoint(reason)
    own = scheme.format or format_of_all
    stored = str(getattr(own, "value", own))
    if stored not in FORMATS:
        raise UnsupportedCheckpoint(f"format {stored!r}")
    kept = scheme.model_copy(deep=True)
    kept.format = CompressionFormat(stored)
    if stored == "pack-quantized" and not kept.weights.symmetric:
        # Where the model is saved again: see `schemes.scheme`.
        kept.format = CompressionFormat.naive_quantized
    return Compressed(kept, stored)


def _matched(
    model: nn.Module, headers: SafetensorsHeaders, targets: Mapping[str, Compressed], ignore: list[str]
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
            continue  # a layer that is new (a head), or that was left dense
        if entry is not None and layout.key == "weight" and entry.type in FLOAT_DTYPES:
            continue
        found[name] = layout
    return found


def _gptq(config: Mapping[str, Any]) -> CheckpointFormat:
    bits, size = config.get("bits"), config.get("group_size", 128)
    first = str(config["quant_method"])  # the first version of the format has its plain name
    form = config.get("checkpoint_format") or first
    if bits not in (2, 3, 4, 8) or form not in (first, f"{first}_v2") or config.get("dynamic"):
        raise UnsupportedCheckpoint(
            f"GPTQ with bits {bits}, checkpoint_format {form!r}, dynamic {config.get('dynamic')}"
        )
    layout = GPTQ(bits, _size(size), zero_points_minus_one=form == first)
    return lambda model, headers: _named(model, headers, layout)


def _awq(config: Mapping[str, Any]) -> CheckpointFormat:
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size", 128))
    version = str(getattr(config.get("version"), "value", config.get("version") or "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedCheckpoint(f"AWQ with bits {bits}, version {version!r}")
    layout = AWQ(_size(size))
    return lambda model, headers: _named(model, headers, layout)


def _size(size: Any) -> int | None:
    return None if size in (None, -1) else int(size)


def _named(model: nn.Module, headers: SafetensorsHeaders, layout: Layout) -> dict[str, Layout]:
    """The linears of which the checkpoint has a ``qweight``: the configuration does not tell them."""
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        if headers.find(f"{name}.{layout.key}") is not None:
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
            found[name] = layout
    if len(found) != headers.count(f".{layout.key}"):
        raise UnsupportedCheckpoint(
            f"{headers.count(f'.{layout.key}') - len(found)} of its layers are none of the model's"
        )
    return found

"""The formats of GPTQ, AWQ and AutoRound: which layout each layer has, also where a configuration mixes several.

Their configurations name no layers that are quantized: those are the ones with a ``qweight``. What differs between
layers is named by patterns: ``dynamic`` of GPTQModel (tried in order at the beginning of a name), ``extra_config`` of
AutoRound (a name, else a pattern found anywhere in it). The shapes of the tensors are held against the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, UnsupportedCheckpoint
from ...trust.patterns import compile_pattern
from .float8_format import auto_round_float8, require_readable
from .layouts import AWQLayout, GPTQLayout, Layout, Offset

# (names of a layer in the model and in the checkpoint) -> its layout
LayoutOf = Callable[[tuple[str, ...]], Layout]
# (model, tensors of its checkpoint) -> the layout of each of its compressed linears, by name.
CheckpointFormat = Callable[[nn.Module, SafetensorsHeaders], dict[str, Layout]]

# Fields of an override that say how the tensors of a layer are stored; others are about the calibration.
STORED = ("bits", "group_size")
OTHERWISE = ["pack_dtype", "adapter", "rotation"]  # of the whole checkpoint: other words, or more than the codes
FOREIGN = ("method", "quant_method", "format", "checkpoint_format", "pack_dtype", "adapter")


def gptq_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of AutoGPTQ's and GPTQModel's checkpoints. Raises ``UnsupportedCheckpoint``."""
    version_1 = str(config["quant_method"])  # the first version of the format has no suffix
    version = config.get("checkpoint_format") or config.get("format") or version_1
    if version not in (version_1, f"{version_1}_v2"):
        raise UnsupportedCheckpoint(f"GPTQ with checkpoint_format {version!r}: only gptq and gptq_v2 are read")
    if config.get("is_marlin_format"):
        raise UnsupportedCheckpoint("GPTQ in the layout of Marlin (is_marlin_format): convert it to gptq_v2")
    for key in OTHERWISE:
        if config.get(key) not in (None, "int32"):
            raise UnsupportedCheckpoint(f"GPTQ with {key} {config[key]!r}")
    # The library of the field names its releases in the file: those subtract from whole words.
    producers = (config.get("meta") or {}).get("quantizer") or []
    whole = any("gptqmodel" in str(each) for each in ([producers] if isinstance(producers, str) else producers))
    offset: Offset = "none" if version != version_1 else "words" if whole else "codes"
    # GPTQModel stores 5, 6 and 7 bits in planes, AutoRound as a stream of bits.
    widths = (2, 3, 4, 5, 6, 7, 8) if config.get("provider") == "auto-round" else (2, 3, 4, 8)
    stated = _dynamic(config.get("dynamic"))
    return _by_words(config, stated, lambda bits, size: GPTQLayout(_width("GPTQ", bits, widths), size, offset))


def awq_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of AutoAWQ's checkpoints. Raises ``UnsupportedCheckpoint``."""
    known = {
        "bits": config.get("bits", config.get("w_bit")),
        "group_size": config.get("group_size", config.get("q_group_size", 128)),
    }
    version = str(getattr(config.get("version"), "value", config.get("version") or "gemm")).lower()
    if version != "gemm":
        raise UnsupportedCheckpoint(f"AWQ with version {version!r}: only gemm is read")
    return _by_words(known, lambda names: {}, lambda bits, size: AWQLayout(size, _width("AWQ", bits, (4,))))


def auto_round_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of AutoRound's own checkpoints. Raises ``UnsupportedCheckpoint``.

    For integers, ``packing_format`` names the layout: ``auto_round:auto_gptq`` is GPTQ's, with zero points minus one;
    ``auto_round`` and ``auto_round:gptqmodel`` are the same without that; ``auto_round:auto_awq`` is AWQ's.
    """
    if str(config.get("data_type")).startswith("fp") and config.get("bits") == 8:
        require_readable(config)
        return functools.partial(auto_round_float8, config)
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:gptq").replace(
        "autoround", "auto_round"
    )
    if not packing.startswith("auto_round") or any(each in packing for each in ("llm_compressor", "mlx", "fake", "fp")):
        raise UnsupportedCheckpoint(
            f"AutoRound with packing_format {packing!r}: integer codes in the layouts of auto_round, auto_gptq, "
            "gptqmodel and auto_awq, and float8 weights are read; export it in one of these, or for llm_compressor"
        )
    if config.get("rotation_config") or config.get("super_bits"):
        raise UnsupportedCheckpoint("AutoRound with a rotation_config or scales that are quantized themselves")
    from transformers.utils.quantization_config import QuantizationMethod as Method

    awq = Method.AWQ.value in packing
    offset: Offset = "codes" if Method.GPTQ.value in packing and "gptqmodel" not in packing else "none"
    stated = _extra(config.get("extra_config"))

    def layout(bits: Any, size: int | None) -> Layout:
        if awq:
            return AWQLayout(size, _width("AutoRound in AWQ's layout", bits, (4,)))
        return GPTQLayout(_width("AutoRound", bits, (2, 3, 4, 5, 6, 7, 8)), size, offset)

    def fields(names: tuple[str, ...]) -> Mapping[str, Any]:
        own = stated(names)
        for key, plain in (("data_type", "int"), ("act_bits", None)):
            value = own.get(key, config.get(key))
            if value not in (None, plain) and not (key == "act_bits" and int(value) >= 16):
                raise UnsupportedCheckpoint(f"AutoRound with {key} {value!r} (layer {names[0]})")
        return own

    return _by_words(config, fields, layout)


def _by_words(
    config: Mapping[str, Any],
    stated: Callable[[tuple[str, ...]], Mapping[str, Any]],
    layout: Callable[[Any, int | None], Layout],
) -> CheckpointFormat:
    """Return the format whose layers have the fields of ``config``, changed by what is ``stated`` for their names."""

    def of(names: tuple[str, ...]) -> Layout:
        own = {**config, **{key: value for key, value in stated(names).items() if key in STORED and value is not None}}
        return layout(own.get("bits"), _group_size(own.get("group_size", 128)))

    of(("",))  # what the configuration says of all layers is checked before the model is built
    return lambda model, headers: layouts_of_words(model, headers, of)


def _width(kind: str, bits: Any, widths: tuple[int, ...]) -> int:
    if bits not in widths or isinstance(bits, bool):
        raise UnsupportedCheckpoint(f"{kind} with bits {bits!r}: {', '.join(map(str, widths))} are read")
    return int(bits)


def _group_size(size: Any) -> int | None:
    return None if size in (None, -1) else int(size)


def _dynamic(dynamic: Any) -> Callable[[tuple[str, ...]], Mapping[str, Any]]:
    """Return what GPTQModel's ``dynamic`` states for a layer: the fields of its first pattern that matches."""
    patterns = [
        (compile_pattern(key.removeprefix("+:")), fields) for key, fields in (dynamic or {}).items() if key[:2] != "-:"
    ]
    for pattern, fields in patterns:
        for key in FOREIGN:
            if key in (fields or {}):
                raise UnsupportedCheckpoint(f"GPTQ whose dynamic changes {key} of {pattern.pattern}")

    def stated(names: tuple[str, ...]) -> Mapping[str, Any]:
        return next((fields or {} for pattern, fields in patterns if any(map(pattern.match, names))), {})

    return stated


def _extra(extra: Any) -> Callable[[tuple[str, ...]], Mapping[str, Any]]:
    """Return what AutoRound's ``extra_config`` states for a layer: the fields under its name, else of a pattern."""
    exact: Mapping[str, Any] = extra or {}
    patterns = []
    for key, fields in exact.items():
        try:
            patterns.append((compile_pattern(key), fields))
        except ValueError:
            continue  # a name, not a pattern

    def stated(names: tuple[str, ...]) -> Mapping[str, Any]:
        named = next((exact[name] for name in names if name in exact), None)
        if named is not None:
            return named
        return next((fields for pattern, fields in patterns if fields and any(map(pattern.search, names))), {})

    return stated


def layouts_of_words(model: nn.Module, headers: SafetensorsHeaders, layout: LayoutOf) -> dict[str, Layout]:
    """Return the layouts of the linears with a ``qweight`` in the checkpoint; the configuration does not list them."""
    key = "qweight"
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        entry = headers.find(f"{name}.{key}")
        if entry is not None:
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
            found[name] = layout((name, entry.key.removesuffix(f".{key}")))
    if len(found) != headers.count(f".{key}"):
        raise UnsupportedCheckpoint(f"{headers.count(f'.{key}') - len(found)} of its layers do not exist in the model")
    return found

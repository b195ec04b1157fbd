"""AutoRound's own format with float8 weights: ``weight`` ``[out, in]`` and ``weight_scale``, per tensor or row.

``input_scale`` ``[1]`` is there for inputs with a calibrated scale. The quantized layers are those with such tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, UnsupportedCheckpoint
from ..schemes import scheme as make_scheme
from .layouts import F8, CompressedTensorsLayout, Layout


def auto_round_float8(config: Mapping[str, Any], model: nn.Module, headers: SafetensorsHeaders) -> dict[str, Layout]:
    """Return the layouts of the float8 linears of a checkpoint with ``data_type: fp``, 8 bits.

    Raises ``UnsupportedCheckpoint`` for weights in blocks, and for inputs of other types.
    """
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        entry = headers.find(f"{name}.weight")
        if not isinstance(module, nn.Linear) or entry is None or entry.type not in F8:
            continue
        if type(module).forward is not nn.Linear.forward:
            raise UnsupportedCheckpoint(f"{name} is a {type(module).__name__}")
        scale = headers.find(f"{name}.weight_scale")
        count = 1
        for size in scale.shape if scale is not None else (0,):
            count *= size
        scheme = make_scheme(8, "float", "tensor" if count == 1 else "channel", **_inputs(config))
        found[name] = CompressedTensorsLayout(scheme, str(scheme.format.value))
    return found


def require_readable(config: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedCheckpoint`` for float8 weights in blocks, and for inputs of other types."""
    if config.get("weight_block_size") or isinstance(config.get("group_size"), (list, tuple)):
        raise UnsupportedCheckpoint(
            "AutoRound with float8 weights in blocks: export it for llm_compressor, whose blocks are decoded"
        )
    _inputs(config)


def _inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    bits, kind, size = (config.get(f"act_{key}") for key in ("bits", "data_type", "group_size"))
    if bits is None or int(bits) >= 16:
        return {}
    static = config.get("act_dynamic") is False
    if int(bits) != 8 or not str(kind).startswith("fp") or size not in ((0, None) if static else (-1, None)):
        raise UnsupportedCheckpoint(f"AutoRound with inputs of {bits} bits, {kind!r}, in groups of {size}")
    return {"activations": "fp8", "static": static}

"""Check that a load placed the tensors of a checkpoint: transformers only warns, and leaves others at random values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError
from ..toolkit import topology

# Last parts of the names that only tensors of quantized layers have (compressed-tensors, GPTQ, AWQ, bitsandbytes, fp8).
QUANTIZED_PARTS = frozenset(
    {
        *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
        *("input_scale", "input_zero_point", "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv"),
        *("absmax", "quant_map", "SCB", "weight_format"),
    }
)


def quantized_leftovers(unexpected: Iterable[str]) -> list[str]:
    """Return the keys, sorted, that belong to a quantized layer: no parameter of the model has got them."""
    return sorted(key for key in unexpected if key.rsplit(".", 1)[-1] in QUANTIZED_PARTS)


def missing_in_blocks(model: Any, missing: Iterable[str]) -> list[str]:
    """Return the names, sorted, of parameters inside the blocks of the model that the checkpoint did not have.

    A head that is missing may be trained later; a block is not.
    """
    missing = list(missing)
    if not missing:  # finding the blocks runs the model
        return []
    blocks = tuple(f"{block.name}." for block in topology.blocks(model))
    return sorted(name for name in missing if name.startswith(blocks)) if blocks else []


def require_placed(model: Any, info: Mapping[str, Any], source: Any) -> None:
    """Raise ``CheckpointError`` unless blocks have their weights and no tensor of a quantized layer is left over.

    Args:
        model: the loaded model.
        info: the loading report of transformers (``output_loading_info``).
        source: the checkpoint, for the message.
    """
    absent = quantized_leftovers(info["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{source} lacks {len(absent)} tensors of layers in its quantization_config ({_first(absent)}): "
            "download or copy it again"
        )
    left = quantized_leftovers(info["unexpected_keys"])
    if left:
        raise CheckpointError(
            f"{source} has {len(left)} tensors of quantized layers that {type(model).__name__} has no parameter for "
            f"({_first(left)}): its quantization_config is missing or does not describe them"
        )
    inside = missing_in_blocks(model, info["missing_keys"])
    if inside:
        raise CheckpointError(
            f"{source} has no weights for {len(inside)} tensors of {type(model).__name__} ({_first(inside)}): "
            "load it with the class that its config.json names"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")

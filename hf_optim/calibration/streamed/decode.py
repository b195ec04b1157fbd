"""Decode the quantized weights of a completed block from its shard.

The weight of a linear decodes from its own quantized values. A stacked expert parameter is reassembled from one linear
per expert, at the rows that transformers' conversion takes from it (``experts.rows_of``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...compressed.codec import scheme_on
from ...compressed.experts import WEIGHT, checkpoint_rows, expert_schemes, stored_scheme
from ...errors import ModelError
from ...toolkit.topology.experts import ExpertLinear

# Returns the stored tensors of the linear with this name in the block.
ReadLinear = Callable[[str], Mapping[str, Tensor]]


def require_one_scheme(model: nn.Module, name: str, earlier: Iterable[str], off_grid: list[str]) -> None:
    """Raise ``ModelError`` if the experts of the block ``name`` could not be read back as they are written.

    Stock transformers decodes the experts of all blocks by one scheme, and the preceding blocks are already written.

    Args:
        model: the model.
        name: the block that is about to be written.
        earlier: the names of the blocks before it.
        off_grid: modules of this block whose weights no longer fit their grid, by their names in the block.
    """
    block = model.get_submodule(name)
    if changed := [part for part in off_grid if expert_schemes(block.get_submodule(part))]:
        raise ModelError(
            f"{name}.{changed[0]} has changed since its experts were quantized, and stock transformers reads experts "
            "only if those of all blocks are packed; use driver: blockwise, which then writes a dense checkpoint"
        )
    schemes = [stored_scheme(model.get_submodule(other)) for other in (*earlier, name)]
    if schemes[-1] is not None and any(other not in (None, schemes[-1]) for other in schemes):
        raise ModelError(
            f"the experts of {name} are quantized by another scheme than those of the blocks before it. Stock "
            "transformers decodes all experts by one scheme, and the streamed driver has already written those "
            "blocks; use driver: blockwise, which finds one scheme for all"
        )


def describe_experts(model: nn.Module, name: str) -> dict[str, Any]:
    """Describe how the quantized experts of the block ``name`` are written, in JSON types.

    Returns ``scheme``, ``transposed``, and ``parts``: stacked parameter -> linear in the checkpoint ->
    ``[expert, first row, end row]``. Names are relative to the block. Empty if the block has no such experts.
    """
    block, layout = model.get_submodule(name), {}
    parts: dict[str, dict[str, list[int]]] = {}
    scheme = stored_scheme(block)
    for stack_name, stack in block.named_modules():
        for parameter in expert_schemes(stack):
            key = f"{stack_name}.{parameter}"
            rows = checkpoint_rows(model, f"{name}.{key}", stack).items()
            parts[key] = {own.removeprefix(f"{name}.").removesuffix(WEIGHT): list(place) for own, place in rows}
            layout = {"transposed": ExpertLinear(stack, stack_name, parameter, 0).transposed}
    return {**layout, "scheme": scheme.model_dump(mode="json"), "parts": parts} if scheme is not None else {}


def is_stored_quantized(
    block: nn.Module, key: str, where: Mapping[str, str], off_grid: list[str], experts: Mapping[str, Any]
) -> bool:
    """Return True if the shard of a block holds its weight ``key`` as quantized values.

    Args:
        block: the block.
        key: the name of the weight in the block.
        where: names in the block -> names in the shard.
        off_grid: modules of the block that are written dense.
        experts: ``describe_experts`` of the block.
    """
    part, _, leaf = key.rpartition(".")
    if key in experts.get("parts", {}):
        return all(f"{linear}.weight_packed" in where for linear in experts["parts"][key])
    scheme = scheme_on(block.get_submodule(part))
    held = any(f"{part}.{name}" in where for name in ("weight_packed", "weight"))
    return leaf == "weight" and scheme is not None and scheme.weights is not None and part not in off_grid and held


def decode_weight(key: str, state: Mapping[str, Any], stored: ReadLinear, dtype: torch.dtype) -> Tensor:
    """Decode the weight ``key`` of a completed block, bit-exact, to ``dtype``.

    Args:
        key: the name of the weight in the block.
        state: the metadata of the block (``StreamedOutput.metadata``).
        stored: returns the stored tensors of a linear, by its name in the block.
        dtype: the dtype that the weight had in memory.
    """
    parts = state.get("experts", {}).get("parts", {}).get(key)
    if parts is None:
        linear = key.rpartition(".")[0]
        return _decompress(stored(linear), state["module"]["schemes"][linear]).to(dtype)
    weight = torch.empty(state["inventory"][key][1], dtype=dtype)
    rows = weight.transpose(1, 2) if state["experts"]["transposed"] else weight
    for linear, (expert, begin, end) in parts.items():
        rows[expert, begin:end] = _decompress(stored(linear), state["experts"]["scheme"]).to(dtype)
    return weight


def _decompress(packed: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(fields)
    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    return compressor.decompress(dict(packed), scheme)["weight"]

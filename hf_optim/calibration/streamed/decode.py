"""Weights of a finished block that its shard holds as codes: which they are, and what they were in memory.

A linear's weight decodes from its own codes. A stacked parameter of experts is put together again from the codes of one
linear for each expert, at the rows where transformers' conversion takes them from (``experts.rows_of``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...compressed.codec import scheme_on
from ...compressed.experts import WEIGHT, expert_schemes, rows_of, stored_scheme
from ...errors import ModelError
from ...toolkit.topology.experts import ExpertLinear

Tensors = Callable[[str], Mapping[str, Tensor]]


def require_one_scheme(model: nn.Module, name: str, earlier: Iterable[str], loose: list[str]) -> None:
    """Refuse to write the block ``name`` where its experts would be read by another scheme than they are written in.

    Stock transformers decodes the experts of all blocks by one scheme, and the blocks before this one are written.
    Raises ``ModelError``. ``earlier`` are the names of those blocks, ``loose`` the modules of this one that no longer
    fit their grid.
    """
    block = model.get_submodule(name)
    if changed := [part for part in loose if expert_schemes(block.get_submodule(part))]:
        raise ModelError(
            f"{name}.{changed[0]} has changed since its experts were quantized, and stock transformers reads experts "
            "only where those of all blocks are packed; use driver: blockwise, which then writes a dense checkpoint"
        )
    schemes = [stored_scheme(model.get_submodule(other)) for other in (*earlier, name)]
    if schemes[-1] is not None and any(other not in (None, schemes[-1]) for other in schemes):
        raise ModelError(
            f"the experts of {name} are quantized in another way than those of the blocks before it. Stock "
            "transformers decodes all experts by one scheme, and the streamed driver has written those blocks "
            "already; use driver: blockwise, which finds one scheme for all"
        )


def describe_experts(model: nn.Module, name: str) -> dict[str, Any]:
    """How the quantized experts of the block ``name`` are written, in JSON types.

    ``scheme``, ``transposed``, and ``parts``: stacked parameter -> linear in the checkpoint -> expert, first row, end.
    Names are those in the block. Empty where it has no such experts.
    """
    block, made = model.get_submodule(name), {}
    parts: dict[str, dict[str, list[int]]] = {}
    scheme = stored_scheme(block)
    for stack_name, stack in block.named_modules():
        for parameter in expert_schemes(stack):
            key = f"{stack_name}.{parameter}"
            rows = rows_of(model, f"{name}.{key}", stack).items()
            parts[key] = {own.removeprefix(f"{name}.").removesuffix(WEIGHT): list(place) for own, place in rows}
            made = {"transposed": ExpertLinear(stack, stack_name, parameter, 0).transposed}
    return {**made, "scheme": scheme.model_dump(mode="json"), "parts": parts} if scheme is not None else {}


def is_stored_quantized(
    block: nn.Module, key: str, where: Mapping[str, str], loose: list[str], experts: Mapping[str, Any]
) -> bool:
    """Whether the tensor ``key`` of a block is a weight that the shard holds as codes."""
    part, _, leaf = key.rpartition(".")
    if key in experts.get("parts", {}):
        return all(f"{linear}.weight_packed" in where for linear in experts["parts"][key])
    scheme = scheme_on(block.get_submodule(part))
    held = any(f"{part}.{name}" in where for name in ("weight_packed", "weight"))
    return leaf == "weight" and scheme is not None and scheme.weights is not None and part not in loose and held


def decode_weight(key: str, about: Mapping[str, Any], stored: Tensors, dtype: torch.dtype) -> Tensor:
    """The weight as it was in memory. ``stored`` gives the tensors of a linear by its name in the block."""
    parts = about.get("experts", {}).get("parts", {}).get(key)
    if parts is None:
        linear = key.rpartition(".")[0]
        return _decompressed(stored(linear), about["module"]["schemes"][linear]).to(dtype)
    made = torch.empty(about["inventory"][key][1], dtype=dtype)
    rows = made.transpose(1, 2) if about["experts"]["transposed"] else made
    for linear, (expert, begin, end) in parts.items():
        rows[expert, begin:end] = _decompressed(stored(linear), about["experts"]["scheme"]).to(dtype)
    return made


def _decompressed(packed: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(fields)
    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    return compressor.decompress(dict(packed), scheme)["weight"]

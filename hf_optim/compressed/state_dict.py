"""Building the state dict of a compressed checkpoint, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..toolkit.topology.experts import fused_experts, is_packed_experts
from .codec import pack, scheme_on
from .codes import checkpoint_tensors
from .dense_conversions import reads_float_stacks
from .experts import PACKED_EXPERTS, SCALE, expert_schemes, packed_experts, stored_scheme
from .packed.packed_linear import PACKED_WEIGHT, PackedLinear


@torch.no_grad()
def packed_state_dict(
    model: nn.Module, owner: nn.Module | None = None, inside: str = ""
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the state dict of the compressed checkpoint, and the names of modules that are no longer on their grid.

    The codes of a layer on a kernel come from its packed weight, without creating a dense weight. Otherwise the codes
    are recovered from the weight in float32, which is exact: a weight is a code times a scale, rounded to the model's
    dtype. Each packed module is decoded again; if that does not reproduce its weight bit-exact (because it was
    modified), the dense weight is saved. The same holds for groups of columns that are not adjacent: stock transformers
    would silently read such a checkpoint wrong.

    Experts are packed all or none, since stock transformers reads them in no other way. If one is no longer on its
    grid, the whole checkpoint is dense.

    Args:
        model: a model, or a part of one.
        owner, inside: for a part, the model that contains it and its name there, since the names of experts in a
            checkpoint depend on the whole model.
    """
    state = dict(model.state_dict())
    off_grid = []
    experts = _packed_experts(model, owner or model, inside)
    dense = experts is None
    for name, module in model.named_modules():
        if expert_schemes(module):
            _put_experts(state, name, module, experts)
            off_grid += [name] if experts is None else []
            continue
        if not isinstance(module, PackedLinear) and scheme_on(module) is None:
            continue
        prefix = f"{name}." if name else ""
        own = [*module._parameters, *module._buffers]
        local = {key: state.pop(prefix + key) for key in own if prefix + key in state}
        packed: dict[str, torch.Tensor] | None
        if isinstance(module, PackedLinear):
            for key in [key for key in state if key.startswith(f"{prefix}{PACKED_WEIGHT}.")]:
                del state[key]
            packed = None if dense else _packed_layer(local, module)
        else:
            packed = None if dense else pack(local, scheme_on(module))
        if packed is None:
            off_grid.append(name)
            weight = {"weight": module.decoded()} if isinstance(module, PackedLinear) else {}
            packed = {**{key: value for key, value in local.items() if not key.startswith("weight_")}, **weight}
        state.update({prefix + key: value for key, value in packed.items()})
    return state, off_grid


def _packed_experts(model: nn.Module, owner: Any, inside: str) -> dict[str, dict[str, torch.Tensor]] | None:
    """Return the checkpoint tensors of all quantized experts, by module; None if one is no longer on its grid."""
    integer = any(s.weights is not None and s.weights.type == "int" for s in map(scheme_on, model.modules()) if s)
    dense = any(not expert_schemes(module) for module in fused_experts(model).values())
    if integer and dense and not reads_float_stacks(owner):
        return None  # transformers decoded the experts while loading the checkpoint
    common = stored_scheme(model)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if common is not None and expert_schemes(module):
            packed = packed_experts(owner, ".".join(filter(None, (inside, name))), common)
            if packed is None:
                return None
            found[name] = {key.removeprefix(f"{inside}."): value for key, value in packed.items()}
    return found


def _put_experts(
    state: dict[str, torch.Tensor],
    name: str,
    module: nn.Module,
    packed: Mapping[str, Mapping[str, torch.Tensor]] | None,
) -> None:
    """Replace the tensors of fused experts by their packed form; with ``packed`` None, keep the decoded weights."""
    prefix = f"{name}." if name else ""
    if is_packed_experts(module):
        for key in [key for key in state if key.startswith(f"{prefix}{PACKED_EXPERTS}.")]:
            del state[key]
        dense = {} if packed is not None else {p: module.decoded(p) for p in expert_schemes(module)}  # type: ignore[operator]
        state.update({prefix + parameter: value for parameter, value in dense.items()})
        state.update({} if packed is None else packed[name])
        return
    for parameter in expert_schemes(module):
        del state[f"{prefix}{parameter}{SCALE}"]
        if packed is not None:
            del state[prefix + parameter]
    state.update({} if packed is None else packed[name])


def _packed_layer(local: Mapping[str, torch.Tensor], module: PackedLinear) -> dict[str, torch.Tensor] | None:
    """Return the checkpoint tensors of a layer on a kernel; None if compressed-tensors cannot represent it."""
    scheme = scheme_on(module)
    if scheme is None:
        return {**local, "weight": module.decoded()}
    if module.packing.description.ordered:
        return None
    packed = {**local, **checkpoint_tensors(module.codes(), scheme)}
    if scheme.input_activations is not None and scheme.input_activations.symmetric:
        packed.pop("input_zero_point", None)
    return packed

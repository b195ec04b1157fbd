"""Loading and saving experts in the MXFP4 layout of gpt-oss (``quant_method: mxfp4``) without a dense copy.

A checkpoint has for each stacked matrix ``<parameter>_blocks`` uint8 ``[E, out, groups, 16]``, two e2m1 patterns to a
byte, the even column in the low half, and ``<parameter>_scales`` uint8 ``[E, out, groups]``, e8m0; biases and all other
layers are not quantized. While it is loaded the module of experts has these tensors in place of its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, UnsupportedCheckpoint
from ...toolkit.quantization.float4 import E8M0
from ...toolkit.topology.experts import expert_stacks, fused_experts, matrix_names, matrix_shape
from ..experts import PACKED_EXPERTS, attach_expert_schemes
from ..schemes import float4_scheme
from ..weights import Codes
from .expert_loader import placeholder_class
from .expert_swap import describe_experts, pack_experts, prepack_experts
from .kernel import Kernel
from .layouts import U8, TensorSpec
from .packed_experts import NATIVE, SIDES, PackedExperts

METHOD = "mxfp4"
BLOCKS, SCALES, GROUP = "_blocks", "_scales", 32
_PENDING = "_hf_optim_mxfp4"


@dataclass(eq=False)
class PendingExperts:
    """What is needed to turn a module with blocks and scales back into experts.

    Attributes:
        former: its class.
        dtype: of its stacked parameters.
        shapes: ``(E, out, in)`` of each of them.
    """

    former: type[nn.Module]
    dtype: torch.dtype
    shapes: dict[str, tuple[int, int, int]]


def expose_blocks(model: Any) -> None:
    """Give the modules of experts of a model on the meta device the tensors of a checkpoint in this layout.

    Raises ``UnsupportedCheckpoint`` if their matrices do not consist of whole groups, or are not those of transformers'
    interface.
    """
    stacks, fused = expert_stacks(model), fused_experts(model)
    if not fused or stacks.keys() != fused.keys():
        raise UnsupportedCheckpoint("mxfp4 is the layout of stacked experts on transformers' interface")
    for name, module in fused.items():
        shapes = {key: matrix_shape(module, key) for key in matrix_names(module)}
        if getattr(module, "_is_expert_parallel", False) or any(shape[2] % GROUP for shape in shapes.values()):
            raise UnsupportedCheckpoint(f"{name} has experts on several ranks, or groups that are not whole")
        dtype = module.get_parameter(next(iter(shapes))).dtype
        for key in shapes:
            del module._parameters[key]
            for local, spec in _specs(key, shapes[key]).items():
                empty = torch.empty(spec.shape, dtype=torch.uint8, device="meta")
                module.register_parameter(local, nn.Parameter(empty, requires_grad=False))
        vars(module)[_PENDING] = PendingExperts(type(module), dtype, shapes)
        module.__class__ = placeholder_class(type(module), _PENDING)


def _specs(key: str, shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
    count, rows, columns = shape
    groups = columns // GROUP
    return {
        key + BLOCKS: TensorSpec(U8, (count, rows, groups, GROUP // 2)),
        key + SCALES: TensorSpec(U8, (count, rows, groups)),
    }


def pending_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with blocks and scales, by name."""
    return {name: module for name, module in model.named_modules() if _PENDING in vars(module)}


def require_blocks(model: nn.Module, headers: SafetensorsHeaders) -> None:
    """Raise ``CheckpointError`` unless a checkpoint has the blocks and scales of all experts, in their shapes."""
    for name, module in pending_experts(model).items():
        for key, shape in vars(module)[_PENDING].shapes.items():
            for local, spec in _specs(key, shape).items():
                entry = headers.find(f"{name}.{local}")
                if entry is None and headers.find(f"{name}.{key}") is not None:
                    raise UnsupportedCheckpoint(f"{name}.{key} is not quantized")
                if entry is None:
                    raise CheckpointError(f"the checkpoint has no {name}.{local}")
                if not spec.matches(entry):
                    raise CheckpointError(
                        f"{entry.key} is {entry.type} {list(entry.shape)}, expected U8 {list(spec.shape)}"
                    )


@torch.no_grad()
def convert_blocks(model: nn.Module, kernels: tuple[Kernel, ...], stored: Mapping[str, Any]) -> None:
    """Pack the experts whose blocks are loaded, one module at a time. ``stored`` is the ``quantization_config``.

    Raises ``UnsupportedCheckpoint`` if no kernel takes them, and ``CheckpointError`` for scales that are NaN.
    """
    for name, module in pending_experts(model).items():
        pending: PendingExperts = vars(module).pop(_PENDING)
        locals_ = [local for key, shape in pending.shapes.items() for local in _specs(key, shape)]
        tensors = {local: module._parameters.pop(local).detach() for local in locals_}  # type: ignore[union-attr]
        module.__class__ = pending.former
        if any(tensor.is_meta for tensor in tensors.values()):
            raise UnsupportedCheckpoint("its weights are offloaded")
        for key in pending.shapes:
            if bool((tensors[key + SCALES] == 255).any()):
                raise CheckpointError(f"{name}.{key}{SCALES}: a scale is NaN")
        schemes = {key: float4_scheme(METHOD) for key in pending.shapes}
        device = next(iter(tensors.values())).device
        reader = _Reader(tensors, {SIDES[key]: key for key in pending.shapes})
        weight = describe_experts(name, module, pending.shapes, schemes, pending.dtype, device, reader.codes)
        found = prepack_experts(weight, kernels)
        if isinstance(found, str):
            raise UnsupportedCheckpoint(f"no kernel runs the experts of {name}: {found}")
        pack_experts(module, pending.shapes, weight, *found)
        attach_expert_schemes(module, schemes)
        vars(module)[NATIVE] = {"modules_to_not_convert": stored.get("modules_to_not_convert")}


class _Reader:
    """The codes of the matrices of one module: ``codes(side, expert)``."""

    def __init__(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, str]) -> None:
        self.tensors, self.parameters = tensors, parameters

    def codes(self, side: str, expert: int) -> list[Codes]:
        key = self.parameters[side]
        blocks, scales = (self.tensors[key + local][expert] for local in (BLOCKS, SCALES))
        patterns = torch.stack((blocks & 15, blocks >> 4), dim=-1).reshape(len(blocks), -1)
        return [Codes(patterns, scales.contiguous().view(E8M0), None)]


def native_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """Return the experts on a kernel that were loaded from this layout, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts) and NATIVE in vars(m)}


def native_config(model: nn.Module) -> Any:
    """Return the ``quantization_config`` of a checkpoint of this model, as it was loaded."""
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(**vars(next(iter(native_experts(model).values())))[NATIVE])


@torch.no_grad()
def native_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the checkpoint, with the blocks and scales that were loaded, bit-exact."""
    state = dict(model.state_dict())
    for name, module in native_experts(model).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(f"{prefix}{PACKED_EXPERTS}.")]:
            del state[key]
        for key, (count, rows, columns) in module.shapes().items():
            blocks = torch.empty(count, rows, columns // GROUP, GROUP // 2, dtype=torch.uint8)
            scales = torch.empty(count, rows, columns // GROUP, dtype=torch.uint8)
            for expert in range(count):
                found = module.codes(key, expert)
                assert found.scale is not None
                low, high = found.codes.view(rows, columns // GROUP, -1, 2).unbind(-1)
                blocks[expert], scales[expert] = low | (high << 4), found.scale.view(torch.uint8)
            state |= {f"{prefix}{key}{BLOCKS}": blocks, f"{prefix}{key}{SCALES}": scales}
    return state

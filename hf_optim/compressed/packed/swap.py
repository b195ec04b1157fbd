"""Turn a linear layer into a ``PackedLinear`` and back, in place."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codes import decode, scale_tensors, store_arguments
from ..float4 import GLOBAL, holds_float4
from ..quantized_forward import is_quantized_forward
from ..weights import Codes, QuantizedWeight
from .kernel import Kernel, first_that_takes
from .packed_linear import PACKED_WEIGHT, PackedLinear, Packing

# The parameters that the packed weight replaces; everything else of a layer stays in place.
REPLACED = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx", GLOBAL)
# Instance attributes with a forward: a replaced one, and the one that hooks of the accelerate library have set aside.
FORWARDS = ("forward", "_old_forward")
REQUIRED = ("forward", "accepts", "codes", "label")


def prepack(weight: QuantizedWeight, kernels: Iterable[Kernel]) -> tuple[Kernel, nn.Module] | str:
    """Return the first kernel that supports a weight with its packed weight, or the reasons why none does.

    Reasons are joined by ``;`` and empty if no kernel handles this kind of weight.
    """
    return first_that_takes(
        _in_order(weight, kernels), lambda kernel: kernel.check(weight), lambda kernel: _checked(kernel.prepack(weight))
    )


def first_kernel(weight: QuantizedWeight, kernels: Iterable[Kernel]) -> Kernel | str:
    """Return the first kernel that supports a weight, by its description alone, or the reasons why none does."""
    found = first_that_takes(_in_order(weight, kernels), lambda kernel: kernel.check(weight), lambda kernel: None)
    return found if isinstance(found, str) else found[0]


def _in_order(weight: QuantizedWeight, kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels to try: those specialized for a property of this weight (outliers, 2:4) before the others.

    Only those for 2:4 take a weight that is not quantized.
    """
    kernels = [kernel for kernel in kernels if weight.kind != "dense" or kernel.sparse24]
    special = [kernel for kernel in kernels if kernel.outliers]
    plain = sorted((k for k in kernels if not k.outliers), key=lambda k: not (weight.sparse24 and k.sparse24))
    return (special if weight.outliers is not None else []) + plain


def _checked(packed_weight: Any) -> nn.Module:
    missing = [name for name in REQUIRED if not hasattr(packed_weight, name)]
    if not isinstance(packed_weight, nn.Module) or missing:
        raise TypeError(f"its packed weight is not an nn.Module with {', '.join(REQUIRED)}")
    return packed_weight


def unsupported_reason(module: nn.Linear) -> str:
    """Return why the class of a layer cannot be changed, or ``""``."""
    if type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__} is not laid out as nn.Linear"
    own = module.__dict__.get("forward")
    quantized = getattr(module, "quantization_scheme", None) is not None
    if own is None or "_old_forward" in module.__dict__:
        return ""
    # At its first forward, compressed-tensors puts another forward around the quantized one.
    code = getattr(getattr(own, "__func__", None), "__code__", None)  # the names of the function are those of Linear's
    theirs = code is not None and "compressed_tensors" in Path(code.co_filename).parts
    if quantized and (theirs or is_quantized_forward(module, own)):
        return ""
    return "something else has replaced its forward"


def writes_weights(model: nn.Module) -> bool:
    """Return True if the forward of a model changes weights in place (RWKV with ``rescale_every``)."""
    return any(hasattr(m, "_rescale_layers") and getattr(m.config, "rescale_every", 0) for m in model.modules())


@torch.no_grad()
def pack(module: nn.Linear, weight: QuantizedWeight, kernel: Kernel, packed_weight: nn.Module) -> None:
    """Make a module a ``PackedLinear``: ``packed_weight`` replaces its dense weight.

    Args:
        module: a layer for which ``unsupported_reason`` is ``""``.
        weight: the description of its weight.
        kernel: the kernel that built ``packed_weight`` from ``weight``.
    """
    replaced = {}
    parameters = tuple(module._parameters)
    for name in REPLACED:
        old = module._parameters.get(name)
        if old is not None:
            replaced[name] = (old.shape, old.dtype, old.requires_grad)
            del module._parameters[name]
    former = type(module)
    attributes = {name: module.__dict__[name] for name in FORWARDS if name in module.__dict__}
    if "_old_forward" in attributes:
        module.__dict__["_old_forward"] = types.MethodType(PackedLinear.forward, module)
        attributes.pop("forward", None)
    else:
        module.__dict__.pop("forward", None)
    module.__class__ = PackedLinear
    description = replace(weight, bias=None, codes=_no_codes)
    module.__dict__["packing"] = Packing(description, kernel, former, unpack, parameters, replaced, attributes)
    module._modules[PACKED_WEIGHT] = packed_weight
    module.refresh()  # type: ignore[operator]


def _no_codes() -> Codes:
    raise ValueError("the codes of a packed layer come from its packed weight")


@torch.no_grad()
def unpack(module: PackedLinear) -> None:
    """Undo ``pack``, bit-exact. The layers that it was fused with get their own packed weights again.

    If the model was cast to a narrower dtype, the scales are rounded to it, as they are when a checkpoint is loaded in
    that dtype.
    """
    module.packing.unfuse_norm()
    if module.packing.group is not None:
        module.packing.group.disband()
    packing, codes, weight = module.packing, module.codes(), module.decoded()
    if codes.scale is not None and codes.scale.itemsize > weight.itemsize:
        # a kernel has a class of its own for its codes
        given: dict[str, Any] = {part.name: getattr(codes, part.name, None) for part in fields(Codes)}
        codes = Codes(**{**given, "scale": codes.scale.to(weight.dtype)})
        weight = decode(codes, packing.description.bits, weight.dtype)
    scheme: Any = getattr(module, "quantization_scheme", None)
    del module._modules[PACKED_WEIGHT]
    for name in ("packing", "_run", "_accepts"):
        module.__dict__.pop(name, None)
    module.__class__ = packing.former  # type: ignore[assignment]
    module.__dict__.update(packing.attributes)
    if packing.replaced:
        _restore_parameters(module, packing, codes, weight, scheme)
    else:
        from ..state import store

        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        store(module, scheme, **store_arguments(codes, scheme), g_idx=g_idx_of(codes, packing.description.group_size))


def _restore_parameters(module: nn.Linear, packing: Packing, codes: Codes, weight: Tensor, scheme: Any) -> None:
    """Put the parameters that the packed weight replaced back, in their original order, shapes and dtypes."""
    values: dict[str, Tensor] = {"weight": weight}
    if scheme is not None:
        values |= scale_tensors(codes, scheme)
        if "weight_zero_point" not in values and "weight_zero_point" in packing.replaced:
            values["weight_zero_point"] = torch.zeros((), dtype=torch.int8, device=weight.device)
    if "weight_g_idx" in packing.replaced:
        g_idx = g_idx_of(codes, packing.description.group_size)
        values["weight_g_idx"] = _ordered_g_idx(codes, packing) if g_idx is None else g_idx
    kept = dict(module._parameters)
    module._parameters.clear()
    for name in packing.parameters:
        if name in packing.replaced:
            shape, dtype, requires_grad = packing.replaced[name]
            if name != "weight" and dtype.is_floating_point:
                dtype = values[name].dtype if holds_float4(codes) else weight.dtype
            value = values[name].to(weight.dtype if name == "weight" else dtype)
            value = value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)
            module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=requires_grad)
        else:
            module._parameters[name] = kept.pop(name)
    module._parameters.update(kept)


def g_idx_of(codes: Codes, group_size: int) -> Tensor | None:
    """Return the group of each column, int32 ``[in]``; None if the groups consist of adjacent columns."""
    if codes.order is None:
        return None
    groups = torch.arange(len(codes.order), device=codes.order.device) // group_size
    return torch.empty_like(groups).index_copy_(0, codes.order, groups).int()


def _ordered_g_idx(codes: Codes, packing: Packing) -> Tensor:
    return torch.arange(packing.description.shape[1], device=codes.codes.device).div(
        packing.description.group_size, rounding_mode="floor"
    )

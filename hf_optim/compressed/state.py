"""The quantized state of a linear layer in memory: storing it, clearing it, and saving it to a file.

The functions also accept fused experts, whose state is implemented in ``experts``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelError
from ..toolkit.topology.experts import ExpertLinear
from .codec import check_fit, dequantize, quantize_input, scheme_on
from .experts import SCALE, attach_expert_schemes, clear_experts, expert_schemes, store_expert
from .float4 import (
    GLOBAL,
    decode_float4,
    float4_format,
    from_grid,
    require_fit,
    require_stock_dtype,
    spread,
    state_tensors,
)
from .quantized_forward import QuantizedForward
from .schemes import embedding_scheme
from .weights import Codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

PARAMETERS = ("weight_scale", "weight_zero_point", "weight_g_idx", GLOBAL, "input_scale", "input_zero_point")


@torch.no_grad()
def store(
    module: nn.Module | ExpertLinear,
    scheme: QuantizationScheme,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> None:
    """Put a linear layer or an embedding into the quantized state, in place.

    Args:
        module: an ``nn.Linear``, an ``nn.Embedding`` (its rows are those of a weight ``[out, in]``), or one matrix of
            an expert as ``storable`` gives it; its weight's dtype is the dtype in which the codes are decoded. Codes
            of an embedding are stored one per byte: transformers initializes embeddings through their ``weight``,
            which a packed one does not have.
        scheme: a result of ``scheme``.
        codes: int8 ``[out, in]`` on the grid of ``scheme.weights``, or float8 for FP8; None for unquantized weights.
        scale: ``[out, groups]``, ``[out, 1]`` or ``[1]``; must be exact in the weight's dtype, since the checkpoint
            stores it in that dtype (``grids.Grid`` rounds it).
        zero_point: int8, in the shape of ``scale``, for asymmetric grids; None for symmetric ones.
        input_scale, input_zero_point: ``[1]``, for statically quantized inputs.
        g_idx: int32 ``[in]``, the group of each column of the layer's input, if the columns of a group are not
            adjacent; the columns of ``codes`` are then sorted by group.
        global_scale: of NVFP4, float32 ``[1]`` (``Grid.global_scale``), or ``[out, 1]`` of one number. 4-bit floats are
            given as a ``Grid`` has them (floating-point scales), for which the weight must be in bfloat16, since stock
            transformers decodes to no other dtype; or as ``Codes`` has them (8-bit scales), in any dtype.

    Raises ``ModelError`` if the module or the tensors do not fit the scheme.
    """
    if isinstance(module, ExpertLinear):
        store_expert(module, scheme, codes, scale, zero_point)
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise ModelError(f"compressed-tensors stores nn.Linear weights only, not those of a {type(module).__name__}")
    if isinstance(module, nn.Embedding):
        scheme = embedding_scheme(scheme)
    clear(module)
    weight = module.weight
    if float4_format(scheme.weights):
        _store_float4(module, scheme, codes, scale, global_scale)
        return
    if scheme.weights is not None:
        check_fit(weight, scheme, codes, scale, zero_point)
        assert codes is not None
        assert scale is not None
        decoded = dequantize(codes, scale, zero_point, scheme.weights, weight)
        if g_idx is None:
            weight.copy_(decoded)
        else:
            weight.index_copy_(1, g_idx.to(weight.device).long().argsort(stable=True), decoded)
    given = {
        "weight_scale": scale,
        "weight_zero_point": zero_point,
        "weight_g_idx": g_idx,
        "input_scale": input_scale,
        "input_zero_point": input_zero_point,
    }
    for name, value in given.items():
        if value is not None:
            integer = torch.int32 if name == "weight_g_idx" else torch.int8
            value = value.to(weight.device, weight.dtype if value.is_floating_point() else integer)
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    weight.requires_grad_(False)
    _quantize_forward(module, scheme)


def _store_float4(module: Any, scheme: QuantizationScheme, codes: Any, scale: Any, shared: Any) -> None:
    """Put a layer into the decoded state of 4-bit floats; arguments as of ``store``."""
    args, weight = scheme.weights, module.weight
    if codes is None or scale is None:
        raise ModelError("quantized weights need codes and scales")
    if scale.itemsize > 1:
        require_stock_dtype(type(module).__name__, module)
        found = from_grid(codes, scale, shared, args)
    else:
        column = None if shared is None else spread(shared.flatten()[:1], len(codes))
        found = Codes(codes, scale, None, global_scale=column)
    require_fit(weight, found, args)
    weight.copy_(decode_float4(found, weight.dtype))
    for name, value in state_tensors(found).items():
        module.register_parameter(name, nn.Parameter(value.to(weight.device), requires_grad=False))
    weight.requires_grad_(False)
    _quantize_forward(module, scheme)


def _quantize_forward(module: nn.Module, scheme: QuantizationScheme) -> None:
    """Attach a scheme to a module, and the forward that quantizes its inputs if the scheme includes them."""
    from compressed_tensors.quantization import QuantizationStatus

    module.quantization_scheme = scheme
    module.quantization_status = QuantizationStatus.DECOMPRESSED
    if not isinstance(module, nn.Embedding):
        module.__dict__["forward"] = QuantizedForward(module)


def attach_scheme(
    module: nn.Linear, scheme: QuantizationScheme, input_scale: torch.Tensor | None, input_zero: torch.Tensor | None
) -> None:
    """Attach a scheme to a layer that is about to be packed, like ``store`` but without a weight."""
    from compressed_tensors.quantization import QuantizationStatus

    module.quantization_scheme = scheme  # type: ignore[assignment]
    module.quantization_status = QuantizationStatus.DECOMPRESSED  # type: ignore[assignment]
    for name, value in (("input_scale", input_scale), ("input_zero_point", input_zero)):
        if value is not None:
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))


def input_quantizer(
    scheme: QuantizationScheme, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that rounds inputs like a layer with this scheme, for a layer not in the quantized state.

    Args:
        scheme: a result of ``scheme`` with quantized activations.
        scale, zero_point: ``[1]``, for statically quantized inputs.
    """
    from compressed_tensors.quantization import QuantizationStatus

    held: Any = types.SimpleNamespace(
        quantization_scheme=scheme,
        quantization_status=QuantizationStatus.DECOMPRESSED,
        input_scale=scale,
        input_zero_point=zero_point,
    )
    return functools.partial(quantize_input, held)


def clear(module: nn.Module) -> bool:
    """Remove the quantized state of one module; its weight keeps its values. Return True if it had such a state."""
    if scheme_on(module) is None:
        return False
    packing: Any = getattr(module, "packing", None)
    if packing is not None:  # on a kernel
        packing.undo(module)
    if expert_schemes(module):
        clear_experts(module)
        return True
    if scheme_on(module) is None:
        return True
    for name in (*PARAMETERS, "weight_shape"):
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    for name in ("quantization_scheme", "quantization_status", "quantization_enabled", "forward"):
        module.__dict__.pop(name, None)
    return True


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in the quantized state, by name: linear layers, and modules with fused experts."""
    return {name: module for name, module in model.named_modules() if scheme_on(module) is not None}


def dump_module_state(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of a block and its quantization, for a file: tensors by name, and metadata (JSON types).

    The tensors are those of the module, not copies.
    """
    tensors = {name: value.detach() for name, value in module.state_dict().items()}
    schemes: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    for name, part in quantized_modules(module).items():
        fused = expert_schemes(part)
        if fused:
            experts[name] = {parameter: scheme.model_dump(mode="json") for parameter, scheme in fused.items()}
        else:
            schemes[name] = scheme_on(part).model_dump(mode="json")
    return tensors, {"schemes": schemes, "experts": experts}


@torch.no_grad()
def load_module_state(module: nn.Module, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Restore the state that ``dump_module_state`` returned, bit-exact.

    Raises ``CheckpointError`` if the block has other parameters, shapes or dtypes than the dumped one.
    """
    from compressed_tensors.quantization import QuantizationScheme

    for quantized in quantized_modules(module).values():
        clear(quantized)
    for name, fields in meta["schemes"].items():
        part = module.get_submodule(name)
        weight = part.get_parameter("weight").requires_grad_(False)
        _register_empty(part, name, PARAMETERS, tensors, weight.device)
        _quantize_forward(part, QuantizationScheme.model_validate(fields))
    for name, fused in meta.get("experts", {}).items():
        part = module.get_submodule(name)
        for parameter in fused:
            device = part.get_parameter(parameter).requires_grad_(False).device
            _register_empty(part, name, (parameter + SCALE,), tensors, device)
        attach_expert_schemes(
            part, {parameter: QuantizationScheme.model_validate(fields) for parameter, fields in fused.items()}
        )
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(f"the saved block and the current one have different tensors: only one has {name!r}")
    for name, value in own.items():
        if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
            raise CheckpointError(
                f"{name} was saved as {tensors[name].dtype} {tuple(tensors[name].shape)}, "
                f"but is now {value.dtype} {tuple(value.shape)}"
            )
        value.copy_(tensors[name])


def _register_empty(
    module: nn.Module, name: str, keys: Iterable[str], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Register empty parameters for those ``keys`` of a module that are among the saved tensors."""
    for key in keys:
        value = tensors.get(f"{name}.{key}" if name else key)
        if value is not None:
            empty = torch.empty_like(value, device=device)
            module.register_parameter(key, nn.Parameter(empty, requires_grad=False))

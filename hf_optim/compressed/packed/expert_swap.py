"""Turn a module of experts into ``PackedExperts`` and back, in place, and describe its matrices for kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...toolkit.topology.experts import PACKED_SHAPES, matrix_names, matrix_shape
from ..codes import OFF_GRID, decode, group_size_of, to_unsigned
from ..experts import PACKED_EXPERTS, SCALE, attach_expert_schemes, clear_experts, expert_schemes, is_readable
from ..weights import Codes, InputQuantization, QuantizedExperts, QuantizedWeight
from .describe import OFFLOADED, input_quantization, weight_kind
from .kernel import NO_KERNEL, Kernel, first_that_takes
from .packed_experts import NATIVE, SIDES, ExpertPacking, PackedExperts, packed_class

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

GATE_MODULE, SILU = "transformers.integrations.moe", ("SiLU", "SiLUActivation")


def describe_experts(
    name: str,
    module: Any,
    shapes: Mapping[str, tuple[int, int, int]],
    schemes: Mapping[str, QuantizationScheme],
    dtype: torch.dtype,
    device: torch.device,
    codes: Callable[[str, int], list[Codes]],
    ordered: bool = False,
) -> QuantizedExperts:
    """Describe experts for kernels.

    Args:
        name: qualified name of the module.
        shapes, schemes: of each stacked parameter, in the order in which a token passes through them.
        dtype, device: of the model there.
        codes: see ``QuantizedExperts``.
        ordered: columns may be reordered.
    """
    up, down = (
        _matrix(f"{name}.{parameter}", shapes[parameter], schemes[parameter], dtype, device, ordered)
        for parameter in shapes
    )
    gate = getattr(type(module), "_apply_gate", None)
    silu = module.has_gate and getattr(gate, "__module__", "") == GATE_MODULE and type(module.act_fn).__name__ in SILU
    return QuantizedExperts(name, next(iter(shapes.values()))[0], up, down, "silu" if silu else "", codes)


def _matrix(
    name: str,
    shape: tuple[int, int, int],
    scheme: QuantizationScheme,
    dtype: torch.dtype,
    device: torch.device,
    ordered: bool,
) -> QuantizedWeight:
    args, (_, rows, columns) = scheme.weights, shape
    inputs: InputQuantization | None = input_quantization(scheme)
    return QuantizedWeight(
        name=name,
        shape=(rows, columns),
        dtype=dtype,
        device=device,
        kind=weight_kind(args),
        bits=args.num_bits,
        group_size=group_size_of(args, columns),
        symmetric=bool(args.symmetric),
        ordered=ordered,
        inputs=inputs,
        sparse24=False,
        bias=None,
        codes=_no_matrix_codes,
    )


def _no_matrix_codes() -> Codes:
    raise ValueError("codes of experts are those of all matrices")


def first_experts_kernel(weight: QuantizedExperts, kernels: Iterable[Kernel]) -> Kernel | str:
    """Return the first kernel that runs experts, by their description alone, or the reasons why none does."""
    found = first_that_takes(kernels, lambda kernel: kernel.check_experts(weight), lambda kernel: None)
    return found or NO_KERNEL if isinstance(found, str) else found[0]


def prepack_experts(weight: QuantizedExperts, kernels: Iterable[Kernel]) -> tuple[Kernel, nn.Module] | str:
    """Return the first kernel that runs experts with their packed weights, or the reasons why none does."""

    def pack(kernel: Kernel) -> nn.Module:
        assert kernel.prepack_experts is not None  # or ``check_experts`` has a reason
        packed: nn.Module = kernel.prepack_experts(weight)
        return packed

    return first_that_takes(kernels, lambda kernel: kernel.check_experts(weight), pack) or NO_KERNEL


def pack_stored(name: str, module: nn.Module, kernels: Iterable[Kernel]) -> str:
    """Pack experts that are in the quantized state in memory; return the reason why no kernel runs them, or ``""``."""
    weight = describe_stored(name, module)
    if isinstance(weight, str):
        return weight
    found = prepack_experts(weight, kernels)
    if isinstance(found, str):
        return found
    shapes = {parameter: matrix_shape(module, parameter) for parameter in matrix_names(module)}
    pack_experts(module, shapes, weight, *found)
    return ""


def describe_stored(name: str, module: nn.Module) -> QuantizedExperts | str:
    """Describe experts in the quantized state in memory (``compressed.experts``), or say why that is not possible."""
    schemes, names = expert_schemes(module), matrix_names(module)
    if set(schemes) != set(names):
        return "only a part of its matrices is quantized"
    if getattr(module, "has_bias", False):
        return "its experts have biases"
    weights = [module.get_parameter(parameter) for parameter in names]
    if any(weight.is_meta for weight in weights):
        return OFFLOADED
    shapes = {parameter: matrix_shape(module, parameter) for parameter in names}
    parameters = {SIDES[parameter]: parameter for parameter in names}

    def codes(side: str, expert: int) -> list[Codes]:
        return [_recovered(module, parameters[side], expert)]

    return describe_experts(name, module, shapes, schemes, weights[0].dtype, weights[0].device, codes)


@torch.no_grad()
def _recovered(module: nn.Module, parameter: str, expert: int) -> Codes:
    """Recover the codes of one matrix; raises ``ValueError`` if they do not decode to its weight, bit-exact."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    matrix = module.get_parameter(parameter).detach()[expert]
    weight = matrix.T if getattr(module, "is_transposed", False) else matrix
    scale = module.get_parameter(parameter + SCALE).detach()[expert]
    args: Any = expert_schemes(module)[parameter].weights
    values = quantize(x=weight.float(), scale=scale.float(), zero_point=None, args=args, dtype=torch.int8)
    found = Codes(to_unsigned(values, args.num_bits), scale.contiguous(), None)
    if not torch.equal(decode(found, args.num_bits, weight.dtype), weight):
        raise ValueError(OFF_GRID)
    return found


def _no_codes(side: str, expert: int) -> list[Codes]:
    """Stand for the codes of packed experts, which come from the packed weights."""
    raise ValueError("the codes of packed experts come from their packed weights")


@torch.no_grad()
def pack_experts(
    module: nn.Module, shapes: dict[str, tuple[int, int, int]], weight: QuantizedExperts, kernel: Kernel, packed: Any
) -> None:
    """Make a module ``PackedExperts``: ``packed`` replaces its stacked parameters and their scales.

    Args:
        module: experts on transformers' interface; their schemes are attached (``compressed.experts``).
        shapes: ``(E, out, in)`` of each stacked parameter, by name.
        weight: the description from which ``kernel`` built ``packed``.
    """
    parameters = tuple(module._parameters)
    replaced = {}
    for name in shapes:
        old = module._parameters.pop(name, None)
        replaced[name] = old is not None and old.requires_grad
        module._parameters.pop(f"{name}_scale", None)
    former: Any = type(module)
    module.__class__ = packed_class(former)
    vars(module)[PACKED_SHAPES] = dict(shapes)
    description = replace(weight, codes=_no_codes)
    vars(module)["packing"] = ExpertPacking(description, kernel, former, unpack_experts, parameters, replaced)
    module._modules[PACKED_EXPERTS] = packed


@torch.no_grad()
def unpack_experts(module: PackedExperts) -> None:
    """Undo ``pack_experts``: the module has its stacked parameters again, bit-exact.

    Experts that stock transformers could read from a checkpoint also have their scales again, as after a recipe; others
    become ordinary dense ones.
    """
    packing, schemes = module.packing, dict(expert_schemes(module))
    shapes = vars(module)[PACKED_SHAPES]
    ordered = packing.description.up.ordered or packing.description.down.ordered
    readable = bool(schemes) and not ordered and all(is_readable(scheme) for scheme in schemes.values())
    values: dict[str, Tensor] = {}
    for name, (count, _, _) in shapes.items():
        values[name] = module.decoded(name)
        if readable:
            scales = [module.codes(name, expert).scale for expert in range(count)]
            values[name + SCALE] = torch.stack([s for s in scales if s is not None]).to(values[name].dtype)
    del module._modules[PACKED_EXPERTS]
    for key in ("packing", PACKED_SHAPES, NATIVE):
        vars(module).pop(key, None)
    module.__class__ = packing.former  # type: ignore[assignment]
    kept = dict(module._parameters)
    module._parameters.clear()
    names = dict.fromkeys((*packing.parameters, *values))
    for name in names:
        if name in values:
            grad = packing.replaced.get(name, False)
            module._parameters[name] = nn.Parameter(values[name], requires_grad=grad)
        elif name in kept:
            module._parameters[name] = kept.pop(name)
    module._parameters.update(kept)
    if readable:
        attach_expert_schemes(module, schemes)
    elif schemes:
        clear_experts(module)

"""The quantized state of fused experts: in memory, and under the names from which stock transformers reads them.

In memory, a module with fused experts has its decoded weights in its own parameters, like a linear layer, for each of
them a parameter ``<parameter>_scale`` ``[E, out, groups]``, and their quantization schemes in ``expert_schemes``. Its
forward is the stock one.

In a checkpoint, each expert is a separate linear layer. transformers (5.17 to 5.24) decodes such experts while it loads
them, under conditions that this module meets: only symmetric integers in the format ``pack-quantized``, one scheme for
all experts of the model, and only if it has a conversion from one matrix per expert to the fused parameter. The decoded
weights are bitwise identical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..toolkit import compat
from ..toolkit.topology.experts import (
    ExpertLinear,
    interface_experts,
    is_fused_experts,
    is_packed_experts,
    matrix_names,
    matrix_shape,
)
from .codec import check_fit, dequantize, pack
from .codes import checkpoint_tensors
from .schemes import scheme as make_scheme
from .weights import Codes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SCALE = "_scale"
SCHEMES = "expert_schemes"
PACKED_EXPERTS = "packed_experts"
"""The submodule that holds the matrices of experts on a kernel."""
WEIGHT = ".weight"


def expert_schemes(module: nn.Module) -> dict[str, QuantizationScheme]:
    """Return parameter -> ``QuantizationScheme`` of fused experts in the quantized state; empty for other modules."""
    return module.__dict__.get(SCHEMES, {})


@torch.no_grad()
def store_expert(
    layer: ExpertLinear,
    scheme: QuantizationScheme,
    codes: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> None:
    """Put one matrix of one expert into the quantized state, in place; see ``state.store``.

    The state of a module is complete when all its experts are stored, with one scheme for each of its parameters.
    Raises ``ModelError`` for schemes that stock transformers cannot read: zero points, floats, quantized inputs.
    """
    args = scheme.weights
    if args is None or args.type != "int" or not args.symmetric or scheme.input_activations is not None:
        raise ModelError(
            f"{layer.name}: stock transformers reads only experts with symmetric integer weights, without zero points "
            "and without quantized inputs"
        )
    check_fit(layer.weight, scheme, codes, scale, zero_point)
    assert codes is not None
    assert scale is not None
    module, key = layer.experts, layer.parameter + SCALE
    fused = module.get_parameter(layer.parameter)
    rows = layer.out_features
    layer.weight.copy_(dequantize(codes, scale, None, args, layer.weight))
    # A single scale of a tensor is stored as the scale of each of its channels.
    scale = (scale.reshape(1, 1) if args.strategy == "tensor" else scale).to(layer.weight).expand(rows, -1)
    known = module._parameters.get(key)
    if known is None or known.shape[1:] != scale.shape:
        missing = scale.new_full((len(fused), *scale.shape), math.nan)
        known = nn.Parameter(missing, requires_grad=False)
        module.register_parameter(key, known)
    known.data[layer.index] = scale
    fused.requires_grad_(False)
    attach_expert_schemes(module, {**expert_schemes(module), layer.parameter: per_channel(scheme)})


def per_channel(scheme: QuantizationScheme) -> QuantizationScheme:
    """Return the scheme with scales per channel instead of per tensor, since transformers splits and joins channels."""
    args = scheme.weights
    strategy: Any = "group" if args.strategy == "group" else "channel"
    return make_scheme(args.num_bits, "int", strategy, args.group_size if strategy == "group" else None)


def attach_expert_schemes(module: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Attach the quantization schemes of its parameters to a module of experts, which has their scales or codes."""
    from compressed_tensors.quantization import QuantizationStatus

    module.__dict__[SCHEMES] = dict(schemes)
    readable = all(is_readable(scheme) for scheme in schemes.values())
    common = unify_schemes(_with_columns(module, schemes)) if readable else next(iter(schemes.values()))
    module.quantization_scheme = common  # type: ignore[assignment]
    module.quantization_status = QuantizationStatus.DECOMPRESSED  # type: ignore[assignment]


def is_readable(scheme: QuantizationScheme) -> bool:
    """Return True if stock transformers reads experts with this scheme: packed symmetric integers, plain inputs."""
    args = scheme.weights
    symmetric = args is not None and args.type == "int" and bool(args.symmetric)
    return symmetric and scheme.input_activations is None and scheme.format == "pack-quantized"


def clear_experts(module: nn.Module) -> None:
    """Remove the quantized state of fused experts; their weights keep their values."""
    for parameter in module.__dict__.pop(SCHEMES):
        module._parameters.pop(parameter + SCALE, None)
    for name in ("quantization_scheme", "quantization_status"):
        module.__dict__.pop(name, None)


def unify_schemes(schemes: Sequence[tuple[int, QuantizationScheme]]) -> QuantizationScheme:
    """Return one scheme that stores weights of all these schemes losslessly.

    transformers decodes all experts with one scheme. It has the most bits, since a code of few bits is also a code of
    more bits, and the smallest groups, since several small groups can share the scale of a large one. If any scheme has
    groups, a channel counts as one group.

    Args:
        schemes: the number of columns of each weight, and its scheme.
    """
    known = [(columns, scheme.weights) for columns, scheme in schemes]
    bits = max(args.num_bits for _, args in known)
    if all(args.strategy != "group" for _, args in known):
        return make_scheme(bits)
    sizes = [args.group_size if args.strategy == "group" else columns for columns, args in known]
    return make_scheme(bits, strategy="group", group_size=math.gcd(*sizes))


def stored_scheme(model: nn.Module) -> QuantizationScheme | None:
    """Return the one scheme in which all experts of a model are stored; None if none is quantized."""
    modules = interface_experts(model).values()
    found = [pair for module in modules for pair in _with_columns(module, expert_schemes(module))]
    if not all(is_readable(scheme) for _, scheme in found):
        return found[0][1]  # loaded as it is; not written again
    return unify_schemes(found) if found else None


def _with_columns(module: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> list[tuple[int, QuantizationScheme]]:
    return [(matrix_shape(module, parameter)[2], scheme) for parameter, scheme in schemes.items()]


def experts_unsupported_reason(model: Any, name: str, module: nn.Module) -> str:
    """Return why stock transformers cannot read integer codes of these fused experts, or ``""``."""
    if not is_fused_experts(module):
        return f"{type(module).__name__} does not store and run its experts like the fused experts of transformers"
    for parameter in matrix_names(module):
        try:
            checkpoint_rows(model, f"{name}.{parameter}" if name else parameter, module)
        except ModelError as error:
            return str(error)
    return ""


def checkpoint_rows(model: Any, name: str, module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return where a checkpoint stores the rows of a fused parameter: name of a weight -> expert, first row, end.

    This is found by passing numbered rows through the conversion of transformers from the fused parameter to the
    checkpoint. The names are those before ``save_pretrained`` renames modules. Raises ``ModelError`` unless the
    checkpoint has a matrix ``[rows, in]`` for each expert.
    """
    kind, parameter = type(model).__name__, name.rpartition(".")[2]
    no_conversion = f"transformers has no conversion between {kind}'s {parameter} and one matrix for each expert"
    converter = _converter(model, name)
    if converter is None:
        raise ModelError(no_conversion)
    transposed = bool(getattr(module, "is_transposed", False))
    experts, rows, _ = matrix_shape(module, parameter)
    # Two columns: transformers 5.17 squeezes matrices of one.
    numbers = torch.arange(experts * rows, device="cpu").view(experts, rows, 1).repeat(1, 1, 2)
    try:
        parts = _converted(model, converter, name, numbers.transpose(1, 2) if transposed else numbers)
    except (ValueError, RuntimeError, IndexError) as error:  # it makes one tensor of several parameters
        raise ModelError(no_conversion) from error
    found = {}
    for key, part in parts.items():
        begin, count = int(part.flatten()[0]), part.numel() // 2
        expected = torch.arange(begin, begin + count, device="cpu")
        consecutive = part.shape == (count, 2) and torch.equal(part[:, 0], expected)
        expert = begin // rows
        if not key.endswith(WEIGHT) or not consecutive or (begin + count - 1) // rows != expert:
            raise ModelError(no_conversion)
        found[key] = (expert, begin - expert * rows, begin + count - expert * rows)
    if sum(end - begin for _, begin, end in found.values()) != experts * rows:
        raise ModelError(no_conversion)
    return found


def _converter(model: Any, name: str) -> Any:
    """Return the converter of transformers from a fused parameter to the checkpoint; None if none handles codes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for converter in get_model_conversion_mapping(model, add_legacy=False):
        sources = getattr(converter, "_original_source_patterns", [])
        # transformers adds the decoding to converters whose sources are all weights of experts.
        if isinstance(converter, WeightConverter) and all(s.endswith(WEIGHT) and "experts" in s for s in sources):
            reverse = converter.reverse_transform()
            if reverse.rename_source_key(name)[1] is not None:
                return reverse
    return None


def _converted(model: Any, reverse: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    renamed, pattern = reverse.rename_source_key(name)
    reverse.add_tensor(renamed, name, pattern, tensor)
    parts = reverse.convert(renamed, model=model, config=model.config)
    return {key: part[0] if isinstance(part, list) else part for key, part in parts.items()}


def discard_decoding(model: Any) -> None:
    """Make a model savable whose experts transformers decoded while loading, which it cannot revert.

    The conversions that include the decoding are replaced by the model's own.
    """
    if has_decoding(model):
        stack_again(model)


def has_decoding(model: Any) -> bool:
    """Return True if transformers decoded weights of a model as part of the conversions that loaded it."""
    return any(hasattr(op, "hf_quantizer") for one in compat.weight_conversions(model) for op in _operations(one))


def stack_again(model: Any) -> None:
    """Give a loaded model its own conversions between the names of a checkpoint and its parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    own = get_model_conversion_mapping(model, add_legacy=False)
    prefixes = [one for one in compat.weight_conversions(model) if isinstance(one, PrefixChange)]
    model._weight_conversions = [one for one in own if not isinstance(one, PrefixChange)] + prefixes


def _operations(conversion: Any) -> Any:
    return getattr(conversion, "operations", ())


def checkpoint_modules(model: nn.Module) -> list[str]:
    """Return the module names of the quantized matrices of experts in the checkpoint."""
    found = []
    for name, module in interface_experts(model).items():
        for parameter in expert_schemes(module):
            found += [key.removesuffix(WEIGHT) for key in checkpoint_rows(model, f"{name}.{parameter}", module)]
    return found


@torch.no_grad()
def packed_experts(model: nn.Module, name: str, scheme: QuantizationScheme) -> dict[str, Tensor] | None:
    """Return the checkpoint tensors of the quantized parameters of fused experts; None if a weight left its grid."""
    module = model.get_submodule(name)
    if is_packed_experts(module):
        return _from_codes(model, name, module, scheme)
    packed: dict[str, Tensor] = {}
    for parameter in expert_schemes(module):
        scales = module.get_parameter(parameter + SCALE)
        for key, (expert, begin, end) in checkpoint_rows(model, f"{name}.{parameter}", module).items():
            weight = ExpertLinear(module, name, parameter, expert).weight[begin:end]
            scale = _in_groups(scales[expert, begin:end], weight.shape[1], scheme)
            part = pack({"weight": weight, "weight_scale": scale}, scheme)
            if part is None:
                return None
            packed |= {f"{key.removesuffix(WEIGHT)}.{own}": value for own, value in part.items()}
    return packed


def _from_codes(model: nn.Module, name: str, module: Any, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Return the checkpoint tensors of experts on a kernel, from their codes: no weight is decoded.

    Raises ``ModelError`` for experts that stock transformers could not read: with zero points, floats, quantized
    inputs, or reordered columns.
    """
    require_readable(name, module)
    tensors: dict[str, Tensor] = {}
    for parameter, own in expert_schemes(module).items():
        shift = 2 ** (scheme.weights.num_bits - 1) - 2 ** (own.weights.num_bits - 1)
        rows = checkpoint_rows(model, f"{name}.{parameter}", module)
        for key, (expert, begin, end) in sorted(rows.items(), key=lambda item: item[1]):
            if begin == 0:
                found = module.codes(parameter, expert)
            scale = _in_groups(found.scale[begin:end], found.codes.shape[1], scheme)
            part = Codes(found.codes[begin:end] + shift, scale, None)
            tensors |= {f"{key.removesuffix(WEIGHT)}.{k}": v for k, v in checkpoint_tensors(part, scheme).items()}
    return tensors


def require_readable(name: str, module: Any) -> None:
    """Raise ``ModelError`` for experts on a kernel that stock transformers could not read from a checkpoint."""
    ordered = module.packing.description.up.ordered or module.packing.description.down.ordered
    if ordered or not all(is_readable(scheme) for scheme in expert_schemes(module).values()):
        raise ModelError(
            f"{name} cannot be saved compressed: stock transformers reads only experts with packed symmetric integers, "
            "without zero points, quantized inputs and reordered columns. Keep the checkpoint that was loaded, or call "
            "hf_optim.restore(model) first, which makes the experts dense"
        )


def _in_groups(scale: Tensor, columns: int, scheme: QuantizationScheme) -> Tensor:
    """Repeat scales ``[rows, groups]`` for the smaller groups of ``scheme``; always returns a copy."""
    args = scheme.weights
    groups = columns // args.group_size if args.strategy == "group" else 1
    return scale.repeat_interleave(groups // scale.shape[1], dim=1)

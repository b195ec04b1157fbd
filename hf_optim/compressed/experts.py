"""The quantized state of fused experts: in memory, and the names under which stock transformers reads them.

In memory a stack of experts has its decoded weights in its own parameters, as a linear has, beside each parameter
``<parameter>_scale`` ``[E, out, groups]``, and in ``expert_schemes`` how it is quantized. Its forward is the stock one.

In a checkpoint each expert is a linear of its own. transformers (5.17 to 5.23) decodes such experts while it loads
them, under conditions that make up this module: only symmetric integers in the format ``pack-quantized``, one scheme
for all experts of the model, and only where it has a conversion from one matrix per expert to the stack. The decoded
weights are the same, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..toolkit import compat
from ..toolkit.topology.experts import ExpertLinear, fused_experts, is_fused_experts, matrix_names

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SCALE = "_scale"
SCHEMES = "expert_schemes"
WEIGHT = ".weight"


def expert_schemes(module: nn.Module) -> dict[str, Any]:
    """Parameter -> ``QuantizationScheme`` of a stack of experts in the quantized state; empty for any other module."""
    return module.__dict__.get(SCHEMES, {})


@torch.no_grad()
def store_expert(layer: ExpertLinear, scheme: QuantizationScheme, codes: Any, scale: Any, zero_point: Any) -> None:
    """Put one matrix of one expert into the quantized state, in place; see ``quantized.store``.

    The state of a stack is whole when all its experts are stored, with one scheme for each of its parameters.
    Raises ``ModelError`` for what stock transformers could not read back: zero points, floats, quantized inputs.
    """
    from .codec import (
        check_fit,
        dequantize,  # which takes this module for stacks
    )

    args = scheme.weights
    if args is None or args.type != "int" or not args.symmetric or scheme.input_activations is not None:
        raise ModelError(
            f"{layer.name}: stock transformers reads experts of symmetric integer weights only, without zero points "
            "and without quantized inputs"
        )
    check_fit(layer.weight, scheme, codes, scale, zero_point)
    stack, key = layer.experts, layer.parameter + SCALE
    stacked = stack.get_parameter(layer.parameter)
    rows = layer.out_features
    layer.weight.copy_(dequantize(codes, scale, None, args, layer.weight))
    # A tensor's one scale is that of each of its channels.
    scale = (scale.reshape(1, 1) if args.strategy == "tensor" else scale).to(layer.weight).expand(rows, -1)
    known = stack._parameters.get(key)
    if known is None or known.shape[1:] != scale.shape:
        blank = scale.new_full((len(stacked), *scale.shape), math.nan)
        known = nn.Parameter(blank, requires_grad=False)
        stack.register_parameter(key, known)
    known.data[layer.index] = scale
    stacked.requires_grad_(False)
    attach_expert_schemes(stack, {**expert_schemes(stack), layer.parameter: per_channel(scheme)})


def per_channel(scheme: QuantizationScheme) -> QuantizationScheme:
    """The scheme with a scale for each channel where it had one for the tensor: stock splits and joins channels."""
    from .schemes import scheme as made

    args = scheme.weights
    strategy: Any = "group" if args.strategy == "group" else "channel"
    return made(args.num_bits, "int", strategy, args.group_size if strategy == "group" else None)


def attach_expert_schemes(stack: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> None:
    """Say on a stack how its parameters are quantized. Their scales are there already."""
    from compressed_tensors.quantization import QuantizationStatus

    stack.__dict__[SCHEMES] = dict(schemes)
    stack.quantization_scheme = unify_schemes(_widths(stack, schemes))  # type: ignore[assignment]
    stack.quantization_status = QuantizationStatus.DECOMPRESSED  # type: ignore[assignment]


def clear_experts(stack: nn.Module) -> None:
    """Take the quantized state off a stack; its weights stay as they are."""
    for parameter in stack.__dict__.pop(SCHEMES):
        stack._parameters.pop(parameter + SCALE, None)
    for name in ("quantization_scheme", "quantization_status"):
        stack.__dict__.pop(name, None)


def unify_schemes(found: Sequence[tuple[int, QuantizationScheme]]) -> QuantizationScheme:
    """One scheme in which weights of all these widths and schemes can be stored without a loss.

    transformers decodes all experts by one scheme. It has the widest codes, since a code of few bits is one of many
    bits too, and the finest groups, since a scale of a wide group is that of several narrow ones. A channel counts as
    a group of its width where anything else has groups.
    """
    from .schemes import scheme as made

    known = [(width, scheme.weights) for width, scheme in found]
    bits = max(args.num_bits for _, args in known)
    if all(args.strategy != "group" for _, args in known):
        return made(bits)
    sizes = [args.group_size if args.strategy == "group" else width for width, args in known]
    return made(bits, strategy="group", group_size=math.gcd(*sizes))


def stored_scheme(model: nn.Module) -> QuantizationScheme | None:
    """The one scheme in which all experts of a model are written; None if none is quantized."""
    found = [pair for stack in fused_experts(model).values() for pair in _widths(stack, expert_schemes(stack))]
    return unify_schemes(found) if found else None


def _widths(stack: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> list[tuple[int, QuantizationScheme]]:
    return [(ExpertLinear(stack, "", parameter, 0).in_features, scheme) for parameter, scheme in schemes.items()]


def experts_unsupported_reason(model: Any, name: str, stack: nn.Module) -> str:
    """Why stock transformers cannot read integer codes of a stack of experts; the empty string if it can."""
    if not is_fused_experts(stack):
        return f"{type(stack).__name__} does not keep and run its experts the way of transformers' fused ones"
    for parameter in matrix_names(stack):
        try:
            checkpoint_rows(model, f"{name}.{parameter}" if name else parameter, stack)
        except ModelError as error:
            return str(error)
    return ""


def checkpoint_rows(model: Any, name: str, stack: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Where the rows of a stacked parameter go in a checkpoint: name of a weight -> expert, first row, end.

    Found by sending numbered rows through transformers' own conversion from the stack to the checkpoint. The names are
    those before ``save_pretrained`` renames modules. Raises ``ModelError`` where the checkpoint has no matrix
    ``[rows, in]`` for each expert.
    """
    kind, parameter = type(model).__name__, name.rpartition(".")[2]
    refusal = f"transformers has no conversion between {kind}'s {parameter} and one matrix for each expert"
    converter = _converter(model, name)
    if converter is None:
        raise ModelError(refusal)
    shape = stack.get_parameter(parameter).shape
    transposed = bool(getattr(stack, "is_transposed", False))
    experts, rows = shape[0], shape[2] if transposed else shape[1]
    numbers = torch.arange(experts * rows).view(experts, rows, 1)
    parts = _converted(model, converter, name, numbers.transpose(1, 2) if transposed else numbers)
    found = {}
    for key, part in parts.items():
        begin = int(part.flatten()[0])
        expected = torch.arange(begin, begin + part.numel())
        whole = part.shape == (part.numel(), 1) and torch.equal(part.flatten(), expected)
        expert = begin // rows
        if not key.endswith(WEIGHT) or not whole or (begin + part.numel() - 1) // rows != expert:
            raise ModelError(refusal)
        found[key] = (expert, begin - expert * rows, begin + part.numel() - expert * rows)
    if sum(end - begin for _, begin, end in found.values()) != experts * rows:
        raise ModelError(refusal)
    return found


def _converter(model: Any, name: str) -> Any:
    """transformers' converter from a stacked parameter to the checkpoint, None if it has none that takes codes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for converter in get_model_conversion_mapping(model, add_legacy=False):
        sources = getattr(converter, "_original_source_patterns", [])
        # Those whose every source is the weight of an expert are the ones to which transformers adds the decoding.
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
    """Let a model be saved whose experts transformers decoded while loading: it cannot revert that, and need not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = compat.weight_conversions(model)
    if any(hasattr(op, "hf_quantizer") for one in known for op in getattr(one, "operations", ())):
        own = get_model_conversion_mapping(model, add_legacy=False)
        prefixes = [one for one in known if isinstance(one, PrefixChange)]
        model._weight_conversions = [one for one in own if not isinstance(one, PrefixChange)] + prefixes


def checkpoint_modules(model: nn.Module) -> list[str]:
    """The names that the quantized matrices of experts have as modules of the checkpoint."""
    found = []
    for name, stack in fused_experts(model).items():
        for parameter in expert_schemes(stack):
            found += [key.removesuffix(WEIGHT) for key in checkpoint_rows(model, f"{name}.{parameter}", stack)]
    return found


@torch.no_grad()
def packed_experts(model: nn.Module, name: str, scheme: QuantizationScheme) -> dict[str, Tensor] | None:
    """The checkpoint's tensors of a stack's quantized parameters; None if a weight is no longer on its grid."""
    from .codec import pack

    stack = model.get_submodule(name)
    packed: dict[str, Tensor] = {}
    for parameter in expert_schemes(stack):
        scales = stack.get_parameter(parameter + SCALE)
        for key, (expert, begin, end) in checkpoint_rows(model, f"{name}.{parameter}", stack).items():
            weight = ExpertLinear(stack, name, parameter, expert).weight[begin:end]
            scale = _in_groups(scales[expert, begin:end], weight.shape[1], scheme)
            part = pack({"weight": weight, "weight_scale": scale}, scheme)
            if part is None:
                return None
            packed |= {f"{key.removesuffix(WEIGHT)}.{own}": value for own, value in part.items()}
    return packed


def _in_groups(scale: Tensor, width: int, scheme: QuantizationScheme) -> Tensor:
    """Scales ``[rows, groups]`` repeated for the narrower groups of ``scheme``; always a copy."""
    args = scheme.weights
    groups = width // args.group_size if args.strategy == "group" else 1
    return scale.repeat_interleave(groups // scale.shape[1], dim=1)

"""The bridge to compressed-tensors, the quantized format that transformers reads natively.

A quantized module is kept as stock transformers has it after reloading the checkpoint: the dequantized weight in
``module.weight``, ``weight_scale`` (and ``weight_zero_point``) beside it, ``quantization_scheme``, the status
``DECOMPRESSED``, and a forward that quantizes the activations if the scheme says so. Nothing is packed until
``save_pretrained``, which packs through transformers' own hook for quantized models (``attach_quantizer``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .errors import ModelError
from .quantized import clear, dump_module_state, load_module_state, quantized_modules, scheme_on, store
from .schemes import activation_args, scheme, scheme_of, weight_args
from .toolkit.linear_layers import owners

if TYPE_CHECKING:
    from .scope import Scope

__all__ = [
    "activation_args",
    "attach_quantizer",
    "clear",
    "dense",
    "detach_quantizer",
    "dump_module_state",
    "load_module_state",
    "quantized_modules",
    "scheme",
    "scheme_of",
    "scheme_on",
    "storable",
    "store",
    "weight_args",
]


def storable(
    scope: Scope, targets: Iterable[str], skip: Iterable[str] = (), integer: bool = True, label: str = "this step"
) -> tuple[dict[str, nn.Linear], dict[str, list[str]]]:
    """The linears of a scope that compressed-tensors can store, and the names of what it cannot, by reason.

    Experts that a model keeps as stacked matrices (no ``nn.Linear`` of their own) are among the latter. With
    ``integer`` weights such a model is refused (``ModelError``, beginning with ``label``): transformers (5.17 to 5.23)
    looks for packed experts in an integer checkpoint, and cannot read one whose experts are not.
    """
    targets = tuple(targets)
    selected = scope.select(targets, skip)
    holders = owners(scope.model)
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, list[str]] = {}
    for name, module in selected.items():
        reason = _unstorable(name, module, holders)
        if reason or not isinstance(module, nn.Linear):
            skipped.setdefault(reason, []).append(name)
        else:
            layers[name] = module
    stacks = [name for name, m in scope.module.named_modules(prefix=scope.name) if scope.holds(name) and is_stack(m)]
    if stacks and integer and layers:
        raise ModelError(
            f"{label} cannot store integer weights of {type(scope.model).__name__}: its experts are stacked matrices "
            f"({stacks[0]}), which stay as they are, and stock transformers reads an integer checkpoint of a mixture "
            "of experts only with its experts packed too. Use fp8, which it reads"
        )
    if stacks and "Linear" in targets:
        skipped["stacked matrices: compressed-tensors stores nn.Linear only"] = stacks
    return layers, skipped


def is_stack(module: nn.Module) -> bool:
    """Whether a module holds stacked matrices ``[n, ., .]``, as experts are kept."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return not convolution and any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False))


def _unstorable(name: str, module: nn.Module, holders: Mapping[int, list[str]]) -> str:
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__}: compressed-tensors stores nn.Linear only"
    others = [other for other in holders.get(id(module.weight), ()) if other != f"{name}.weight"]
    return f"its weight is shared with {others[0]}" if others else ""


def dense(model: nn.Module) -> list[str]:
    """Turn a quantized model into an ordinary one, in place, with the dequantized weights and the stock forward.

    A module of remote code that ``holds_codes`` gives ``to_dense() -> (module, exact)``: the stock module in its place,
    and whether that computes the same. Weights decode to the same values. Quantization of *activations* has no dense
    equivalent and is gone: the names of the modules that had it are returned, and their outputs change. Kernels are
    taken off.
    """
    from .acceleration import restore
    from .remote_code import revert
    from .toolkit.replacing import replace_module

    restore(model)
    lost = []
    for name, module in list(model.named_modules()):
        if getattr(module, "holds_codes", False):
            own, exact = module.to_dense()  # type: ignore[operator]
            replace_module(model, name, own)
            lost += [] if exact else [name]
    if isinstance(model, PreTrainedModel):
        revert(model)
    for name, module in quantized_modules(model).items():
        if scheme_on(module).input_activations is not None:
            lost.append(name)
        clear(module)
        module.get_parameter("weight").requires_grad_(True)
    detach_quantizer(model)
    return lost


def attach_quantizer(model: Any) -> None:
    """Make ``model.save_pretrained`` write a compressed-tensors checkpoint, and ``model.config`` say so.

    Call it when the quantized modules are in their state; a second call brings the configuration up to date.
    Raises ``ModelError`` if no module is quantized.
    """
    from .packing import keep_readable, quantization_config, quantizer_class, stored_schemes

    keep_readable(model)
    schemes = stored_schemes(model)
    if not schemes:
        raise ModelError("no module of this model is quantized")
    config = quantization_config(model, schemes)
    model.hf_quantizer = quantizer_class()(config)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    model.config.quantization_config = config
    for config in _configs(model):
        config._is_quantized = True


def detach_quantizer(model: Any) -> None:
    """Undo ``attach_quantizer``. The modules are left as they are."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for config in _configs(model):
        for name in ("quantization_config", "_is_quantized"):
            vars(config).pop(name, None)


def _configs(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedConfig

    found = (getattr(part, "config", None) for part in model.modules())
    return [config for config in found if isinstance(config, PreTrainedConfig)]

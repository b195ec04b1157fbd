"""Selecting the layers of a scope that compressed-tensors can store, with the reasons for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..toolkit.topology.experts import ExpertLinear, expert_linears, expert_stacks, has_stacked_weights
from ..toolkit.topology.linear_layers import linears, parameter_names
from ..toolkit.topology.selection import match
from .dense_conversions import reads_float_stacks
from .experts import expert_schemes, experts_unsupported_reason

if TYPE_CHECKING:
    from ..runs.scope import Scope

LINEAR_ONLY = "compressed-tensors stores nn.Linear only"
FP8_REMEDY = "Use fp8, which leaves experts unquantized"
LEAVE_OUT = ', or leave its experts out (skip: ["*.experts.*"])'


def storable(
    scope: Scope,
    targets: Iterable[str],
    skip: Iterable[str] = (),
    integer: bool = True,
    label: str = "this step",
    *,
    experts: bool = False,
    symmetric: bool = True,
    embeddings: bool = False,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the linear layers of a scope that compressed-tensors can store, and the names of the others, by reason.

    If a model stores its experts as stacked matrices (instead of ``nn.Linear`` modules), transformers (5.17 to 5.24)
    expects codes for them in an integer checkpoint, and cannot read one without. With ``integer`` weights, therefore,
    either all experts are quantized or the model is rejected. Classes whose code is saved with the checkpoint read
    experts in floating point, too, if none is quantized.

    Args:
        scope, targets, skip: see ``Scope.select``. ``Linear`` includes the matrices of experts, but not routers.
        integer: True if the weights get integer codes. Otherwise experts are skipped.
        label: the beginning of error messages.
        experts: True if the caller also quantizes ``ExpertLinear`` layers, which are then among the returned ones.
        symmetric: True if the codes have no zero points, as experts require.
        embeddings: True if the caller also quantizes ``nn.Embedding`` modules that a pattern names, to integers.

    Raises ``ModelError`` for integer weights of a model whose experts would not be stored, or could not be read back.
    """
    targets, skip = tuple(targets), tuple(skip)
    selected = scope.select(targets, skip, experts=experts, embeddings=embeddings)
    holders = parameter_names(scope.model)
    layers: dict[str, Any] = {}
    skipped: dict[str, list[str]] = {}
    for name, module in selected.items():
        if isinstance(module, ExpertLinear):
            if integer:
                layers[name] = module
            continue
        reason = _unstorable(name, module, holders, integer)
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            layers[name] = module
    stacks = expert_stacks(scope.model)
    inside = [name for name, module in scope.model.named_modules() if scope.holds(name) and has_stacked_weights(module)]
    if stacks and integer and layers:
        _require_readable_experts(scope, stacks, targets, skip, label, experts, symmetric)
        quantized = {layer.experts_name for layer in layers.values() if isinstance(layer, ExpertLinear)}
        quantized |= {name for name, stack in stacks.items() if expert_schemes(stack)}
        inside = [name for name in inside if name not in quantized]
    if inside and "Linear" in targets:
        skipped[f"stacked matrices: {LINEAR_ONLY}"] = inside
    return layers, skipped


def _require_readable_experts(
    scope: Scope,
    stacks: Mapping[str, nn.Module],
    targets: tuple[str, ...],
    skip: tuple[str, ...],
    label: str,
    experts: bool,
    symmetric: bool,
) -> None:
    """Raise ``ModelError`` unless stock transformers can read the experts after a step on these targets."""
    model = scope.model
    begin = f"{label} cannot store integer weights of {type(model).__name__}: its experts are stacked matrices"
    left = {name: stack for name, stack in stacks.items() if not expert_schemes(stack)}
    views = expert_linears(model)
    chosen = set(match({**linears(model), **views}, targets, skip)) if experts else set()
    if reads_float_stacks(model) and not any(views[name].experts_name in left for name in chosen & set(views)):
        return
    if not experts and left:
        raise ModelError(
            f"{begin} ({next(iter(left))}), which this technique leaves unquantized, and stock transformers reads an "
            "integer checkpoint of a mixture of experts only if its experts are packed too. Use a technique that "
            "quantizes experts, or fp8, which stock transformers reads together with unquantized experts"
        )
    out = [name for name, view in views.items() if name not in chosen and view.experts_name in left]
    if out:
        some = "all or none of its experts" if reads_float_stacks(model) else "all its experts"
        raise ModelError(
            f"{begin} of which targets and skip leave out {len(out)}, such as {out[0]}, and stock transformers reads "
            f"an integer checkpoint of a mixture of experts only if {some} are packed. Select all of them, or use fp8"
        )
    checked = {name: stack for name, stack in left.items() if scope.holds(name)} or dict([*left.items()][:1])
    for name, stack in checked.items():
        if why := experts_unsupported_reason(model, name, stack):
            raise ModelError(
                f"{begin} ({name}), and stock transformers could not read their codes: {why}. {FP8_REMEDY}"
            )
        if not symmetric:
            raise ModelError(
                f"{begin} ({name}), and stock transformers reads codes of experts without zero points only. Use "
                f"symmetric: true{LEAVE_OUT * reads_float_stacks(model)}"
            )


def takes_embeddings(step: Any) -> bool:
    """Return True if the targets of a step may be embeddings."""
    return bool(step.takes(nn.Embedding(1, 1, device="meta")))


def unstorable_pattern(scope: Scope, targets: Iterable[str], integer: bool, embeddings: bool) -> str:
    """Return why one of several patterns has no effect, since none of its layers can be stored; ``""`` if all have.

    A single pattern without effect is a step without layers, which the step reports itself. The exact name of a layer
    that cannot be stored is skipped with a warning: one recipe names the head of tied and of untied models.
    """
    holders = parameter_names(scope.model)
    targets = tuple(targets)
    for pattern in targets if len(targets) > 1 else ():
        chosen = scope.select([pattern], experts=True, embeddings=embeddings)
        reasons = {
            name: "" if isinstance(layer, ExpertLinear) else _unstorable(name, layer, holders, integer)
            for name, layer in chosen.items()
        }
        if chosen and pattern not in chosen and all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            more = f" and {len(chosen) - 1} more" if len(chosen) > 1 else ""
            return f"{pattern!r} in targets has no effect: {name}{more} cannot be stored ({reason})"
    return ""


def _unstorable(name: str, module: nn.Module, holders: Mapping[int, list[str]], integer: bool) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        if not integer:
            return "an embedding is stored as integer codes only"
        if module.max_norm is not None:
            return "its forward writes to its weight (max_norm)"
    elif isinstance(module, Conv1D):
        return f"{kind}: {LINEAR_ONLY}; pruning, distillation, gobo and peg work on it"
    elif not isinstance(module, nn.Linear):
        return f"{kind}: {LINEAR_ONLY}"
    elif isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    weight = module._parameters.get("weight")  # None for a layer whose weight is packed
    others = [other for other in holders.get(id(weight), ()) if other != f"{name}.weight"]
    return f"its weight is tied to {others[0]}" if others else ""

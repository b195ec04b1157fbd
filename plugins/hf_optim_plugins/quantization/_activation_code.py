"""Install modules that round their input into a model, with the code that travels with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, joined, stock_class
from hf_optim.toolkit.modules import replace
from hf_optim.toolkit.quantization import GridSpec, make_grid
from hf_optim.toolkit.topology import parameter_names, weight_out_in

from . import _activation_modules


@dataclass(frozen=True, eq=False)
class Grids:
    """The grids of one module's input: ``scale`` [groups], ``zero`` [groups] int8, ``group`` [channels]."""

    scale: Tensor
    zero: Tensor
    group: Tensor


def code_of(name: str) -> RemoteCode:
    """Return the remote code of a technique whose modules round their input."""
    model_base = _activation_modules.RoundedActivationModel
    return RemoteCode(
        name=name,
        config_base="",
        source=joined(replace, _activation_modules),
        field=model_base.replaced_field,
        model_base=model_base.__name__,
    )


def select_unshared(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Return the linears whose weight no other module shares, and the names of the others, by reason."""
    holders = parameter_names(model)
    kept: dict[str, nn.Module] = {}
    skipped: dict[str, list[str]] = {}
    for name, layer in layers.items():
        others = [other for other in holders.get(id(layer.weight), ()) if other != f"{name}.weight"]
        if others:
            skipped.setdefault(f"its weight is tied to {others[0]}", []).append(name)
        else:
            kept[name] = layer
    return kept, skipped


@torch.no_grad()
def install(
    model: PreTrainedModel,
    code: RemoteCode,
    layers: Iterable[str],
    norms: Iterable[str],
    grids: Mapping[str, Grids],
    bits: int | None,
    grouped: bool = False,
) -> None:
    """Replace modules of a model in place, and give it a class that builds them again when it is loaded.

    Args:
        model: of a class of transformers.
        code: made by ``code_of``.
        layers: names of linears; the input of one without ``grids`` is not rounded.
        norms: names of normalizations, all with ``grids``.
        grids: of the inputs, by name.
        bits: of the weights, symmetric with one scale per row; None leaves them unquantized.
        grouped: one scale per row and group of input channels instead.
    """
    made = generate(code, stock_class(type(model.config)))  # type: ignore[arg-type]
    entries: dict[str, dict[str, Any]] = {}
    for name in layers:
        groups = grids[name].scale.numel() if name in grids else 0
        scales = 0 if bits is None else max(1, groups) if grouped else 1
        layer = made.RoundedLinear.in_place_of(model.get_submodule(name), groups, scales)
        entries[name] = {"kind": "linear", "groups": groups, "scales": scales}
        _fill(layer, model.get_submodule(name), grids[name].group if scales > 1 else None, bits)
        _place(model, name, layer, grids.get(name))
    for name in norms:
        groups = grids[name].scale.numel()
        entries[name] = {"kind": "norm", "groups": groups}
        _place(model, name, made.RoundedNorm(model.get_submodule(name), groups), grids[name])
    convert(model, code, {"modules": entries})


def _fill(new: Any, layer: Any, group: Tensor | None, bits: int | None) -> None:
    """Copy the weight (quantized) and the bias of a stock layer into its replacement."""
    weight = weight_out_in(layer).detach()
    if bits is None:
        new.weight.copy_(weight)
    else:
        every: list[Any] = (
            [slice(None)] if group is None else [(group == g).nonzero().flatten() for g in range(new.scales)]
        )
        for number, columns in enumerate(every):
            grid = make_grid(weight[:, columns], GridSpec(bits))
            new.weight[:, columns] = grid.quantize(weight[:, columns])
            new.weight_scale[:, number] = grid.scale.flatten().to(new.weight_scale)
    if layer.bias is not None:
        new.bias = layer.bias


def _place(model: nn.Module, name: str, module: Any, grids: Grids | None) -> None:
    if grids is not None:
        module.set_grids(grids.scale, grids.zero, grids.group)
    module.train(model.get_submodule(name).training)
    replace.replace_module(model, name, module)

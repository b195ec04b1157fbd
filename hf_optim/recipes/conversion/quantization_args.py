"""From the config groups and schemes of a quantizing modifier to the fields of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import RecipeError
from ...trust.bounds import shown
from ..schemes import REFUSED, SCHEMES, find_scheme
from .notes import Fields, Notes

OBSERVERS = {
    None: "minmax",
    "minmax": "minmax",
    "memoryless_minmax": "minmax",
    "static_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
}


@dataclass(frozen=True)
class Group:
    """Layers that are quantized alike.

    Attributes:
        targets: class names, names or patterns of layers.
        fields: of a quantizing step; ``{"scheme": name}`` for a preset.
        act_order: the order of the columns that the weights' arguments name for GPTQ; None if they name none.
        refusal: why no step of hf_optim can write it; None if one can.
    """

    targets: list[str]
    fields: dict[str, Any]
    act_order: str | bool | None = None
    refusal: str | None = None


def read_groups(modifier: Fields, notes: Notes) -> list[Group]:
    """Take ``scheme``, ``config_groups``, ``targets`` and the observers of a modifier; return its groups.

    Empty if the modifier names no format. Raises ``RecipeError`` for fields of the wrong type.
    """
    targets = modifier.names("targets", ("Linear",))
    observers = _observers(modifier)
    scheme, groups = modifier.take("scheme"), modifier.take("config_groups")
    if scheme is not None and groups:
        raise RecipeError(f"{modifier.label} has both scheme and config_groups: keep one of them")
    if isinstance(scheme, str):
        found = [_preset(scheme, targets)]
    elif isinstance(scheme, dict) and set(map(str, scheme)) & {"weights", "input_activations"}:
        found = [_explicit(Fields({**scheme, "targets": targets}, f"{modifier.label}: scheme", notes), observers)]
    elif scheme is not None or groups:
        found = list(_named_groups(modifier, scheme if scheme is not None else groups, observers, notes))
    else:
        return []
    return [_with_observer(group, observers.get("weights")) for group in found]


def _named_groups(modifier: Fields, groups: Any, observers: dict[str, Any], notes: Notes) -> Iterator[Group]:
    if not isinstance(groups, dict):
        raise RecipeError(f"{modifier.label}: config_groups must be a mapping, not {shown(groups)}")
    for name, group in groups.items():
        if isinstance(group, dict):
            yield _explicit(Fields(group, f"{modifier.label}: {shown(str(name))}", notes), observers)
        else:  # the name of a preset, and the layers it is for
            yield _preset(str(name), Fields({"t": group}, f"{modifier.label}: {shown(str(name))}", notes).names("t"))


def _preset(name: str, targets: list[str]) -> Group:
    if name.upper() in REFUSED:
        return Group(targets, {}, refusal=f"{name.upper()}: {REFUSED[name.upper()]}")
    return Group(targets, {"scheme": find_scheme(name)[0]})


def _explicit(group: Fields, observers: dict[str, Any]) -> Group:
    """Translate a group whose arguments are written out; as a scheme where one has the same fields."""
    targets = group.names("targets", ("Linear",))
    weights, inputs = group.take("weights"), group.take("input_activations")
    group.drop("the format follows from the fields", "format")
    group.rest()  # output_activations
    if not weights and not inputs:
        return Group(targets, {}, refusal="quantizes neither weights nor inputs")
    try:
        act_order = weights.get("actorder") if isinstance(weights, dict) else None
        fields = {**_weights(weights, group, observers), **_inputs(inputs, group)}
    except _Inexpressible as error:
        return Group(targets, {}, refusal=str(error))
    observer = fields.pop("observer", None)
    for name, scheme in SCHEMES.items():
        if all(fields.get(key, _DEFAULTS[key]) == value for key, value in scheme.fields.items()):
            fields = {"scheme": name}
            break
    else:
        # What is as everywhere is left out, since not every technique has a field for it.
        needed = ("bits", "group_size")
        fields = {key: value for key, value in fields.items() if key in needed or value != _DEFAULTS[key]}
    return Group(targets, {**fields, **({"observer": observer} if observer == "mse" else {})}, act_order)


class _Inexpressible(Exception):
    """No format of hf_optim stores this."""


_DEFAULTS = {
    "bits": 8, "format": "int", "strategy": None, "group_size": None, "symmetric": True, "activations": None,
    "dynamic": True, "symmetric_activations": True,
}  # fmt: skip


def _weights(data: Any, group: Fields, observers: dict[str, Any]) -> dict[str, Any]:
    if not data:
        return {"bits": None}
    args = Fields(data, f"{group.label}: weights", group.notes)
    bits, kind = args.number("num_bits", 8), str(args.take("type", "int")).lower()
    size, strategy = args.number("group_size"), args.take("strategy")
    strategy = str(strategy).lower() if strategy is not None else "tensor" if size is None else "group"
    if size == -1:
        strategy, size = "channel", None
    if float4 := _float4(bits, kind, strategy, size):
        args.take("dynamic"), args.flag("symmetric", True), args.take("actorder"), args.take("scale_dtype")
        args.drop("where scales are stored follows from the format", "zp_dtype")
        found = _observer(args.take("observer"), args)
        args.rest()
        return {"bits": 4, "format": float4, "strategy": None, "group_size": size, "symmetric": True, "observer": found}
    if strategy not in ("tensor", "channel", "group"):
        raise _Inexpressible(f"weights with a scale per {shown(strategy)} are not among hf_optim's formats")
    if kind == "float" and (bits != 8 or strategy == "group"):
        raise _Inexpressible(f"float weights of {bits} bits with a scale per {strategy} are not among its formats")
    if args.take("dynamic"):
        args.change("dynamic scales of weights have no counterpart")
    symmetric = args.flag("symmetric", True)
    args.take("actorder")  # read by ``_explicit``
    name = args.take("observer")
    args.drop("where scales are stored follows from the format", "zp_dtype")
    args.rest()
    return {
        "bits": bits,
        "format": "fp8" if kind == "float" else "int",
        "strategy": "tensor" if strategy == "tensor" else None,
        "group_size": size if strategy == "group" else None,
        "symmetric": symmetric,
        "observer": _observer(name, args),
    }


def _float4(bits: int | None, kind: str, strategy: str, size: int | None) -> str:
    """Return the format of 4-bit floats that such weights are in, or ``""``."""
    if bits != 4 or kind != "float":
        return ""
    return {("tensor_group", 16): "nvfp4", ("group", 32): "mxfp4"}.get((strategy, size or 0), "")


def _inputs(data: Any, group: Fields) -> dict[str, Any]:
    if not data:
        return {}
    args = Fields(data, f"{group.label}: input_activations", group.notes)
    bits, kind = args.number("num_bits", 8), str(args.take("type", "int")).lower()
    dynamic, strategy = args.take("dynamic", False), args.take("strategy")
    strategy = str(strategy).lower() if strategy is not None else "token" if dynamic else "tensor"
    symmetric = args.flag("symmetric", True)
    args.drop("ranges of static inputs are the extrema of the calibration data", "observer")
    args.rest()
    known = bits == 8 or (bits == 4 and kind == "int")
    if not known or (strategy, dynamic) not in (("token", True), ("tensor", False)):
        how = f"{'dynamic' if dynamic else 'static'} inputs of {bits} bits with a scale per {shown(strategy)}"
        raise _Inexpressible(f"{how} are not among hf_optim's formats")
    return {
        "activations": "fp8" if kind == "float" else f"int{int(bits)}",
        "dynamic": bool(dynamic),
        "symmetric_activations": symmetric,
    }


def _observers(modifier: Fields) -> dict[str, Any]:
    given = modifier.take("observer")
    if given is not None and not isinstance(given, dict):
        raise RecipeError(f"{modifier.label}: observer must be a mapping, not {shown(given)}")
    found = {"weights": modifier.take("weight_observer"), **(given or {})}
    modifier.drop("inputs are observed by their extrema", "input_observer", "output_observer")
    return {"weights": _observer(found["weights"], modifier) if found["weights"] is not None else None}


def _observer(name: Any, fields: Fields) -> str:
    key = name.lower() if isinstance(name, str) else name
    known = OBSERVERS.get(key) if key is None or isinstance(key, str) else None
    if known is None:
        fields.change(f"the observer {shown(name)} has no counterpart: scales come from mse")
        return "mse"
    return known


def _with_observer(group: Group, observer: str | None) -> Group:
    if observer != "mse" or group.refusal:
        return group
    return Group(group.targets, {**group.fields, "observer": "mse"}, group.act_order)

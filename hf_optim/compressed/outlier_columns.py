"""Outlier decomposition: which layers compute outlier columns of their input separately, and above which magnitude.

Quantized formats cannot express this, so it is stored in the model's configuration, where stock transformers preserves
it from load to save without reading it::

    "hf_optim": {"outliers": [{"threshold": 6.0, "modules": ["model.layers.*.mlp.up_proj", ...]}]}

With a threshold of null, no column is an outlier. In module names, ``*`` stands for the number of a layer. It does not
affect what stock transformers computes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..trust.bounds import shown

FIELD, KEY = "hf_optim", "outliers"
# The name that adapters give to the layer that they wrap.
WRAPPED = "base_layer"


def set_outlier_threshold(model: Any, names: Iterable[str], threshold: float | None) -> None:
    """Set the magnitude above which these linear layers multiply columns of their input unquantized.

    It applies to layers with 8-bit symmetric weights and one scale per row, and is ignored for others. With None, no
    column is an outlier. Raises ``ValueError`` for a threshold that is negative or not finite, and ``CheckpointError``
    if the configuration has something else where thresholds are kept.
    """
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold {threshold}; it must be finite and not negative, or None")
    names = sorted(names)
    entries = [left for each in _stored(model.config) if (left := _without(each, set(names), model))]
    if names:
        entries.append({"threshold": threshold, "modules": _patterns(names, model)})
    setattr(model.config, FIELD, {**(getattr(model.config, FIELD, None) or {}), KEY: entries})


def outlier_thresholds(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Return the thresholds of those of ``names`` that have one; infinity for a threshold of null.

    Raises ``CheckpointError`` if the configuration of the model does not describe thresholds.
    """
    entries = _entries(model)
    found: dict[str, float] = {}
    for name in names if entries else ():
        for entry in entries:
            if any(_same(name, pattern) for pattern in entry["modules"]):
                found[name] = math.inf if entry["threshold"] is None else float(entry["threshold"])
    return found


def remove_outlier_thresholds(config: Any) -> None:
    """Remove all outlier thresholds from a configuration."""
    held = getattr(config, FIELD, None)
    if isinstance(held, Mapping) and KEY in held:
        rest = {key: value for key, value in held.items() if key != KEY}
        if rest:
            setattr(config, FIELD, rest)
        else:
            delattr(config, FIELD)


def _entries(model: nn.Module) -> list[dict[str, Any]]:
    for part in model.modules():
        if getattr(getattr(part, "config", None), FIELD, None) is not None:
            return _stored(part.config)
    return []


def _stored(config: Any) -> list[dict[str, Any]]:
    """Return the entries in a configuration. Raises ``CheckpointError`` for one that does not describe thresholds."""
    held = getattr(config, FIELD, None) or {}
    if not isinstance(held, Mapping):
        raise CheckpointError(f"config.json: {FIELD} must be a mapping, not {shown(held)}")
    entries = held.get(KEY) or []
    if not isinstance(entries, (list, tuple)):
        raise CheckpointError(f"config.json: {FIELD}.{KEY} must be a list, not {shown(entries)}")
    for entry in entries:
        if not _describes_thresholds(entry):
            raise CheckpointError(
                f"config.json: an entry of {FIELD}.{KEY} must have a threshold (null, or a finite number from 0) and "
                f"modules (a list of names), not {shown(entry)}"
            )
    return [dict(entry) for entry in entries]


def _describes_thresholds(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or "threshold" not in entry:
        return False
    threshold, modules = entry["threshold"], entry.get("modules")
    if not isinstance(modules, (list, tuple)) or not all(isinstance(name, str) for name in modules):
        return False
    if threshold is None:
        return True
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    return is_number and 0 <= threshold <= sys.float_info.max


def _without(entry: dict[str, Any], names: set[str], model: nn.Module) -> dict[str, Any]:
    """Return an entry without these modules; empty if no module is left."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = [name for name in linears if any(_same(name, pattern) for pattern in entry["modules"])]
    left = [name for name in own if name not in names]
    return {**entry, "modules": _patterns(left, model)} if left else {}


def _patterns(names: list[str], model: nn.Module) -> list[str]:
    """Replace numbers in names by ``*`` where the result matches no other linear layer."""
    chosen = set(names)
    others = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in chosen]
    found: dict[str, None] = {}
    for name in names:
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found[name if any(_same(other, general) for other in others) else general] = None
    return list(found)


def _same(name: str, pattern: str) -> bool:
    """Return True if a name matches a pattern, also in a wrapper around the model or in its base model."""
    parts = [part for part in name.split(".") if part != WRAPPED]
    wanted = pattern.split(".")
    if len(wanted) == len(parts) + 1 and len(parts) > 1:
        wanted = wanted[1:]
    if len(wanted) > len(parts):
        return False
    tail = parts[len(parts) - len(wanted) :]
    return all(own == part or (part == "*" and own.isdigit()) for own, part in zip(tail, wanted, strict=True))

"""What a model computes otherwise than its stock class besides the weights of layers, one line each, for ``report``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...errors import ModelError
from ...toolkit.attention import FIELD
from ...toolkit.exits import EARLY_EXIT, exits_of
from ...toolkit.quantization import scheme_of
from ...trust.bounds import shown


def model_settings(model: nn.Module) -> list[str]:
    """Return the quantization of keys and values, the attention, the exits and the early exit of a model, if any."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return []
    return [line for line in (_key_values(config), _attention(config), _exits(model), _early_exit(config)) if line]


def _key_values(config: Any) -> str:
    try:
        scheme = scheme_of(config)
    except ModelError as error:
        return f"keys and values: {error}"
    if scheme is None:
        return ""
    bits = scheme.bits if isinstance(scheme.bits, str) else f"{scheme.bits} bits"
    return (
        f"keys and values: {bits} in hf_optim.generate, scales of keys per {scheme.keys}, groups of {scheme.group} "
        f"tokens, the latest {scheme.residual} in full precision"
    )


def _attention(config: Any) -> str:
    settings: Any = getattr(config, FIELD, None)
    if not isinstance(settings, Mapping) or not hasattr(config, "used_attachment"):
        return ""
    made: Any = type(config).attachment
    name = str(getattr(made, "name", "")).rpartition("_")[0]  # a number of the module of its code follows
    listed = ", ".join(f"{key} {shown(value)}" for key, value in settings.items())
    state = "attached" if config.used_attachment() is not None else "detached, the stock class's attention computes"
    return f"attention: {name} ({listed}), {state}"


def _exits(model: nn.Module) -> str:
    found = exits_of(model)
    return f"exits: {_after(found.settings.layers)}, heads {found.settings.heads}" if found is not None else ""


def _early_exit(config: Any) -> str:
    found: Any = getattr(config.get_text_config(decoder=True), EARLY_EXIT, None)
    if not isinstance(found, Mapping):
        return ""
    layers = found.get("layers")
    where = _after(layers) if layers else "after any exit"
    how = "drafts that the model verifies" if found.get("lossless") is True else "tokens leave"
    confidence, threshold = (shown(found.get(key)).strip("'") for key in ("confidence", "threshold"))
    return f"early exit: {how} in hf_optim.generate {where}, {confidence} from {threshold}"


def _after(layers: Iterable[Any]) -> str:
    listed = [shown(each) for each in layers]
    return f"after block{'s' if len(listed) > 1 else ''} {', '.join(listed)}"

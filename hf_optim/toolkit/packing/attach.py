"""Give the encoder of a model a forward without padding, and take it away again.

The setting is an entry of the configuration, which stock transformers preserves and does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import shown
from ..modules.mixed_classes import mixed
from ..modules.swap_class import restore_class, swap_class
from . import interface
from .encoders import find_encoder, reads_first_column
from .own_attention import restore_layers, swap_layers
from .packed_encoder import PACKING, PackedEncoder, Packing

SETTING = "hf_optim_packing"
SHARE, CAPTURE = "largest_share", "capture"


def attach_packing(model: PreTrainedModel, largest_share: float, label: str, capture: bool = True) -> str:
    """Let the encoder of ``model`` remove padding, in place; return its name (``""`` for the model itself).

    ``capture``: on a GPU, forwards whose sizes come again are CUDA graphs.

    Raises ``ModelError`` for a model that cannot be packed.
    """
    encoder, kind = find_encoder(model, label)
    detach_packing(model)
    base = encoder.config._attn_implementation
    if base not in interface.BASES:
        raise ModelError(
            f"{label}: {type(encoder).__name__} runs with attn_implementation={base!r}, which has its own way of "
            "padding: load it with sdpa or eager"
        )
    first = reads_first_column(model, encoder)
    packed = mixed(PackedEncoder, type(encoder))  # type: ignore[arg-type]
    swap_class(encoder, packed, **{PACKING: Packing(kind, largest_share, first, base, capture)})
    swap_layers(encoder)
    if kind.registered:
        interface.register(base, encoder)
        encoder.config._attn_implementation = interface.name_for(base)
    return next(name for name, module in model.named_modules() if module is encoder)


def attach_stored_packing(model: nn.Module) -> None:
    """Let a model whose configuration has the setting remove padding, if it does not yet.

    Raises ``ModelError`` for a malformed setting, and for a model that it does not fit.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            setting = stored_setting(part.config)
            if setting is not None and packing_of(part) is None:
                attach_packing(part, setting[SHARE], f"config.json: {SETTING}", setting[CAPTURE])
            return


def detach_packing(model: nn.Module) -> None:
    """Give the encoders of a model their stock forward and attention back. Without any, do nothing."""
    for module in list(model.modules()):
        packing = vars(module).get(PACKING)
        if packing is not None:
            restore_layers(module)
            config: Any = module.config
            if interface.base_of(config._attn_implementation) is not None:
                config._attn_implementation = packing.base
            restore_class(module)
            interface.unregister(packing.base, module)


def packing_of(model: nn.Module) -> Packing | None:
    """Return how a model is packed at present, or None."""
    return next((vars(module)[PACKING] for module in model.modules() if PACKING in vars(module)), None)


def store_setting(config: Any, share: float, capture: bool) -> None:
    """Write the setting into a configuration; that forwards are captured goes without saying."""
    setattr(config, SETTING, {SHARE: share} if capture else {SHARE: share, CAPTURE: False})


def stored_setting(config: Any) -> dict[str, Any] | None:
    """Return the setting in a configuration, or None. Raises ``ModelError`` if it is malformed."""
    found = getattr(config, SETTING, None)
    if found is None:
        return None
    if not isinstance(found, Mapping) or SHARE not in found or set(found) - {SHARE, CAPTURE}:
        raise ModelError(f"config.json: {SETTING} must be a mapping with {SHARE}, not {shown(found)}")
    capture, share = found.get(CAPTURE, True), found[SHARE]
    if not isinstance(capture, bool):
        raise ModelError(f"config.json: {SETTING}.{CAPTURE} must be true or false, not {shown(capture)}")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ModelError(f"config.json: {SETTING}.{SHARE} must be a number above 0 and up to 1, not {shown(share)}")
    return {SHARE: float(share), CAPTURE: capture}

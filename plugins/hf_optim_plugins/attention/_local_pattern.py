"""The pattern of ``local``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_optim.toolkit.attention import Attachment, Band, Pattern, PatternConfig, whole, wholes


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return one pattern for all heads: keys less than ``window`` away; all keys in the layers ``full_layers``."""
    window, full = whole(settings, "window", low=1), wholes(settings, "full_layers")
    reach = None if layer in full else window - 1
    return [Pattern((Band(reach, reach),), causal)]


class LocalAttachment(Attachment):
    """The attention function of ``local``."""

    def require_settings(self, config: Any) -> None:
        """Raise ``ValueError`` for other settings, and for full layers that the model does not have."""
        super().require_settings(config)
        layers, full = config.get_text_config().num_hidden_layers, wholes(self._settings(config), "full_layers")
        if full and max(full) >= layers:
            raise ValueError(f"the attention pattern has full_layers up to {max(full)}, and the model {layers} layers")


ATTACHMENT = LocalAttachment("hf_optim_local", build)


class LocalBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT

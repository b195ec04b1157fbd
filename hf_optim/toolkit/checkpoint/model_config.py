"""The configuration of a checkpoint, its model class, and its model on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from ...errors import ModelError


def load_config(source: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model. Raises ``ModelError`` if there is none."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model configuration at {source!r}: {str(error).splitlines()[0]}") from error


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class whose ``from_pretrained`` loads the model that ``config`` describes."""
    names = getattr(config, "architectures", None) or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    auto_map = getattr(config, "auto_map", None) or {}
    autos = [name for name in auto_map if name.startswith("AutoModel") and hasattr(transformers, name)]
    # The map has a class for every head, but the checkpoint has the weights of one.
    autos.sort(key=lambda name: str(auto_map[name]).rpartition(".")[2] not in names)
    if autos:
        return getattr(transformers, autos[0])
    return transformers.AutoModelForCausalLM


def build_meta_model(config: PreTrainedConfig) -> Any:
    """Build the model that ``config`` describes on the meta device."""
    cls = model_class(config)
    with torch.device("meta"):
        return cls.from_config(config) if cls.__name__.startswith("AutoModel") else cls(config)

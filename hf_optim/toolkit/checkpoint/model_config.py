"""The configuration of a checkpoint, its model class, and its model on the meta device."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...trust.code import may_run, require_no_kernels
from ...trust.files import require_regular
from ...trust.hub_access import require_findable
from .stock_errors import config_errors, require_bounded, stock_errors


def load_config(source: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model; its code runs only if ``trust_remote_code`` is True.

    Raises ``ModelError`` if there is no configuration, or if it needs code that is not trusted, and ``CheckpointError``
    for files that are not regular files of the checkpoint, and for a configuration that names a kernel on the Hub.
    """
    trusted = may_run(trust_remote_code)
    require_findable(source, revision)
    if os.path.isdir(source):
        require_regular(Path(source))
    with config_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted, revision=revision)
    require_bounded(config, source)
    require_no_kernels(source, trusted, revision=revision)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class whose ``from_pretrained`` loads the model that ``config`` describes."""
    listed = getattr(config, "architectures", None)
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, (list, tuple)) else []
    for name in names:
        # A name in a configuration is input: transformers has functions, trainers and pipelines too.
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    auto_map = getattr(config, "auto_map", None)
    auto_map = auto_map if isinstance(auto_map, Mapping) else {}
    autos = [name for name in auto_map if name.startswith("AutoModel") and hasattr(transformers, name)]
    # The map has a class for every head, but the checkpoint has the weights of one.
    autos.sort(key=lambda name: str(auto_map[name]).rpartition(".")[2] not in names)
    if autos:
        return getattr(transformers, autos[0])
    return transformers.AutoModelForCausalLM


def build_meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Build the model that ``config`` describes on the meta device; its own code runs only if it is trusted.

    Raises ``ModelError`` if it needs code that is not trusted, or if no class fits ``config``.
    """
    cls = model_class(config)
    with torch.device("meta"):
        if not cls.__name__.startswith("AutoModel"):
            with stock_errors(type(config).__name__, "no model can be built from"):
                return cls(config)
        with stock_errors(type(config).__name__, "no model can be built from"):
            return cls.from_config(config, trust_remote_code=may_run(trust_remote_code))


def own_configs(model: nn.Module) -> None:
    """Give a model its own copies of its configurations, which the caller may have built other models from.

    Modules that share a configuration object, or hold a part of another's, do so afterwards as well.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (PreTrainedConfig, GenerationConfig)):
                vars(module)[name] = copy.deepcopy(value, memo)

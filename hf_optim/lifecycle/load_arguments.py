"""The arguments of ``from_pretrained``: what is refused, the configuration and files they name, and what steps set."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import CheckpointError, ModelError, RecipeError
from ..recipes.config import DataConfig
from ..recipes.technique import Technique
from ..runs.run import Run
from ..toolkit.checkpoint.stock_errors import config_errors, require_bounded
from ..toolkit.compat import set_experts_implementation
from ..trust.bounds import shown
from ..trust.code import may_run, require_no_kernels
from ..trust.weights import checked_weights

LOOKUP = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def restrict(kwargs: dict[str, Any]) -> None:
    """Set the arguments of ``from_pretrained`` so that code needs the caller's word, and weights are safetensors.

    Raises ``CheckpointError`` if the call asks for other weights.
    """
    kwargs["trust_remote_code"] = may_run(kwargs.get("trust_remote_code"))
    if kwargs.setdefault("use_safetensors", True) is False:
        raise CheckpointError("hf_optim reads safetensors only: pickle files can run code when they are opened")
    if kwargs.get("gguf_file") is not None:
        raise CheckpointError("hf_optim reads safetensors only, no GGUF files: convert the checkpoint first")
    kwargs["use_safetensors"] = True


def refuse_data_fields(kwargs: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Raise ``RecipeError`` for an argument that is a field of a recipe's calibration data."""
    for field in dataclasses.fields(DataConfig):
        if field.name in kwargs and not hasattr(config, field.name):
            value = shown(kwargs[field.name])
            raise RecipeError(
                f"from_pretrained has no argument {field.name}: it is a field of the recipe's calibration data. Pass "
                f"optim_config=hf_optim.OptimConfig.parse(recipe).with_calibration({field.name}={value})"
            )


def resolve_config(cls: Any, source: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return the configuration of the model to load, and the arguments that the configuration did not consume."""
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given), kwargs  # the caller may build other models from it
    # The stock method resolves the configuration the same way, and keeps what the configuration did not consume.
    reader = cls.config_class if getattr(cls, "config_class", None) is not None else AutoConfig
    # A configuration has a dtype, too, and would keep that of the call, which may be "auto".
    dtypes = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    if not kwargs.get("gguf_file"):
        _require_config_file(source if given is None else given, kwargs.get("subfolder") or "")
    with config_errors(source, kwargs.get("subfolder") or ""):
        config, rest = reader.from_pretrained(
            given if given is not None else source, return_unused_kwargs=True, **kwargs
        )
    rest |= dtypes
    require_bounded(config, source)
    # Both the configuration and the weights are looked up by these, and their code needs the same word.
    return config, {**{key: kwargs[key] for key in (*LOOKUP, "trust_remote_code") if key in kwargs}, **rest}


def _require_config_file(source: Any, subfolder: str) -> None:
    """Raise ``ModelError`` for a directory without a configuration: a class of transformers has defaults of its own."""
    home = os.path.join(os.fspath(source), subfolder) if isinstance(source, (str, os.PathLike)) else ""
    # What is wrong with a folder of an adapter is said of its files.
    names = (CONFIG_NAME, "adapter_config.json")
    if os.path.isdir(home) and not any(os.path.lexists(os.path.join(home, name)) for name in names):
        with config_errors(source, subfolder):
            raise OSError(f"{home} has no {CONFIG_NAME}")


def given_experts(kwargs: Mapping[str, Any]) -> Any:
    """Return the implementation of experts that the caller of ``from_pretrained`` chose, or None."""
    # transformers' Auto classes have put the argument into the configuration.
    given_config = getattr(kwargs.get("config"), "_experts_implementation", None)
    return kwargs.get("experts_implementation", given_config)


def check_files(source: Any, config: Any, kwargs: dict[str, Any]) -> tuple[Path, ...] | None:
    """Check the files that stock ``from_pretrained`` will load, and return them. Raises ``CheckpointError``."""
    if source is None:
        return None  # weights in memory, given as ``state_dict``
    lookup = {key: kwargs.get(key) for key in LOOKUP}
    require_no_kernels(source, kwargs["trust_remote_code"], **lookup)
    adapter = dict(kwargs.get("adapter_kwargs") or {})
    files = checked_weights(
        source,
        named=getattr(config, "transformers_weights", None),
        variant=kwargs.get("variant"),
        adapter=adapter.get("_adapter_model_path"),
        adapter_revision=adapter.get("revision"),
        **lookup,
    )
    if "force_download" in kwargs:
        kwargs["force_download"] = False  # what was checked is what is loaded
    return files


def has_other_layers(source: Any, config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    """Return True if the caller chose other numbers of layers than the checkpoint's config.json names."""
    if source is None:
        return False
    lookup = {key: kwargs[key] for key in LOOKUP if key in kwargs}
    try:
        stored, _ = PreTrainedConfig.get_config_dict(source, **lookup)
    except (OSError, ValueError):
        return False
    return _differ_in_layers(stored, config.to_dict())


def _differ_in_layers(stored: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    for key, value in stored.items():
        if isinstance(value, Mapping) and isinstance(current.get(key), Mapping):
            if _differ_in_layers(value, current[key]):
                return True
        elif key in current and any(word in key for word in ("layer", "depth", "block")) and value != current[key]:
            return True
    return False


def prepared_load(run: Run, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that the steps of the first stage set. Two steps may not set one key."""
    settings: dict[str, Any] = {}
    owners: dict[str, Technique] = {}
    for step in run.stages[0].steps:
        for wanted in run.call_on([step], "prepare_load", load_kwargs=MappingProxyType(dict(kwargs))):
            for key, value in wanted.items():
                if key in owners and settings[key] != value:
                    raise RecipeError(
                        f"{run.label(owners[key])} and {run.label(step)} both set {key!r} "
                        f"({settings[key]!r} and {value!r}); leave one of them out"
                    )
                given = kwargs.get(key)
                if given is None and key == "attn_implementation":
                    # AutoModel has put the caller's choice into the configuration already.
                    given = getattr(run.config, "_attn_implementation_internal", None)
                if given is not None and given != value and run.loading:
                    raise RecipeError(f"{run.label(step)} sets {key!r} to {value!r}, the call to {given!r}")
                settings[key], owners[key] = value, step
    return settings


def apply_prepared(run: Run, model: PreTrainedModel) -> None:
    """Apply the ``prepare_load`` settings to a model that is already in memory."""
    for key, value in prepared_load(run, {}).items():
        if key == "attn_implementation":
            model.set_attn_implementation(value)
        elif key == "experts_implementation" and hasattr(model, "set_experts_implementation"):
            set_experts_implementation(model, value)
        elif key == "dtype":
            model.to(value)
        else:
            raise ModelError(
                f"{key!r} can only be set while the model is loaded: use from_pretrained(optim_config=...)"
            )

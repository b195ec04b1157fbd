"""The rule for every load: each parameter and persistent buffer gets its values from the checkpoint, or the load fails.

transformers initializes what a checkpoint lacks at random, drops what the model has no place for, and casts integers to
floating point, each with at most a warning. ``load_placed`` runs its loader and refuses these cases with a
``CheckpointError`` that names the tensors: a missing, mismatched or misplaced tensor, codes of a quantized layer
without their scales, codes whose ``quantization_config`` was lost, and layers that the configuration does not have.
"""

from __future__ import annotations

import copy
import enum
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...trust.bounds import first_line
from .. import compat
from .key_names import model_names
from .odd_tensors import odd_tensors
from .safetensors import DTYPE_NAMES, FLOAT_DTYPES, TORCH_DTYPES, SafetensorsHeaders, TensorInfo
from .stock_errors import PASSED, stock_error
from .stored_codes import CHECKED_METHODS, CODE_NAMES, require_known_format, require_whole_codes

log = logging.getLogger(__name__)


class NewHeads(enum.Enum):
    """Which tensors outside the base model a checkpoint may lack, since they are new and trained later."""

    NONE = "none"
    CLASSIFIERS = "classifiers"  # and poolers; not output embeddings, whose values only a training can give
    ALL = "all"


# Parameters that only a masked pretraining uses, and counters that no output depends on.
UNUSED = ("masked_spec_embed", "mask_token", "num_batches_tracked")
# Errors of transformers and compressed-tensors for checkpoints that they cannot convert.
FOREIGN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError)


def load_placed(
    stock: Callable[..., tuple[Any, dict[str, Any]]],
    config: Any,
    weights: Iterable[Path] | Mapping[str, torch.Tensor],
    source: Any,
    *,
    new_heads: NewHeads = NewHeads.NONE,
    ignore_mismatched_heads: bool = False,
    changed_config: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers, and hold the result to the rule of this module.

    Args:
        stock: called with ``output_loading_info=True, ignore_mismatched_sizes=True``; a ``from_pretrained`` with its
            other arguments bound.
        config: the configuration of the checkpoint.
        weights: the safetensors files, or the state dict.
        source: the Hub id or directory, for messages; None for weights in memory.
        new_heads: what the checkpoint may lack. These tensors are named in a warning.
        ignore_mismatched_heads: allow heads of another shape (``ignore_mismatched_sizes=True`` of the caller); they
            count as new.
        changed_config: the caller changed the configuration (fewer layers), so that additional layers are left out on
            purpose.

    Returns the model and transformers' loading info.

    Raises ``CheckpointError``.
    """
    where = str(source) if source is not None else "the state dict"
    method = require_known_format(config, where)
    entries = _entries(weights)
    require_whole_codes(entries, method, where)
    try:
        model, info = stock(output_loading_info=True, ignore_mismatched_sizes=True)
    except PASSED:
        raise
    except Exception as error:
        if not isinstance(error, FOREIGN) or (method is None and not _is_conversion(error)):
            raise stock_error(error, where) from error
        odd = odd_tensors(entries)
        reason = f"{odd[0]}{_and_more(len(odd))}" if odd else first_line(error, 200, typed=True)
        raise CheckpointError(f"{where}: transformers cannot load its tensors: {reason}") from error
    whole = model
    if getattr(model, "_hf_peft_config_loaded", False):
        _require_adapter(info, where)  # the info of a load with an adapter is that of the adapter
        whole, info = _load_base(type(model), config, entries, getattr(stock, "keywords", {}).get("key_mapping"))
    require_placed(
        whole,
        info,
        where,
        quantized=method is not None,
        new_heads=new_heads,
        ignore_mismatched_heads=ignore_mismatched_heads,
        changed_config=changed_config,
    )
    if method in CHECKED_METHODS:
        require_floats(whole, entries, where, quantized=method is not None)
    return model, info


def _require_adapter(info: Mapping[str, Any], where: str) -> None:
    """Raise ``CheckpointError`` if an adapter does not give each of its weights its values, by the info of its load."""
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        raise CheckpointError(
            f"the adapter of {where} has no weights of the right shape for {len(wrong)} of its tensors ({_few(wrong)})"
        )
    if info["unexpected_keys"]:
        raise CheckpointError(f"the adapter of {where} has tensors without a place ({_few(info['unexpected_keys'])})")


def _load_base(
    cls: Any, config: Any, entries: Mapping[str, TensorInfo], key_mapping: Mapping[str, str] | None
) -> tuple[Any, dict[str, Any]]:
    """Load the base model of an adapter on the meta device; return it with transformers' loading info."""
    state = {
        key: torch.empty(entry.shape, dtype=TORCH_DTYPES.get(entry.type, torch.float32), device="meta")
        for key, entry in entries.items()
    }
    with torch.random.fork_rng(devices=[]):
        return cls.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=state,
            key_mapping=key_mapping,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


def _entries(weights: Iterable[Path] | Mapping[str, torch.Tensor]) -> Mapping[str, TensorInfo]:
    if not isinstance(weights, Mapping):
        return SafetensorsHeaders(weights).entries
    return {
        key: TensorInfo(key, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for key, tensor in weights.items()
    }


def require_placed(
    model: Any,
    info: Mapping[str, Any],
    where: str,
    *,
    quantized: bool = False,
    new_heads: NewHeads = NewHeads.NONE,
    ignore_mismatched_heads: bool = False,
    changed_config: bool = False,
) -> None:
    """Raise ``CheckpointError`` if tensors are missing, mismatched or unplaced, by transformers' loading ``info``.

    ``quantized`` says that the checkpoint has a ``quantization_config``. For the other arguments see ``load_placed``.
    """
    kind = type(model).__name__
    wrong = {name: (list(stored), list(built)) for name, stored, built in info["mismatched_keys"]}
    allowed = {name for name in wrong if ignore_mismatched_heads and _is_head(model, name, NewHeads.ALL)}
    refused = sorted(wrong.keys() - allowed)
    if refused:
        stored, built = wrong[refused[0]]
        raise CheckpointError(
            f"{refused[0]} is {stored} in {where}, and {kind} with this configuration has {built}"
            f"{_and_more(len(refused))}: the weights and the configuration belong to different models"
        )
    missing = {name for name in info["missing_keys"] if name.rpartition(".")[2] not in UNUSED}
    new = _new_heads(model, missing, new_heads)
    absent = sorted(missing - new)
    unplaced = sorted(key for key in info["unexpected_keys"] if _belongs(model, key, quantized))
    if changed_config:
        unplaced = [key for key in unplaced if not _in_additional_layer(model, key)]
    codes = [key for key in unplaced if key.rpartition(".")[2] in CODE_NAMES]
    if codes and not quantized:
        raise CheckpointError(
            f"{where} has {len(codes)} tensors of quantized layers that {kind} has no parameter for ({_few(codes)}): "
            "its quantization_config is missing from config.json"
        )
    if absent:
        unexpected = sorted(info["unexpected_keys"])
        has = f"; it has {len(unexpected)} others, such as {_few(unexpected)}" if unexpected else ""
        raise CheckpointError(
            f"{where} has no weights for {len(absent)} tensors of {kind} ({_few(absent)}){has}: load it with the class "
            "that its config.json names, or fetch the missing shards"
        )
    if unplaced:
        raise CheckpointError(
            f"{where} has {len(unplaced)} tensors that {kind} with this configuration has no place for "
            f"({_few(unplaced)}), and without them the model would compute something else: config.json does not belong "
            "to these weights"
        )
    if new | allowed:
        log.warning("%s has no weights for %s of %s: they are new and need training", where, _few(new | allowed), kind)


def require_floats(model: nn.Module, entries: Mapping[str, TensorInfo], where: str, quantized: bool = False) -> None:
    """Raise ``CheckpointError`` if a floating-point tensor outside quantized layers was read from integers or FP8.

    ``quantized`` says that the checkpoint has a ``quantization_config``.
    """
    state = model.state_dict()
    conversions = compat.weight_conversions(model)
    found = model_names(entries, conversions, getattr(model, "base_model_prefix", ""), state)
    codes = {
        key: name
        for key, (name, pattern) in found.items()
        if entries[key].type not in FLOAT_DTYPES
        and name in state
        and not (quantized and pattern is not None and _has_scale(key, entries))
    }
    layers = {name for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    codes = {k: n for k, n in codes.items() if n.rpartition(".")[0] not in layers or n.endswith(".bias")}
    if codes and quantized:
        # Tensors of a quantized checkpoint keep their dtypes in memory: integers in a parameter come from the files.
        with torch.device("meta"):
            state = type(model)(_plain_config(model)).state_dict()
    wrong = [key for key, name in codes.items() if name in state and state[name].is_floating_point()]
    if unknown := [key for key in wrong if entries[key].type not in TORCH_DTYPES]:
        file = f"{entries[unknown[0]].file.name}: " if entries[unknown[0]].file else ""
        raise CheckpointError(f"{file}{unknown[0]} has the type {entries[unknown[0]].type}, which hf_optim cannot read")
    if quantized and wrong and found[wrong[0]][1] is not None:
        raise CheckpointError(
            f"{where}: {wrong[0]} is stored as {entries[wrong[0]].type}{_and_more(len(wrong))}, but the checkpoint has "
            f"no {wrong[0].rpartition('.')[0]}.weight_scale to decode it with"
        )
    if wrong:
        raise CheckpointError(
            f"{where}: {wrong[0]} is stored as {entries[wrong[0]].type}{_and_more(len(wrong))}, and its parameter is "
            "floating-point. These are codes of a layer that the quantization_config of config.json does not describe "
            "(or it is missing)"
        )


def _plain_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    return config


def _has_scale(key: str, entries: Mapping[str, TensorInfo]) -> bool:
    """Return True if the layer of a tensor has scales: the conversion that reads it, of an expert, decodes it."""
    return f"{key.rpartition('.')[0]}.weight_scale" in entries


def _new_heads(model: Any, missing: Collection[str], heads: NewHeads) -> set[str]:
    """Return the missing tensors that belong to heads (or poolers) that ``heads`` allows to be new.

    A head is new if the checkpoint has none of its tensors. Without a training, the model must also have another class
    than its configuration names, since that class has saved its own head.
    """
    if heads is NewHeads.NONE:
        return set()
    own_class = heads is NewHeads.CLASSIFIERS and type(model).__name__ in (
        getattr(model.config, "architectures", None) or ()
    )
    parts: dict[str, set[str]] = {}
    for name in (name for name, _ in model.named_parameters(remove_duplicate=False)):
        parts.setdefault(_head_of(model, name), set()).add(name)
    new: set[str] = set()
    for name in missing:
        head = _head_of(model, name)
        allowed = head and (head.endswith("pooler") or (not own_class and _is_head(model, name, heads)))
        if allowed and parts.get(head, set()) <= set(missing):
            new.add(name)
    return new


def _head_of(model: Any, name: str) -> str:
    """Return the name of the pooler, or of the child of the model outside its base model, that holds a tensor."""
    parts = name.split(".")
    if "pooler" in parts:
        return ".".join(parts[: parts.index("pooler") + 1])
    base = getattr(model, "base_model_prefix", "")
    outside = base and hasattr(model, base) and parts[0] != base
    return parts[0] if outside else ""


def _is_head(model: Any, name: str, heads: NewHeads) -> bool:
    """Return True if a tensor belongs to a head of the kind of ``heads``."""
    if not _head_of(model, name):
        return False
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    own = {id(parameter) for parameter in outputs.parameters()} if isinstance(outputs, nn.Module) else set()
    path, _, leaf = name.rpartition(".")
    parameter = getattr(model.get_submodule(path), leaf, None)
    return heads is NewHeads.ALL or id(parameter) not in own


def _belongs(model: nn.Module, key: str, quantized: bool) -> bool:
    """Return True if the model computes something else without this tensor of the checkpoint.

    These are codes and scales of layers, biases of layers that have none, and layers beyond the last one. A module that
    the model does not have at all is another matter: a head, or the other tower of a two-tower model.
    """
    path, _, leaf = key.rpartition(".")
    if _in_additional_layer(model, key):
        return True
    holder = _submodule(model, path)
    if leaf in CODE_NAMES and (not quantized or holder is not None or _inside_layer(model, path)):
        return True
    return holder is not None and leaf == "bias" and "weight" in holder._parameters


def _inside_layer(model: nn.Module, path: str) -> bool:
    """Return True if a module that the model lacks is inside one of its layers, such as a matrix of fused experts."""
    while path:
        path = path.rpartition(".")[0]
        if _submodule(model, path) is not None:
            return any(part.isdigit() for part in path.split("."))
    return False


def _in_additional_layer(model: nn.Module, key: str) -> bool:
    for found in re.finditer(r"\.(\d+)\.", key):
        holder = _submodule(model, key[: found.start()])
        if isinstance(holder, nn.ModuleList) and len(holder) and int(found.group(1)) >= len(holder):
            return True
    return False


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_conversion(error: BaseException) -> bool:
    """Return True for transformers' error about tensors that its conversions cannot take."""
    return isinstance(error, RuntimeError) and ("conversion of the weights" in str(error) or "state_dict" in str(error))


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")

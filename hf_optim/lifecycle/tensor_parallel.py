"""Loading one part of a compressed checkpoint on each rank: ``tp_plan=`` beside ``optim_config="auto"``.

transformers cuts floating-point layers itself, as it loads them; packed ones it cannot. So for a compressed checkpoint
its arguments are taken out of the call here, and its plan is applied to the packed layers (``rank_part``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..errors import CheckpointError, ModelError
from ..recipes.config import OptimConfig
from ..toolkit.checkpoint.safetensors import FLOAT_DTYPES, TORCH_DTYPES, SafetensorsHeaders, UnsupportedCheckpoint
from ..toolkit.distributed import collectives
from ..toolkit.distributed.agreement import as_text, fingerprint_of_files, require_agreement, versions
from ..toolkit.distributed.liveness import LIMIT, watch_ranks
from ..toolkit.distributed.rank_setting import SETTING, rank_setting_of, set_rank_setting
from ..toolkit.distributed.tensor_parts import NOT_WHOLE, RANK
from ..toolkit.experts import stored_exchange, stored_routing
from ..trust.bounds import shown

log = logging.getLogger(__name__)

ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Fields of transformers' DistributedConfig that do not change what is loaded here when they have these values.
PLAIN = {"fsdp_size": 1, "dp_replicate_size": 1, "pp_size": 1}
SOURCE = "_hf_optim_whole_checkpoint"


class Request(NamedTuple):
    """What a call, or the setting of a checkpoint, asks for: the plan, how many ranks, and the limit of liveness."""

    plan: Any
    ranks: int
    timeout: float


def requested(kwargs: dict[str, Any], config: Any, packed: bool) -> Request | None:
    """Return what a call asks for, and take it out of ``kwargs`` if it is done here; None for one rank.

    Args:
        kwargs: of ``from_pretrained``. For a checkpoint with floating-point weights, transformers' arguments stay in,
            or are set as the checkpoint's setting says.
        config: of the checkpoint.
        packed: its weights are compressed.

    Raises ``ModelError`` for what packed layers cannot do, and for another number of ranks than the checkpoint's.
    """
    setting = rank_setting_of(config)
    timeout = setting.timeout if setting is not None else LIMIT
    asked = {key: kwargs[key] for key in ARGUMENTS if kwargs.get(key) is not None}
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not asked and setting is not None and setting.ranks > 1 and max(launched, collectives.world_size()) > 1:
        ranks = max(launched, collectives.world_size())
        if ranks != setting.ranks:
            raise ModelError(
                f"{SETTING} of this checkpoint says {setting.ranks} ranks, and there are {ranks}: start as many as it "
                'says, or pass tp_plan="auto" to cut it for as many as there are'
            )
        asked = {"tp_plan": "auto"}
        if not packed:
            kwargs["tp_plan"] = "auto"
    if not asked or not packed:
        return None
    for key in ARGUMENTS:
        kwargs.pop(key, None)
    plan, size = _plan_and_size(asked)
    if size == 1:
        return None
    _require_group()
    ranks = collectives.world_size()
    if size is not None and size != ranks:
        raise ModelError(f"packed layers are cut for all {ranks} ranks, not for groups of {size}: leave the size out")
    return Request(plan, ranks, timeout) if ranks > 1 else None


def divides(recipe: OptimConfig, config: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if a recipe is a setting of ranks alone and they have been started; then set what they load by.

    Raises ``ModelError`` if another number of ranks was started.
    """
    setting = recipe.steps[0].rank_setting() if len(recipe.steps) == 1 else None
    launched = max(int(os.environ.get("WORLD_SIZE", "1")), collectives.world_size())
    if setting is None or launched == 1:
        return False
    if launched != setting.ranks:
        raise ModelError(
            f"step 1 ({recipe.steps[0].name}): ranks is {setting.ranks}, and {launched} ranks were started"
        )
    set_rank_setting(config, setting)
    kwargs["tp_plan"] = "auto"
    return True


def load_part(
    request: Request,
    load: Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]],
    source: Any,
    config: Any,
    files: Iterable[Path] | None,
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Load this rank's part of a compressed checkpoint.

    Args:
        request: what was asked for.
        load: the load of a packed checkpoint, which gets the changed arguments.
        source: the checkpoint, for messages.
        config: its configuration.
        files: its weights.
        kwargs: the arguments of the call.

    Raises ``RankError`` unless all ranks load the same, and ``ModelError`` for a model that cannot be cut.
    """
    from ..compressed.packed.rank_part import LOADING, RankPart

    for what, found in (("capacity", stored_routing(config)), ("exchange", stored_exchange(config))):
        if found is not None:
            raise ModelError(
                f"config.json states a{'n' if what == 'exchange' else ''} {what} of the experts, which packed experts "
                "divided among ranks do not keep: load it with one rank"
            )
    watch_ranks(request.timeout)
    files = tuple(files or ())
    require_agreement(_facts(request, config, files, kwargs))
    if not files:
        raise ModelError("a rank reads its part from files: pass the checkpoint, not a state dict")
    given = dict(kwargs)
    device_map = given.get("device_map")
    if device_map not in (None, "auto") and not _is_one_device(device_map):
        raise ModelError(f"device_map {shown(device_map)}: a rank has one device; leave device_map out")
    if torch.cuda.is_available() and not _is_one_device(device_map):
        given["device_map"] = {"": torch.cuda.current_device()}
    part = RankPart(collectives.rank(), request.ranks, request.plan, files)
    if given.get("generation_config") is None and (found := _generation_config(source, kwargs)) is not None:
        given["generation_config"] = found
    if given.get("dtype", "auto") == "auto" and given.get("torch_dtype") is None:
        given["dtype"] = _dtype_of(config, files)
    token = LOADING.set(part)
    try:
        model, info = load({**given, "state_dict": part.state})
    except UnsupportedCheckpoint as reason:
        raise ModelError(f"{source} cannot be cut for {request.ranks} ranks, since {reason}: use one rank") from reason
    finally:
        LOADING.reset(token)
        part.state.clear()
    model.config.name_or_path = model.name_or_path = str(source)
    vars(model)[RANK] = f"rank {part.rank} of {part.ranks}"
    vars(model)[SOURCE] = str(source)
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            vars(inner)["save_pretrained"] = refuse_save
    return model, info


def refuse_save(*args: Any, **kwargs: Any) -> None:
    """Raise ``CheckpointError``: in place of ``save_pretrained`` of a model that is a part."""
    raise CheckpointError(NOT_WHOLE)


def _plan_and_size(asked: Mapping[str, Any]) -> tuple[Any, int | None]:
    """Return plan and number of ranks of transformers' arguments. Raises ``ModelError`` for what is not done here."""
    plan, size = asked.get("tp_plan", "auto"), asked.get("tp_size")
    mesh = asked.get("device_mesh")
    if mesh is not None and (mesh.ndim != 1 or not dist.is_initialized() or mesh.size() != dist.get_world_size()):
        raise ModelError("device_mesh: packed layers are cut for all ranks; leave it out, or pass one of all ranks")
    config = asked.get("distributed_config")
    if config is None:
        return plan, size
    fields = config if isinstance(config, Mapping) else config.to_dict()
    for name, value in PLAIN.items():
        if fields.get(name) not in (None, value):
            raise ModelError(
                f"distributed_config: {name} is {shown(fields[name])}, and a compressed checkpoint is loaded for "
                "tensor and expert parallelism only: set tp_size alone"
            )
    if fields.get("fsdp_plan") or fields.get("ep_plan"):
        raise ModelError("distributed_config: a compressed checkpoint takes tp_plan only (experts are divided as well)")
    plan = fields.get("tp_plan") or "auto"
    size = fields.get("tp_size")
    if size in (None, 1) and not fields.get("tp_plan"):
        size = fields.get("ep_size") if (fields.get("ep_size") or 1) > 1 else size
    return plan, size


def _require_group() -> None:
    """Join the process group that the launcher describes, unless there is one. Raises ``ModelError`` without both."""
    if dist.is_initialized():
        return
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise ModelError(
            f"tp_plan needs several ranks, and {', '.join(missing)} is not set: start the script with "
            "`torchrun --nproc-per-node N script.py`, or leave tp_plan out"
        )
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local >= torch.cuda.device_count():
            raise ModelError(
                f"rank {os.environ['RANK']} is number {local} of its host, which has {torch.cuda.device_count()} "
                "devices: start as many ranks as there are devices"
            )
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")


def _facts(request: Request, config: Any, files: Iterable[Path], kwargs: Mapping[str, Any]) -> dict[str, str]:
    recipe = {key: kwargs.get(key) for key in ("dtype", "torch_dtype", "attn_implementation", "key_mapping")}
    return {
        "versions": versions(),
        "recipe": as_text({"tp_plan": request.plan, **recipe}),
        "configuration": as_text(config.to_dict()),
        "checkpoint": fingerprint_of_files(files),
        "number of ranks": str(request.ranks),
        "device type": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _is_one_device(device_map: Any) -> bool:
    if isinstance(device_map, Mapping):
        return set(device_map) == {""}
    return isinstance(device_map, (int, torch.device)) or (isinstance(device_map, str) and device_map != "auto")


def _dtype_of(config: Any, files: Iterable[Path]) -> torch.dtype:
    """Return the dtype that a load without ``dtype`` has: that of the configuration, else of the first float tensor."""
    named = getattr(config, "dtype", None)
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named
    entries = SafetensorsHeaders(files).entries.values()
    found = next((entry.type for entry in entries if entry.type in FLOAT_DTYPES), "F32")
    return TORCH_DTYPES[found]


def _generation_config(source: Any, kwargs: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    lookup = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
    try:
        return GenerationConfig.from_pretrained(source, **{key: kwargs[key] for key in lookup if key in kwargs})
    except OSError:
        return None

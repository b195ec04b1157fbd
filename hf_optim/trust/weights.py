"""The weight files of a checkpoint: safetensors only, found as transformers finds them, and checked before it does.

Every place that loads weights calls ``checked_weights`` first: stock ``from_pretrained`` follows an index or a
configuration to any file, and falls back to pickles.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import shown
from .documents import read_mapping
from .files import require_inside, require_regular
from .headers import MAX_HEADER_BYTES, read_header, require_disjoint
from .lookup import Where

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Weights of other programs: the pattern of their files, their name, and how to come from them to safetensors.
OTHER_FORMATS = (
    (
        "*.gguf",
        "GGUF",
        "load it once with stock transformers (AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE), with the "
        "package gguf) and save it with save_pretrained, or start from the checkpoint that it was made from",
    ),
    ("*.h5", "TensorFlow", "transformers read it before version 5: convert it there (from_tf=True, save_pretrained)"),
    ("*.msgpack", "Flax", "transformers read it before version 5: convert it there (from_flax=True, save_pretrained)"),
    ("*.onnx", "ONNX", "a graph cannot be optimized here: start from the checkpoint that it was exported from"),
)
# Names of the shards of torch's distributed checkpoints, which stock transformers loads in place of an index.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_CONVERT = (
    "hf_optim reads only safetensors, because opening a pickle can run arbitrary code. Convert the checkpoint once "
    "with stock transformers: AutoModel.from_pretrained(...).save_pretrained(...)"
)


def checked_weights(
    source: str | os.PathLike[str],
    *,
    named: Any = None,
    variant: str | None = None,
    subfolder: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    **lookup: Any,
) -> tuple[Path, ...]:
    """Return the weight files that stock ``from_pretrained`` loads for these arguments, after checking each.

    Each is a safetensors file: regular, inside the folder of the checkpoint, with a header in order, and with tensors
    that no other file has. Files on the Hub are downloaded first.

    Args:
        source: a Hub id, a directory, or a safetensors file.
        named: ``transformers_weights`` of the configuration: the file to load instead of the usual ones.
        variant, subfolder: as in ``from_pretrained``.
        adapter, adapter_revision: the Hub id or directory of an adapter that is loaded with the model, and its
            revision; None for an adapter in ``source``.
        lookup: how files are found on the Hub: ``revision``, ``token``, ``cache_dir`` and so on.

    Raises ``CheckpointError``, which names the file.
    """
    where = Where(os.fspath(source), subfolder or "", lookup)
    if os.path.isdir(where.source):
        require_regular(Path(where.source, where.subfolder))
    base = _check_adapter(Where(adapter, "", {**lookup, "revision": adapter_revision}) if adapter else where)
    if base is not None and adapter is None:
        where = Where(base, "", {**lookup, "revision": None})
    files = _find(where, named, variant)
    require_disjoint([(path, read_header(path, where.source)) for path in files], where.source)
    return files


def _find(where: Where, named: Any, variant: str | None) -> tuple[Path, ...]:
    """Return the files in the order of preference of transformers: the named one, a single file, shards."""
    if os.path.isfile(where.source):
        path = Path(where.source)
        return (require_inside(path.parent, _safetensors_name(path.name, where)),)
    _refuse_distributed(where)
    names = (_named(named, where),) if named is not None else (_variant(SINGLE, variant), _variant(INDEX, variant))
    for name in names:
        home = where.home_of(name)
        if home is None:
            continue
        path = require_inside(home, name)
        if not name.endswith(".json"):
            return (path,)
        return tuple(_shard(where, home, shard) for shard in _shards(path, where))
    raise CheckpointError(_nothing(where, names))


def _shards(index: Path, where: Where) -> list[str]:
    """Return the names of the shards in an index file, sorted as in transformers."""
    name = f"{index.name} of {where.source}"
    data = read_mapping(index, name, max_bytes=MAX_HEADER_BYTES, nonfinite=True)
    placed = data.get("weight_map")
    if not isinstance(data.get("metadata"), dict) or not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{name} is corrupt (it has no metadata, or no weight_map); download or copy it again")
    return sorted({_safetensors_name(shard, where) for shard in placed.values()})


def _shard(where: Where, home: Path, name: str) -> Path:
    if not os.path.isdir(where.source):
        where.home_of(name)  # downloads it
    return require_inside(home, name)


def _check_adapter(where: Where) -> str | None:
    """Check the files of an adapter, if ``where`` holds one; return the base model that is loaded in its place.

    None if there is no adapter, or if it lies beside the model that it belongs to.
    """
    from transformers.utils import is_peft_available

    if not is_peft_available() or os.path.isfile(where.source):
        return None
    home = where.home_of(ADAPTER_CONFIG)
    if home is None:
        return None
    what = f"{ADAPTER_CONFIG} of {where.source}"
    config = read_mapping(require_inside(home, ADAPTER_CONFIG), what, nonfinite=True)
    if config.get("megatron_config"):
        raise CheckpointError(f"{what} names a module of Megatron to import; adapters of stock layers only")
    if where.home_of(ADAPTER) is None:
        raise CheckpointError(f"{where.source} is an adapter without {ADAPTER}: {_CONVERT}")
    for entry in read_header(require_inside(home, ADAPTER), where.source):
        if entry.type.startswith(("I", "U", "BOOL")):
            raise CheckpointError(
                f"{ADAPTER} of {where.source}: {entry.key} is stored as {entry.type}, and weights of an adapter are "
                "floating-point"
            )
    if os.path.isdir(where.source) and os.path.exists(home / "config.json"):
        return None
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{what} names no base model")
    return base


def _named(name: Any, where: Where) -> str:
    if isinstance(name, str) and name.endswith(".safetensors.index.json"):
        return name
    return _safetensors_name(name, where)


def _safetensors_name(name: Any, where: Where) -> str:
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise CheckpointError(f"{where.source} names {shown(name)} as a weight file: {_CONVERT}")
    return name


def _variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _refuse_distributed(where: Where) -> None:
    if not os.path.isdir(where.source):
        return
    home = Path(where.source, where.subfolder)
    if home.is_dir() and any(_DISTRIBUTED.match(name) for name in os.listdir(home)):
        raise CheckpointError(
            f"{where.source} is a distributed checkpoint of torch: load it once with stock transformers and save it "
            "with save_pretrained"
        )


def describe_other_weights(directory: str | os.PathLike[str]) -> str:
    """Return which weights of another format a directory holds, and how to convert them; "" if there are none."""
    home = Path(directory)
    if not home.is_dir():
        return ""
    pickles = sorted(path.name for pattern in PICKLES for path in home.glob(pattern))
    if pickles:
        return f"pickle files ({_few(pickles)}); {_CONVERT}"
    for pattern, name, remedy in OTHER_FORMATS:
        if found := sorted(path.name for path in home.glob(pattern)):
            return f"weights of {name} ({_few(found)}), which hf_optim does not read: {remedy}"
    return ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:5])


def _nothing(where: Where, names: tuple[str, ...]) -> str:
    other = describe_other_weights(Path(where.source, where.subfolder))
    if other:
        return f"{where.source} holds {other}"
    return f"{where.source} has no safetensors weights: no file named {' or '.join(names)}"

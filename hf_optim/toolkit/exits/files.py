"""The file of a model's exits, ``exits.safetensors`` beside its weights, and their entry in ``config.json``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError
from ...trust.files import require_inside
from ...trust.headers import read_header
from .attachment import ATTRIBUTE, exits_of, require_exits
from .heads import ExitHeads
from .settings import StoredExits, store_settings, stored_settings

FILE = "exits.safetensors"


def save_exits(model: nn.Module, directory: str | Path) -> Path:
    """Write the exits of a model into a checkpoint, and their entry into the model's configuration.

    The configuration in memory gets the entry; write it after this call. Returns the path of the file.
    """
    path = Path(directory) / FILE
    exits = require_exits(model)
    exits.listed()
    content = serialize(exits)
    beside = path.with_name(f".{FILE}")
    beside.write_bytes(content)
    os.replace(beside, path)
    store_entry(model, content)
    return path


def store_entry(model: Any, content: bytes | None = None) -> None:
    """Write the entry of a model's exits into its configuration, with the checksum of the file that they make."""
    exits = require_exits(model)
    digest = hashlib.sha256(serialize(exits) if content is None else content).hexdigest()
    structure = exits.structure
    store_settings(model.config, StoredExits(exits.settings, structure.blocks, structure.width, digest))


def serialize(exits: ExitHeads) -> bytes:
    """Return the content of the file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in exits.state_dict().items()}
    return save(_untied(tensors), metadata={"format": "pt"})


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def load_exits(model: nn.Module, directory: str | Path) -> ExitHeads:
    """Give a model the exits that are in a checkpoint, as its configuration describes them, and return them.

    Raises ``CheckpointError`` for an entry or a file that is missing, damaged, or of another model.
    """
    home = Path(directory)
    stored = stored_settings(model.config)
    if stored is None:
        raise CheckpointError(f"config.json of {home} describes no exits")
    content = _read(home, stored)
    try:
        exits = ExitHeads(model, stored.settings)
    except ModelError as error:
        raise CheckpointError(f"the exits in {home} do not fit the model: {error}") from error
    structure = exits.structure
    if (structure.blocks, structure.width) != (stored.blocks, stored.width):
        raise CheckpointError(
            f"the exits in {home} are those of another model: it has {stored.blocks} blocks of width {stored.width}, "
            f"{type(model).__name__} {structure.blocks} of {structure.width}"
        )
    _fill(exits, load(content), home)
    vars(model)[ATTRIBUTE] = exits
    return exits


def _read(home: Path, stored: StoredExits) -> bytes:
    """Return the content of the file of exits in a checkpoint, after checking it."""
    if not os.path.lexists(home / FILE):
        raise CheckpointError(
            f"{home} has no {FILE}, which its config.json describes: copy it beside the weights, or load the model "
            "without optim_config, which leaves the exits out"
        )
    path = require_inside(home, FILE)
    read_header(path, home)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stored.checksum:
        raise CheckpointError(f"{path} is not the file that config.json describes: its checksum is another")
    return content


def _fill(exits: ExitHeads, tensors: dict[str, Tensor], home: Path) -> None:
    wanted = exits.state_dict()
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise CheckpointError(f"the exits in {home} are those of another model: {odd[0]} is in only one of them")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise CheckpointError(
                f"the exits in {home} are those of another model: {name} has the shape {tuple(value.shape)}, not "
                f"{tuple(wanted[name].shape)}"
            )
    exits.load_state_dict(tensors)


def attach_stored_exits(model: Any, directory: str | Path | None) -> None:
    """Give a model the exits of its checkpoint, if its configuration describes some and it has none yet."""
    if stored_settings(model.config) is None or exits_of(model) is not None:
        return
    if directory is None:
        raise CheckpointError("the configuration describes exits, and no folder is known that holds their file")
    load_exits(model, directory)


def copy_exits(config: Any, source: str | Path, directory: str | Path) -> None:
    """Copy the file of exits from one checkpoint to another, if a configuration describes some.

    Raises ``CheckpointError`` if the file is missing or is not the one that the configuration describes.
    """
    stored = stored_settings(config)
    if stored is None:
        return
    content = _read(Path(source), stored)
    (Path(directory) / FILE).write_bytes(content)

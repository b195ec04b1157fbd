"""Room for a run: a directory that can be written, free space on disk, and memory of this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ModelError
from ...evaluation.reported import format_bytes
from ...recipes.config import OptimConfig
from ...runs.memory import host_memory
from ...trust.bounds import first_line


def require_writable(path: Path) -> None:
    """Raise ``CheckpointError`` unless a directory can be created at ``path``."""
    home = _existing(path)
    found = next((each for each in (path, *path.absolute().parents) if os.path.exists(each)), home)
    if not os.path.isdir(found):
        raise CheckpointError(f"cannot write to {path}: {found} is not a directory")
    try:
        with tempfile.TemporaryDirectory(dir=home, prefix=".hf-optim-"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"cannot write to {path}: {reason} ({home})") from error


def _existing(path: Path) -> Path:
    """Return the directory, or its nearest parent that exists."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if os.path.isdir(each)), Path("/"))


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise ``CheckpointError`` unless the file system of ``path`` has room for ``needed`` bytes."""
    free = shutil.disk_usage(_existing(path)).free
    if needed > free:
        raise CheckpointError(
            f"not enough space for {what} at {path}: about {format_bytes(needed)} are needed, "
            f"{format_bytes(free)} are free"
        )


def require_memory(recipe: OptimConfig, estimates: Mapping[str, Any]) -> None:
    """Raise ``ModelError`` with a remedy if a run takes more memory than this process may use."""
    total = host_memory()
    needed = estimates["required_bytes"]
    if total is None or needed <= total:
        return
    remedy = "--driver streamed holds one block at a time"
    if any(stage.trains for stage in recipe.stages):
        remedy = "set gradient_checkpointing: true, or a smaller per_device_train_batch_size, under `training:`"
    elif recipe.driver == "streamed":
        remedy = "give fewer or shorter samples" if recipe.spill else "--spill DIR keeps the activations on disk"
    what = "training" if any(stage.trains for stage in recipe.stages) else f"driver {recipe.driver}"
    raise ModelError(
        f"{what} needs about {format_bytes(needed)} of memory for this, and this machine has "
        f"{format_bytes(total)}: {remedy}"
    )

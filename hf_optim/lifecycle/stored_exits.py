"""The early exits of a checkpoint, whose file is beside its weights: given to the model that was loaded from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.saving import attach_exit_save
from ..trust.lookup import Where
from .load_arguments import LOOKUP

log = logging.getLogger(__name__)


def attach_exits(model: PreTrainedModel, source: Any, kwargs: Mapping[str, Any]) -> None:
    """Give a model that was loaded the exits of its checkpoint, if its configuration describes some."""
    from ..toolkit.exits import FILE, attach_stored_exits, stored_settings

    if stored_settings(model.config) is None:
        return
    home = None
    if source is not None:
        lookup = {key: kwargs.get(key) for key in LOOKUP if key != "subfolder"}
        home = Where(os.fspath(source), kwargs.get("subfolder") or "", lookup).home_of(FILE)
        home = Path(source, kwargs.get("subfolder") or "") if home is None else home
    attach_stored_exits(model, home)
    attach_exit_save(model)


def find_exits(model: PreTrainedModel) -> None:
    """Give a model that is in memory the exits of its checkpoint; drop their entry, and say so, if it is not there."""
    from ..toolkit.exits import FILE, attach_stored_exits, exits_of, store_settings, stored_settings

    if exits_of(model) is not None or stored_settings(model.config) is None:
        return
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.lexists(os.path.join(source, FILE)):
        attach_stored_exits(model, source)
        return
    log.warning(
        "the configuration of this %s describes early exits, whose file %s is not beside its weights: the result will "
        "have none. Load it with from_pretrained(optim_config=...) to keep them",
        type(model).__name__,
        FILE,
    )
    store_settings(model.config, None)

"""Weights that a training saved: loaded by the rule of every load (``toolkit.checkpoint.placement``).

A stock ``Trainer`` loads a ``checkpoint-N`` by the names of the model's parameters. Tensors that the checkpoint lacks,
or stores under other names (transformers renames the keys of many families when it saves), keep the values that they
have, with a warning. Here they are loaded the way ``from_pretrained`` loads them, or the checkpoint is refused.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..toolkit.checkpoint.placement import load_placed, require_floats
from ..toolkit.checkpoint.safetensors import SafetensorsHeaders
from ..toolkit.distributed.fsdp import has_sharded_parameters
from ..trust.weights import checked_weights


def load_saved(model: Any, folder: Path, **kwargs: Any) -> Any:
    """Load a checkpoint that was saved from ``model``; return a model of the same class and configuration.

    The state of the random generator stays as it is. Raises ``CheckpointError`` if a tensor is missing or does not fit.
    """
    files = checked_weights(folder)
    before = torch.random.get_rng_state()
    try:
        config = copy.deepcopy(model.config)
        stock = functools.partial(
            type(model).from_pretrained, folder, config=config, use_safetensors=True, local_files_only=True, **kwargs
        )
        return load_placed(stock, config, files, folder)[0]
    finally:
        torch.random.set_rng_state(before)


@torch.no_grad()
def complete_weights(model: Any, folder: Path) -> None:
    """Load what a stock ``Trainer`` left out when it loaded the checkpoint ``folder`` into ``model``, in place.

    Checkpoints of adapters, FSDP and DeepSpeed are left to them. Raises ``CheckpointError`` if a tensor is missing,
    does not fit, or is stored as integers.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files or has_sharded_parameters(model):
        return
    entries = SafetensorsHeaders(files).entries
    require_floats(model, entries, str(folder))
    state = model.state_dict()
    same = {id(value) for name, value in model.state_dict(keep_vars=True).items() if name in entries}
    absent = [n for n, value in model.state_dict(keep_vars=True).items() if n not in entries and id(value) not in same]
    if not absent:
        return
    whole = load_saved(model, folder).state_dict()
    for name in absent:
        if name not in whole:
            raise CheckpointError(f"{folder} has no {name}")
        state[name].copy_(whole[name])

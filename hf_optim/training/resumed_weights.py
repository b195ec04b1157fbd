"""The files of a Trainer's checkpoint that training resumes from: readable, and with every weight of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState

from ..errors import CheckpointError
from ..recipes.field_checks import admits_json
from ..toolkit.checkpoint.safetensors import FLOAT_DTYPES
from ..toolkit.checkpoint.stock_errors import stock_errors
from ..trust.bounds import shown
from ..trust.documents import read_mapping
from ..trust.files import require_inside
from ..trust.headers import TensorInfo, read_header

STATE = "trainer_state.json"
# What a Trainer opens, if it is there.
FILES = (
    STATE,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "config.json",
    "generation_config.json",
    "training_args.bin",
)
NUMBERS: dict[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "num_train_epochs": int,
    "epoch": float | None,
    "num_input_tokens_seen": int,
    "total_flos": float,
    "train_batch_size": int | None,
    "best_global_step": int | None,
    "best_metric": float | None,
    "best_model_checkpoint": str | None,
    "log_history": list[dict[str, Any]],
    "stateful_callbacks": dict[str, Any],
}


def require_readable(folder: Path) -> None:
    """Raise ``CheckpointError`` unless the files of a checkpoint are regular files inside it, with sound headers.

    Weights of other formats (shards of DeepSpeed or FSDP, which are folders) are left to their own readers.
    """
    if not folder.is_dir():
        return  # the Trainer says that there is no checkpoint
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names & set(FILES) | {name for name in names if name.startswith(("rng_state", "model"))}):
        if (
            (folder / name).is_dir()
            and not name.endswith((".safetensors", ".json", ".pth", ".pt"))
            and name not in FILES
        ):
            continue
        path = require_inside(folder, name)
        if name.endswith(".safetensors"):
            read_header(path, folder)
    state = read_mapping(require_inside(folder, STATE), nonfinite=True)
    for key, hint in NUMBERS.items():
        if key in state and not admits_json(hint, state[key]):
            raise CheckpointError(f"{STATE} in {folder} is corrupt: {key} is {shown(state[key])}")
    if not 0 <= state.get("global_step", 0) <= 10**9:
        raise CheckpointError(f"{STATE} in {folder} is corrupt: global_step is {state['global_step']}")
    with stock_errors(folder, "cannot resume from"):
        TrainerState.load_from_json(str(folder / STATE))


@torch.no_grad()
def load_renamed(model: Any, folder: Path) -> None:
    """Load parameters that a checkpoint stores under other names (experts one by one), which a stock Trainer skips.

    Raises ``CheckpointError`` if a parameter has no values in the checkpoint: a stock Trainer would leave it as it is.
    """
    stored: dict[str, TensorInfo] = {}
    for path in folder.glob("model*.safetensors"):
        stored |= {entry.key: entry for entry in read_header(path, folder)}
    if not stored:
        return
    every = dict(model.named_parameters(remove_duplicate=False))
    codes = [name for name in every if name in stored and stored[name].type not in FLOAT_DTYPES]
    if codes:
        raise CheckpointError(f"{folder} has {codes[0]} as {stored[codes[0]].type}, which is not floating-point")
    held = {id(parameter) for name, parameter in every.items() if name in stored}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if not missing:
        return
    whole: dict[str, Any] = {}
    if not stored.keys() <= model.state_dict().keys():
        before = torch.random.get_rng_state()
        try:
            with stock_errors(folder, "cannot resume from"):
                config = copy.deepcopy(model.config)
                whole = type(model).from_pretrained(folder, config=config, use_safetensors=True).state_dict()
        finally:
            torch.random.set_rng_state(before)
    for name in missing:
        if name not in whole:
            raise CheckpointError(f"{folder} has no weights for {name}: resume from another checkpoint")
        model.get_parameter(name).copy_(whole[name])

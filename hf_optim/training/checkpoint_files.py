"""The files of a Trainer's checkpoint that training resumes from are regular and readable, inside its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from ..errors import CheckpointError
from ..recipes.field_checks import admits_json
from ..toolkit.checkpoint.stock_errors import stock_errors
from ..trust.bounds import shown
from ..trust.documents import read_mapping
from ..trust.files import require_inside
from ..trust.headers import read_header

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

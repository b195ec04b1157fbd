"""The ``training:`` section of a recipe: which arguments of ``TrainingArguments`` it may set, and to what.

A recipe may come from a stranger. It decides how to train: schedule, optimizer, precision, batches, seed, what is
logged and how often a checkpoint is saved. Where something is written or uploaded, what is downloaded, and how the
machine and its processes are used belongs to the caller. Importing this module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..trust.bounds import shown
from .field_checks import did_you_mean

MAX_STEPS = 10**8
_INTERVALS = ("no", "steps", "epoch")
_SWITCHES = (
    "bf16",
    "fp16",
    "bf16_full_eval",
    "fp16_full_eval",
    "tf32",
    "gradient_checkpointing",
    "use_cpu",
    "full_determinism",
    "logging_first_step",
    "logging_nan_inf_filter",
    "disable_tqdm",
    "dataloader_drop_last",
    "dataloader_pin_memory",
    "average_tokens_across_devices",
    "save_only_model",
    "use_liger_kernel",
    "use_cache",
    "auto_find_batch_size",
    "skip_memory_metrics",
)
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``."""

    low: int
    high: int

    def parse(self, value: Any) -> Any:
        """Return the value. Raises ``ValueError``."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"must be a whole number from {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high``; text such as ``5e-4``, which YAML does not read as a number, counts."""

    low: float
    high: float

    def parse(self, value: Any) -> Any:
        """Return the number. Raises ``ValueError``."""
        if isinstance(value, str) and len(value) < 30:
            try:
                value = float(value)
            except ValueError:
                value = None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not self.low <= value <= self.high:
            raise ValueError(f"must be a number from {self.low:g} to {self.high:g}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def parse(self, value: Any) -> Any:
        """Return the name. Raises ``ValueError``."""
        # YAML reads an unquoted `no` as false.
        value = "no" if value is False and "no" in self.names else value
        if not isinstance(value, str) or value not in self.names:
            raise ValueError(f"must be one of {', '.join(self.names)}")
        return value


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def parse(self, value: Any) -> Any:
        """Return the value. Raises ``ValueError``."""
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value


Kind = Whole | Number | Choice | Switch
FIELDS: Mapping[str, Kind] = {
    # The schedule.
    "max_steps": Whole(1, MAX_STEPS),
    "num_train_epochs": Number(0, 100_000),
    "learning_rate": Number(0, 1000),
    "lr_scheduler_type": Choice(_SCHEDULES),
    "warmup_steps": Number(0, MAX_STEPS),
    # The optimizer.
    "optim": Choice(
        ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "stable_adamw", "adamw_bnb_8bit")
    ),
    "weight_decay": Number(0, 1000),
    "adam_beta1": Number(0, 1),
    "adam_beta2": Number(0, 1),
    "adam_epsilon": Number(0, 1),
    "max_grad_norm": Number(0, 1e9),
    "label_smoothing_factor": Number(0, 1),
    "neftune_noise_alpha": Number(0, 1000),
    # Batches.
    "per_device_train_batch_size": Whole(1, 65536),
    "per_device_eval_batch_size": Whole(1, 65536),
    "gradient_accumulation_steps": Whole(1, 65536),
    "dataloader_num_workers": Whole(0, 64),
    "dataloader_prefetch_factor": Whole(1, 64),
    "torch_empty_cache_steps": Whole(1, MAX_STEPS),
    # Randomness.
    "seed": Whole(0, 2**32 - 1),
    "data_seed": Whole(0, 2**32 - 1),
    # What is logged, and how often a checkpoint is saved in the caller's folder.
    "logging_strategy": Choice(_INTERVALS),
    "logging_steps": Number(0, MAX_STEPS),
    "log_level": Choice(("debug", "info", "warning", "error", "critical", "passive")),
    "save_strategy": Choice(_INTERVALS),
    "save_steps": Number(0, MAX_STEPS),
    "save_total_limit": Whole(1, 10_000),
    **dict.fromkeys(_SWITCHES, Switch()),
}

# Arguments that a recipe cannot set, with the reason.
_REASONS = (
    (("push_to_hub", "hub_"), "a recipe does not upload; `hf-optim push` does"),
    (
        ("output_dir", "logging_dir", "run_name", "project", "overwrite_output_dir"),
        "where files go is for the caller to say (--output)",
    ),
    (("report_to", "trackio"), "a recipe reports to no service; pass it to a Trainer of your own"),
    (("resume_from_checkpoint", "ignore_data_skip", "restore_callback"), "`--resume` continues a killed run"),
    (
        ("deepspeed", "fsdp", "accelerator_config", "parallelism_config", "ddp_", "local_rank", "tpu_", "xla_"),
        "how processes share the work is for the caller to say (torchrun, accelerate launch)",
    ),
    (("torch_compile", "debug", "jit_", "enable_jit"), "compilation and debugging are for a Trainer of your own"),
    (("eval_", "do_", "load_best", "metric_for", "greater_is"), "recipes train without evaluation; use --eval"),
)


def parse_training(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``training:`` section of a recipe, checked.

    Raises ``RecipeError`` for an argument that a recipe cannot set, with the reason or the nearest name, and for a
    value of another type or outside its range.
    """
    checked = {}
    for key, value in data.items():
        kind = FIELDS.get(key) if isinstance(key, str) else None
        if kind is None:
            raise RecipeError(_refusal(key))
        if value is None:
            continue  # the default
        try:
            checked[key] = kind.parse(value)
        except ValueError as error:
            hint = did_you_mean(value, kind.names) if isinstance(kind, Choice) else ""
            raise RecipeError(f"training: {key} {error}, not {shown(value)}{hint}") from error
    _require_consistent(checked)
    return checked


def _refusal(key: Any) -> str:
    name = str(key)[:60] if isinstance(key, str) else shown(key)
    for prefixes, reason in _REASONS:
        if name.startswith(prefixes):
            return f"training cannot set {name!r} in a recipe: {reason}"
    hint = did_you_mean(name, FIELDS)
    return f"training has no argument {name!r}{hint} (docs/recipes.md lists those that a recipe sets)"


def _require_consistent(training: Mapping[str, Any]) -> None:
    if training.get("bf16") and training.get("fp16"):
        raise RecipeError("training: bf16 and fp16 exclude each other")
    for key in ("logging", "save"):
        steps = training.get(f"{key}_steps")
        if training.get(f"{key}_strategy", "steps") == "steps" and steps is not None and not _is_interval(steps):
            raise RecipeError(
                f"training: {key}_steps must be a whole number of steps, or the share of all steps (below 1), "
                f"not {shown(steps)}"
            )
    if training.get("dataloader_prefetch_factor") and not training.get("dataloader_num_workers"):
        raise RecipeError("training: dataloader_prefetch_factor needs dataloader_num_workers of 1 or more")


def _is_interval(steps: float) -> bool:
    return 0 < steps < 1 or (steps >= 1 and steps == int(steps))

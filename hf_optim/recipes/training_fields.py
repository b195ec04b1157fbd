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
    "dataloader_persistent_workers",
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
    "cosine_with_min_lr",
    "warmup_stable_decay",
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
    """A number from ``low`` to ``high`` (``below``: less than ``high``).

    Text such as ``5e-4``, which YAML does not read as a number, counts.
    """

    low: float
    high: float
    below: bool = False

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
        if self.below and value == self.high:
            raise ValueError(f"must be below {self.high:g}")
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


@dataclass(frozen=True)
class Fields:
    """A mapping of names to values, each of its own kind."""

    kinds: Mapping[str, Any]

    def parse(self, value: Any) -> Any:
        """Return the mapping. Raises ``ValueError``."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"must be a mapping with {', '.join(self.kinds)}")
        for key in value:
            if key not in self.kinds:
                raise ValueError(f"has only {', '.join(self.kinds)}{did_you_mean(key, self.kinds)}")
        return {key: self._parse(key, inner) for key, inner in value.items()}

    def _parse(self, key: str, value: Any) -> Any:
        try:
            return self.kinds[key].parse(value)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None


Kind = Whole | Number | Choice | Switch | Fields
# The arguments of each schedule.
SCHEDULE_KWARGS: Mapping[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "min_lr_ratio",
        "num_cycles",
        "warmup_type",
        "decay_type",
    ),
}
SCHEDULE_FIELDS: Mapping[str, Any] = {
    "num_cycles": Number(0, 10_000),
    "min_lr": Number(0, 1000),
    "min_lr_rate": Number(0, 1),
    "min_lr_ratio": Number(0, 1),
    "lr_end": Number(0, 1000),
    "power": Number(0, 100),
    "timescale": Whole(1, MAX_STEPS),
    "num_decay_steps": Whole(1, MAX_STEPS),
    "num_stable_steps": Whole(0, MAX_STEPS),
    "warmup_type": Choice(("linear", "cosine", "1-sqrt")),
    "decay_type": Choice(("linear", "cosine", "1-sqrt")),
}
FIELDS: Mapping[str, Kind] = {
    # The schedule.
    "max_steps": Whole(1, MAX_STEPS),
    "num_train_epochs": Number(0, 100_000),
    "learning_rate": Number(0, 1000),
    "lr_scheduler_type": Choice(_SCHEDULES),
    "lr_scheduler_kwargs": Fields(SCHEDULE_FIELDS),
    "warmup_steps": Number(0, MAX_STEPS),
    # The optimizer.
    "optim": Choice(
        ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "stable_adamw", "adamw_bnb_8bit")
    ),
    "weight_decay": Number(0, 1000),
    "adam_beta1": Number(0, 1, below=True),
    "adam_beta2": Number(0, 1, below=True),
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
    "train_sampling_strategy": Choice(("random", "sequential", "group_by_length")),
    "gradient_checkpointing_kwargs": Fields({"use_reentrant": Switch()}),
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
        "where files go is for the caller to say (--output, or OptimTrainer(args=TrainingArguments(...)))",
    ),
    (("report_to", "trackio"), "a recipe reports to no service; set it in OptimTrainer(args=TrainingArguments(...))"),
    (("resume_from_checkpoint", "ignore_data_skip", "restore_callback"), "`--resume` continues a killed run"),
    (
        ("deepspeed", "fsdp", "accelerator_config", "parallelism_config", "ddp_", "local_rank", "tpu_", "xla_"),
        "how processes share the work is for the caller to say (torchrun, accelerate launch, or "
        "OptimTrainer(args=TrainingArguments(...)))",
    ),
    (
        ("torch_compile", "debug", "jit_", "enable_jit"),
        "compilation and debugging are set in OptimTrainer(args=TrainingArguments(...))",
    ),
    (
        ("eval_", "do_", "load_best", "metric_for", "greater_is"),
        "recipes train without evaluation; use --eval, or OptimTrainer(args=TrainingArguments(...))",
    ),
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
    return (
        f"training has no argument {name!r}{hint}; docs/recipes.md lists those that a recipe sets, and "
        "OptimTrainer(model, args=TrainingArguments(...)) takes all"
    )


def _require_consistent(training: Mapping[str, Any]) -> None:
    if training.get("bf16") and training.get("fp16"):
        raise RecipeError("training: bf16 and fp16 exclude each other")
    _require_schedule(training)
    for key in ("logging", "save"):
        steps = training.get(f"{key}_steps")
        if training.get(f"{key}_strategy", "steps") == "steps" and steps is not None and not _is_interval(steps):
            raise RecipeError(
                f"training: {key}_steps must be a whole number of steps, or the share of all steps (below 1), "
                f"not {shown(steps)}"
            )
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if training.get(key) and not training.get("dataloader_num_workers"):
            raise RecipeError(f"training: {key} needs dataloader_num_workers of 1 or more")


def _require_schedule(training: Mapping[str, Any]) -> None:
    """Raise ``RecipeError`` if the arguments of a schedule are those of another, or if they exclude each other."""
    kind = training.get("lr_scheduler_type", "linear")
    given = training.get("lr_scheduler_kwargs", {})
    known = SCHEDULE_KWARGS.get(kind, ())
    for key in given:
        if key not in known:
            raise RecipeError(
                f"training: the schedule {kind} has no {key} ({', '.join(known) or 'it takes no lr_scheduler_kwargs'})"
            )
    if kind == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
        raise RecipeError(f"training: the schedule {kind} needs one of min_lr and min_lr_rate in lr_scheduler_kwargs")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        raise RecipeError(f"training: the schedule {kind} needs num_decay_steps in lr_scheduler_kwargs")
    if kind == "cosine_with_restarts" and given.get("num_cycles", 1) != int(given.get("num_cycles", 1)):
        raise RecipeError(f"training: num_cycles of the schedule {kind} must be a whole number")
    if kind == "polynomial" and given.get("lr_end", 1e-7) >= training.get("learning_rate", 5e-5):
        raise RecipeError(f"training: lr_end of the schedule {kind} must be below learning_rate")


def _is_interval(steps: float) -> bool:
    return 0 < steps < 1 or (steps >= 1 and steps == int(steps))

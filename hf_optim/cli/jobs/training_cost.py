"""What a training stage takes: memory on each device, steps, tokens, and checkpoints on disk."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...data.token_sequences import sequence_length
from ...evaluation.reported import format_bytes
from ...recipes.composition import Stage
from ...runs.scope import Scope
from ...toolkit.distillation import teachers
from ...training.arguments import training_arguments
from ...training.resume import FEW, OFTEN
from ...training.step_memory import StepMemory, measure_step
from .plan import Plan

# A new allocation rarely fits a freed one exactly. Measured on training of Llamas of 1 to 60 million parameters.
ALLOCATOR = 1.08
SELF = "self"


def _adam(parameters: list[nn.Parameter]) -> int:
    return sum(2 * p.numel() * p.element_size() for p in parameters)


def _adafactor(parameters: list[nn.Parameter]) -> int:
    """Return the bytes of the row and column means; vectors have one number for each weight. All float32."""
    means = (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for p in parameters)
    return 4 * sum(means)


def _one_moment(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _adam_8bit(parameters: list[nn.Parameter]) -> int:
    """Return the bytes of two moments of a byte, with a scale for each block of 256; small tensors keep float32."""
    return sum(2 * p.numel() * 4 if p.numel() < 4096 else 2 * (p.numel() + p.numel() // 64) for p in parameters)


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], int]] = {
    "adamw_torch": _adam,
    "adamw_torch_fused": _adam,
    "stable_adamw": _adam,
    "adamw_bnb_8bit": _adam_8bit,
    "adafactor": _adafactor,
    "adagrad": _one_moment,
    "rmsprop": _one_moment,
    "sgd": lambda parameters: 0,
}
"""The bytes of the state of each optimizer that a recipe can name."""


def training_cost(plan: Plan, stage: Stage, model: Any, rows: int | None) -> dict[str, Any]:
    """Return the cost of a training stage; ``rows`` are those of the training data, None if they are not known."""
    with tempfile.TemporaryDirectory() as home:
        arguments = training_arguments(home, plan.training_arguments)
    tokens = _row_tokens(plan)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    optimizer = str(arguments.optim.value if hasattr(arguments.optim, "value") else arguments.optim)
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    guide = _teacher(stage, model)
    step = measure_step(
        model,
        batch,
        tokens,
        batches=accumulated,
        checkpointing=bool(plan.training_arguments.get("gradient_checkpointing")),
        autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        teacher=guide,
    )
    memory = {
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": step.gradients,
        "optimizer": OPTIMIZERS.get(optimizer, _adam)(parameters),
        "activations": max(0, step.peak - step.gradients),
        "teacher": sum(p.numel() * p.element_size() for p in guide.parameters()) if guide is not None else 0,
        "techniques": _technique_bytes(stage, model),
    }
    device = int(sum(memory[key] for key in ("model", "optimizer", "teacher", "techniques")) + step.peak * ALLOCATOR)
    steps = _steps(arguments, rows)
    whole = arguments.train_batch_size * accumulated
    checkpoint = memory["model"] + memory["optimizer"] + _mask_bytes(memory["techniques"])
    kept = _checkpoints(plan.training_arguments, steps)
    data = 0 if rows is None else rows * tokens * 16  # ids and labels, int64
    cpu = plan.resolved_device.type == "cpu"
    return {
        "steps": [each.name for each in stage.steps],
        "kind": "training",
        "memory": memory,
        "memory_is_exact": step.exact,
        "device_bytes": device + (data if cpu else 0),
        "host_bytes": device + data if cpu else 2 * memory["model"] + data,
        "optimizer": optimizer,
        "training_steps": steps,
        "batch_size": whole,
        "gradient_accumulation_steps": accumulated,
        "row_tokens": tokens,
        "training_rows": rows,
        "training_tokens": None if steps is None else steps * whole * tokens,
        "checkpoints": {"written": kept[0], "kept": kept[1], "bytes": checkpoint, "disk_bytes": kept[2] * checkpoint},
        "readable": _readable(memory, step, device, optimizer, steps, whole, accumulated, tokens, kept, checkpoint),
    }


def _readable(
    memory: Mapping[str, int],
    step: StepMemory,
    device: int,
    optimizer: str,
    steps: int | None,
    whole: int,
    accumulated: int,
    tokens: int,
    kept: tuple[int | None, int, int],
    checkpoint: int,
) -> dict[str, str]:
    parts = ", ".join(f"{key} {format_bytes(size)}" for key, size in memory.items() if size)
    rough = "" if step.exact else " (activations by a formula)"
    batch = f"{whole} rows of {tokens} tokens" + (f" in {accumulated} parts" if accumulated > 1 else "")
    if steps is None:
        length = f"steps unknown: name the training data, or max_steps; {batch} a step"
    else:
        length = f"{steps:,} steps of {batch}: {steps * whole * tokens:,} tokens"
    number, last, at_once = kept
    if not last:
        saved = "none"
    else:
        written = "" if number is None else f"{number} written, "
        saved = f"{written}{last} kept, {format_bytes(checkpoint)} each, {format_bytes(at_once * checkpoint)} at most"
    return {
        "training memory": f"about {format_bytes(device)} on the device, with {optimizer}{rough}",
        "of which": parts,
        "training": length,
        "training checkpoints": saved,
    }


def _row_tokens(plan: Plan) -> int:
    """Return the tokens of a row of the training data, at most; images count as one."""
    config = plan.source.config
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        return 1
    return sequence_length(config, None, plan.training_data.seq_len)


def _teacher(stage: Stage, model: Any) -> Any:
    """Return the teacher of a stage without its weights; None if no step has one."""
    for step in stage.steps:
        source = step.training_teacher()
        if source is not None:
            return model if source == SELF else teachers.load_skeleton(source, step.name)
    return None


def _technique_bytes(stage: Stage, model: Any) -> int:
    """Return what the steps of a stage hold beside the model: masks, copies of weights, learned noise."""
    total = 0.0
    for step in stage.steps:
        targets, skip = getattr(step, "targets", ()), getattr(step, "skip", ())
        layers = Scope("", model, model).select(targets, skip, experts=True)
        taken = [layer for layer in layers.values() if step.takes(layer)]
        weights = [layer.weight for layer in taken if getattr(layer, "weight", None) is not None]
        total += sum(step.training_bytes(weight.element_size()) * weight.numel() for weight in weights)
    return int(total)


def _mask_bytes(techniques: int) -> int:
    """Return a share of what techniques hold as an upper bound of what their checkpoints add."""
    return techniques // 4


def _steps(arguments: Any, rows: int | None) -> int | None:
    """Return the optimizer steps, as a ``Trainer`` counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    if rows is None:
        return None
    batches = rows / arguments.train_batch_size
    whole = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(whole / arguments.gradient_accumulation_steps)))


def _checkpoints(training: Mapping[str, Any], steps: int | None) -> tuple[int | None, int, int]:
    """Return how many checkpoints are written (None if unknown), kept, and on disk at most at one time."""
    settings = {**OFTEN, **FEW, **training}
    strategy, every, limit = settings["save_strategy"], settings["save_steps"], settings["save_total_limit"]
    if strategy == "no":
        return 0, 0, 0
    if strategy == "epoch":
        written = math.ceil(float(settings.get("num_train_epochs", 3.0)))
    elif steps is not None:
        written = math.ceil(steps / math.ceil(every * steps if every < 1 else every))
    elif every < 1:
        written = math.ceil(1 / every)
    else:
        return None, limit, limit + 1
    return written, min(written, limit), min(written, limit + 1)

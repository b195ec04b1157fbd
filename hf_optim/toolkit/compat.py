"""Differences between the supported versions of transformers, 5.17 to 5.24. No other module depends on a version."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# The name of the key/value cache, as an argument of ``forward`` and as a field of its output.
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"


def weight_conversions(model: Any) -> list[Any]:
    """Return the conversions between checkpoint names and parameters that transformers applied to load a model."""
    return list(getattr(model, "_weight_conversions", None) or [])


def renamed_arguments(training: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return arguments of ``TrainingArguments`` under the names that this version does not warn about.

    ``known`` are the names of its fields.
    """
    new = {"gradient_checkpointing": "activation_checkpointing"}
    new |= {f"{old}_kwargs": f"{name}_kwargs" for old, name in new.items()}
    return {new[key] if new.get(key) in known else key: value for key, value in training.items()}


def accumulation_steps(trainer: Any) -> int:
    """Return the number of micro-batches in the current optimizer step of a ``Trainer``.

    The last step of an epoch may have fewer than ``gradient_accumulation_steps``.
    """
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Return True if the task loss is a share of the accumulated batch already (``Trainer.training_step``)."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return declared
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


def task_loss_factor(trainer: Any, num_items_in_batch: Any) -> int:
    """Return the factor in the loss of ``Trainer.compute_loss`` that makes up for averaging over the processes."""
    if num_items_in_batch is None or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return 1
    if not trainer.args.average_tokens_across_devices:
        return 1
    if trainer.args.n_gpu > 1:
        return int(trainer.args.n_gpu)
    get_tp_size = getattr(trainer, "get_tp_size", lambda: 1)
    return int(trainer.accelerator.num_processes // get_tp_size())


def loss_shifts_labels(trainer: Any) -> bool:
    """Return True if the loss of a ``Trainer`` shifts the labels by one: the first of each row is not counted."""
    return getattr(trainer, "_loss_shifts_labels", False)


def set_generator(collator: Any, generator: Any) -> None:
    """Set the random generator of a stock data collator, which 5.24 replaces unless it belongs to this process."""
    collator.generator = generator
    collator._generator_pid = os.getpid()


def is_prepared(generation_config: Any) -> bool:
    """Return True for the configuration that ``generate`` passes to a decoding method, not one that a user made."""
    return hasattr(generation_config, "_pad_token_tensor")


def arguments_of_generate() -> dict[str, Any]:
    """Return the arguments of the ``generate`` that calls the caller of this function as its ``custom_generate``.

    transformers does not pass ``streamer`` and ``assistant_model`` on to a function, so they are read from its frame.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "generate" and "generation_mode_kwargs" in frame.f_locals:
            return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model")}
    return {}


def decoding_method(model: Any, generation_config: Any, assistant_model: Any) -> Any:
    """Return the loop of transformers for a generation configuration, as a function of the model."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = generation_config.get_generation_mode(assistant_model)
    return getattr(type(model), GENERATION_MODES_MAPPING[mode])


def set_experts_implementation(model: Any, implementation: Any) -> None:
    """Set the function that computes the experts of a model; also of one whose class came with its checkpoint.

    transformers looks for its decorator in the source of a class's module and passes over a class that lacks it: so
    does one that derives from a stock class, unless the stock class has been asked before in the same process.

    Raises what ``PreTrainedModel.set_experts_implementation`` raises.
    """
    classes: set[Any] = {type(part) for part in model.modules() if isinstance(part, transformers.PreTrainedModel)}
    for cls in classes:
        stock: Any = next((base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")), cls)
        if stock._can_set_experts_implementation() and not cls._can_set_experts_implementation():
            cls._can_set_experts_implementation_cached_value = True
    model.set_experts_implementation(implementation)


def expert_parallel() -> Any:
    """Return the module with transformers' registry of exchanges between ranks; None before 5.23."""
    if VERSION < (5, 23):
        return None
    from transformers.distributed import expert_parallel as found

    return found


def ep_implementation_of(module: Any) -> Any:
    """Return the ``EPImplementation`` that the forward of a module of experts calls; None if it calls none.

    transformers keeps it in the closure of the forward that it installs, and nowhere else.
    """
    parallel, forward = expert_parallel(), vars(module).get("forward")
    if parallel is None or forward is None:
        return None
    cells = zip(
        (getattr(forward, "__code__", None) and forward.__code__.co_freevars) or (),
        forward.__closure__ or (),
        strict=False,
    )
    found = next((cell.cell_contents for name, cell in cells if name == "implementation"), None)
    return found if isinstance(found, parallel.EPImplementation) else None


def install_ep_implementation(module: Any, former: Any, name: str, cls: Any) -> None:
    """Replace the ``EPImplementation`` ``former`` of a module of experts by one of the class registered as ``name``."""
    parallel = expert_parallel()
    parallel.EPImplementationInterface.register(name, cls)
    held = vars(module).pop("forward")
    try:
        parallel.EpDispatchExpertsParallel().install_forward(
            module, former.ep_mesh, tp_mesh=former.tp_mesh, ep_implementation=name
        )
    except BaseException:
        module.forward = held
        raise


def register_ep_implementation(name: str, cls: Any) -> None:
    """Register a class for ``DistributedConfig(ep_implementation=name)``; None removes the name."""
    registry = expert_parallel().EPImplementationInterface
    if cls is None:
        registry._global_mapping.pop(name, None)
    else:
        registry.register(name, cls)

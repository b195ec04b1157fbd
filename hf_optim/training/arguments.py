"""The ``training:`` section of a recipe as ``TrainingArguments``, tried before any work is done."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import OptimError, RecipeError
from ..recipes.field_checks import did_you_mean
from ..toolkit import compat
from ..trust.bounds import first_line, shown

TRIED_STEPS = 10


def training_arguments(home: str, training: Mapping[str, Any]) -> Any:
    """Return the ``TrainingArguments`` of a recipe's ``training:`` section. Raises ``RecipeError``.

    ``home`` is where checkpoints go unless ``training`` says so.
    """
    from transformers import TrainingArguments

    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key in training:
        if key not in known:
            raise RecipeError(
                f"training has no argument {shown(key)}{did_you_mean(key, known)} (see TrainingArguments)"
            )
    quiet = {"output_dir": home, "report_to": [], "save_strategy": "no", "seed": 0}
    with recipe_errors():
        return TrainingArguments(**{**quiet, **compat.renamed_arguments(training, known)})


def require_trainable(training: Mapping[str, Any]) -> None:
    """Raise ``RecipeError`` if a ``Trainer`` refuses these arguments, or its optimizer or schedule does.

    Tried on a layer of one weight: an optimizer whose package is missing, a precision that the device lacks, or numbers
    that exclude each other should not show after hours of calibration. The random state is as before.
    """
    from transformers import Trainer
    from transformers.utils import is_liger_kernel_available

    if training.get("use_liger_kernel") and not is_liger_kernel_available():
        raise RecipeError("training: use_liger_kernel needs the package liger-kernel")
    with tempfile.TemporaryDirectory() as home, _same_random_state():
        arguments = training_arguments(home, {**training, "full_determinism": False, "output_dir": home})
        with recipe_errors():
            trainer = Trainer(model=nn.Linear(1, 1), args=arguments)
            trainer.create_optimizer_and_scheduler(max(1, int(training.get("max_steps") or TRIED_STEPS)))


@contextlib.contextmanager
def recipe_errors() -> Iterator[None]:
    """Raise ``RecipeError`` in place of the errors of the body, which come from training arguments."""
    try:
        yield
    except (OptimError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from transformers, accelerate, torch and packages of optimizers
        raise RecipeError(f"training: {first_line(error)}") from error


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])

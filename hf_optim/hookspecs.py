"""The ten hooks of hf_optim, in lifecycle order.

A technique implements any of them with ``@hookimpl``; the host calls them. pluggy passes an implementation only the
arguments it names, so a hook that does not need ``scope`` may leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipes.hooks import hookspec
from .recipes.hooks import register_techniques as register_techniques

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback

    from .evaluation.cards.card import Card
    from .runs.run import Run
    from .runs.scope import Scope


@hookspec
def register_kernels(register: Callable[..., None]) -> None:
    """Register kernels for the result of this step. Called once per run, at its first ``accelerate()``.

    Call ``register(kernel)`` with an ``hf_optim.Kernel``: which compressed weights it supports, and how to prepack one
    into the kernel's own layout. The kernels of a run are tried before the installed ones. A package whose kernel is
    for every model, also for one loaded with ``optim_config="auto"``, registers it with an entry point of the group
    ``hf_optim.kernels`` instead.
    """


@hookspec
def prepare_load(run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ask for arguments of ``from_pretrained``, before any weight is read.

    ``run.config`` is the model's configuration (already resolved, and yours to adjust); ``load_kwargs`` is what the
    caller passed, read-only. Return the keys to merge, such as ``attn_implementation``, ``experts_implementation``,
    ``quantization_config`` or ``dtype``. Two steps that ask for one key with different values are refused.
    """


@hookspec
def transform_model(run: Run) -> PreTrainedModel | None:
    """Change the architecture, with the weights in memory.

    Edit ``run.model`` in place and return None, or return a new model: it replaces ``run.model`` for the steps after.
    A step that looks at the model before its stage changes it (to copy it, say) is marked
    ``@hookimpl(tryfirst=True)``: it is called before the others of its stage, whatever its position.
    """


@hookspec
def calibrate(run: Run, scope: Scope) -> Iterator[None]:
    """A generator: attach observers, ``yield`` while the host feeds batches through the model, detach and apply.

    Each ``yield`` is one pass over the calibration data; a step with ``needs_data() == False`` gets no batches.
    ``scope`` is the part of the model that may be touched: the whole model, or one block, depending on the driver.
    Observers must be detached in ``finally`` (or with a ``with`` block), since the host closes the generator when
    anything fails.
    """


@hookspec
def training_callbacks(run: Run) -> list[TrainerCallback]:
    """Native ``transformers.TrainerCallback`` objects for the stage that is about to train."""


@hookspec
def training_loss(
    run: Run, model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Any
) -> dict[str, torch.Tensor | float] | None:
    """Extra loss terms of one training step, by name; the host adds and logs them.

    ``outputs`` are the student's (with ``logits`` and the task ``loss``). Each term is a mean over the micro-batch, or
    a vector of means to be added up; ``Technique.loss_items`` counts what it is a mean over, and the host weights it by
    the micro-batch's share of that in the optimizer step. The key ``task_scale`` (a float) multiplies the
    task loss instead of being added; those of several steps multiply.
    """


@hookspec
def parameter_groups(run: Run, model: torch.nn.Module) -> list[dict[str, Any]] | None:
    """Optimizer groups with settings of their own: ``[{"params": [...], "lr": 1e-3}, ...]``.

    A parameter named here leaves the Trainer's default groups. Two steps that claim one parameter are refused.
    """


@hookspec
def finalize_model(run: Run) -> None:
    """Leave a clean model at the end of a stage: fold masks, turn fake quantization into stored quantization."""


@hookspec
def export(run: Run, directory: Path, card: Card) -> None:
    """Add to a checkpoint: extra files in ``directory``, and paragraphs and numbers on the model card.

    Called after the weights are written and before the checkpoint appears under its final name.
    """

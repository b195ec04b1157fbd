"""Compare checkpoints: each is evaluated in a process of its own, timed in turn with the others, and held against one.

Nothing is measured before it is known that all of them can be compared.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.source import ModelSource, checkpoint_bytes, load_model, load_processor, resolve_device
from ...data.datasets import require_readable
from ...data.processor_errors import no_image_processor, no_tokenizer
from ...data.tasks import Task, task_of, task_of_auto_class
from ...errors import ModelError, OptimError
from ...evaluation.cards.plots import plot_pareto
from ...evaluation.cards.points import ORIGINAL, OTHER, Point, is_drawable
from ...evaluation.evaluate import compare
from ...evaluation.reported import ReportedMetric, common_quality_metric
from ...evaluation.side_by_side import require_comparable, require_same_tokens
from ...recipes.config import DataConfig
from ...runs import progress
from ...toolkit.checkpoint.model_config import model_class
from ...trust.code import may_run
from .measuring import eval_command, figures_on_kernels, json_of
from .timed_models import Candidate, load_on_kernels, request

# Ends the name of a model that is timed a second time, on kernels.
ON_KERNELS = " (on kernels)"


@dataclass(frozen=True)
class Comparison:
    """Checkpoints to compare.

    Attributes:
        models: Hub ids or directories; the first is the reference.
        source: how they are loaded; its ``model`` is not used.
        data: what they are evaluated on.
        kernels: run compressed ones on hf_optim's kernels.
        speed: also time them.
        device: where they run; None means CUDA if available.
        also_on_kernels: models that are also timed on kernels, and evaluated there if layers run on any.
    """

    models: tuple[str, ...]
    source: ModelSource
    data: DataConfig
    kernels: bool = False
    speed: bool = True
    device: str | None = None
    also_on_kernels: tuple[str, ...] = ()

    def source_of(self, model: str) -> ModelSource:
        return replace(self.source, model=model)


def compare_checkpoints(job: Comparison) -> dict[str, Any]:
    """Return ``{"reference": name, "models": {name: metrics}, "timing": conditions}``; names are those of ``models``.

    With ``also_on_kernels``, also ``"accelerated": {name: metrics}`` for those that run on kernels.

    Raises ``OptimError`` if models cannot be compared or measured.
    """
    device = resolve_device(job.device) or torch.device("cpu")
    _require_comparable(job)
    require_readable(job.data)
    found = {}
    for model in job.models:
        with progress.stage(f"evaluating {model}"):
            found[model] = _figures(job, model, job.kernels)
    reference = job.models[0]
    with progress.stage(f"comparing with {reference}"):
        agreements = _agreements(job, device)
    for model, metrics in agreements.items():
        found[model] |= metrics
    if not job.speed:
        return {"reference": reference, "models": found, "timing": {}}
    with progress.stage("timing the models in turn"):
        times = _times(job)
    for model in job.models:
        found[model] |= times["times"].get(model, {})
    accelerated = {}
    for model in job.also_on_kernels:
        timed = times["times"].get(f"{model}{ON_KERNELS}", {})
        with progress.stage(f"evaluating {model} on kernels"):
            accelerated[model] = figures_on_kernels(timed, functools.partial(_figures, job, model, True))
    more = {"accelerated": accelerated} if accelerated else {}
    return {"reference": reference, "models": found, "timing": times["timing"], **more}


def plot(found: Mapping[str, Any], labels: Mapping[str, str], path: Path) -> ReportedMetric:
    """Draw quality against bytes of a comparison; return the metric of quality.

    Raises ``OptimError`` if there is nothing to draw.
    """
    metric = common_quality_metric(*found["models"].values())
    points = [
        Point(
            metrics["bytes_on_disk"], metrics[metric.key], labels[model], "" if model == found["reference"] else OTHER
        )
        for model, metrics in found["models"].items()
        if metric is not None and is_drawable(metrics[metric.key], signed=True)
    ]
    if metric is None or len(points) < 2:
        raise OptimError("there are no two models with a quality that can be drawn")
    plot_pareto({"": points}, metric, path, "quality against size", {ORIGINAL: "reference", OTHER: "compared with it"})
    return metric


def _require_comparable(job: Comparison) -> None:
    first = job.models[0]
    base = job.source_of(first)
    cls = model_class(base.config)
    processor = _processor(base, cls)
    for model in job.models[1:]:
        source = job.source_of(model)
        other = model_class(source.config)
        require_comparable(model, _task(other), source.config, first, _task(cls), base.config)
        require_same_tokens(model, _processor(source, other), first, processor)


def _processor(source: ModelSource, cls: type) -> Any:
    """Return the tokenizer or image processor of a model. Raises ``DataError`` if there is none."""
    found = load_processor(source, cls)
    if found is None:
        images = getattr(cls, "main_input_name", "") == "pixel_values"
        raise (no_image_processor if images else no_tokenizer)(f"comparing {source.model} needs")
    return found


def _task(cls: type) -> Task:
    """Return the task of a model's class; of a model that comes with its code, that of the auto class that loads it."""
    return task_of_auto_class(cls.__name__) if cls.__name__.startswith("AutoModel") else task_of(cls.__name__)


def _figures(job: Comparison, model: str, kernels: bool) -> dict[str, Any]:
    """Return quality and peak memory of a checkpoint, measured in a child process."""
    word = may_run(job.source.trust_remote_code)
    command = eval_command(model, job.data, job.source.dtype, job.device, kernels, word, job.source.revision)
    return json_of(command, f"quality of {model}", own_code=False)


def _agreements(job: Comparison, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return bytes of each model and its agreement with the reference, with these two in memory."""
    first, *others = job.models
    base = _load(job, first, device)
    processor = load_processor(job.source_of(first), type(base))
    found = {first: {"bytes_on_disk": checkpoint_bytes(job.source_of(first), base)}}
    for model in others:
        loaded = _load(job, model, device)
        size = {"bytes_on_disk": checkpoint_bytes(job.source_of(model), loaded)}
        found[model] = {**compare(loaded, base, processor, job.data), **size}
        del loaded
        gc.collect()
    return found


def _load(job: Comparison, model: str, device: torch.device) -> Any:
    source = job.source_of(model)
    return load_on_kernels(source, device) if job.kernels else load_model(source).to(device)


def _times(job: Comparison) -> dict[str, Any]:
    """Return the times of all models, measured in turn in one child process."""
    trust = may_run(job.source.trust_remote_code)
    source = job.source
    candidates = [Candidate(model, model, source.revision, source.dtype, trust, job.kernels) for model in job.models]
    candidates += [
        Candidate(f"{model}{ON_KERNELS}", model, source.revision, source.dtype, trust, kernels=True)
        for model in job.also_on_kernels
    ]
    command = [sys.executable, "-m", "hf_optim.cli.jobs.timed_models", request(candidates, job.device)]
    return json_of(command, "times", own_code=False)


def short_labels(models: Sequence[str]) -> dict[str, str]:
    """Return the shortest end of each path that no other model has, by model."""
    parts = {model: Path(model).parts for model in models}
    labels = {}
    for model, own in parts.items():
        count = next(
            (
                n
                for n in range(1, len(own) + 1)
                if not any(other[-n:] == own[-n:] for name, other in parts.items() if name != model)
            ),
            len(own),
        )
        labels[model] = "/".join(own[-count:])
    return labels


def require_models(models: Sequence[str], reference: str | None) -> tuple[str, ...]:
    """Return the models with the reference first. Raises ``ModelError`` for fewer than two, or one given twice."""
    ordered = list(models) if reference is None else [reference, *(m for m in models if m != reference)]
    if len(ordered) < 2:
        raise ModelError("a comparison takes at least two models")
    if len(set(ordered)) < len(ordered):
        twice = next(model for model in ordered if ordered.count(model) > 1)
        raise ModelError(f"{twice} is given twice")
    return tuple(ordered)

"""Refuse what cannot work before anything is calibrated or trained, from configurations, headers and free space.

``preflight`` is what ``hf-optim check --model`` and ``hf-optim compress`` have in common: whatever one refuses, the
other refuses with the same message. It takes seconds, whatever the size of the model. What only data can tell comes
after it: ``read_calibration``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.source import find_multimodal_processor, load_processor
from ...data.calibration_set import CalibrationData, build_calibration_data
from ...data.datasets import is_local
from ...data.tasks import task_of_model
from ...errors import CheckpointError, DataError, ModelError
from ...lifecycle.stages import require_inputs
from ...lifecycle.step_checks import require_supported_steps
from ...recipes.config import DataConfig
from ...recipes.streamable import require_streamable
from ...recipes.traits import Trait
from ...runs import distributed
from ...runs.run import traits_of, traits_of_config
from ...runs.stored_zeros import known_zeros
from ...toolkit import topology
from ...toolkit.checkpoint.model_config import build_meta_model
from ...toolkit.checkpoint.safetensors import TORCH_DTYPES, SafetensorsHeaders
from ...training.arguments import require_trainable
from ...training.fit import RANDOM, TEXT_TASKS, require_tokenizer, require_trainable_stage, training_rows
from ...trust.lookup import Where
from .estimate import estimate
from .plan import Plan
from .room import require_memory, require_space, require_writable
from .step_checks import check_steps

if TYPE_CHECKING:
    from ...checkpoints.meta_model import MetaModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """The result of ``preflight``.

    Attributes:
        model: the model on the meta device.
        meta_model: the same with its files; None if its weights are not on this machine, or it cannot be loaded so.
        traits: of the result.
        estimates: ``estimate(plan, model)``.
        notes: warnings about settings that will be adjusted.
    """

    model: Any
    meta_model: MetaModel | None
    traits: frozenset[Trait]
    estimates: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def preflight(plan: Plan, output: Path | None = None, *, offline: bool = False, data: bool = False) -> Findings:
    """Check everything that can be refused without reading a weight or data.

    Args:
        plan: what is to be done.
        output: the directory that is to be written, if any. With one, data that the plan needs must be named.
        offline: check the shards only if they are on this machine.
        data: read and check the data, too, if it is on this machine, for numbers of rows and tokens.

    Raises ``OptimError`` for the first problem, naming the step, module, tensor or file.
    """
    source, recipe = plan.source, plan.recipe
    traits = recipe.check(traits_of_config(source.config))
    if recipe.driver == "streamed":
        require_streamable(recipe, plan.dense)
    if plan.trains:
        require_trainable(plan.training_arguments)
    distributed.refuse_distributed(recipe)
    if output is not None:
        require_named_data(plan)
        require_writable(output)
    if recipe.spill is not None:
        require_writable(Path(recipe.spill) / "activations")
    meta_model = _meta_model(plan, offline)
    model: Any = (
        meta_model.model if meta_model is not None else build_meta_model(source.config, source.trust_remote_code)
    )
    # What the record says of zeros; their tensors are looked at once they are read.
    known = known_zeros(model, Where(source.model, "", {"revision": source.revision, "local_files_only": offline}))
    traits = recipe.check(
        (traits_of(model) if meta_model is not None else traits_of_config(source.config)) | known.traits
    )
    notes: list[str] = []
    if meta_model is not None:
        notes += check_shards(meta_model, source.model, recipe.driver == "streamed")
    notes += check_steps(recipe, model)
    require_supported_steps(recipe, model, dense=plan.dense)
    for stage in recipe.stages:
        if stage.trains:
            require_trainable_stage(stage, model, recipe, plan.training_data.dataset)
    rows, calibration_tokens = read_data(plan, model) if data else (None, None)
    estimates = estimate(plan, model, rows, calibration_tokens)
    if output is not None:
        require_space(output, estimates["bytes_after"] or estimates["bytes_before"], "the result")
    if recipe.spill is not None:
        require_space(Path(recipe.spill), estimates["activation_bytes"], "the activations that are spilled")
    require_memory(recipe, estimates)
    return Findings(model, meta_model, traits, estimates, notes)


def require_named_data(plan: Plan) -> None:
    """Raise ``DataError`` if a stage needs data and none is named."""
    for stage in plan.recipe.stages:
        if stage.needs_data and plan.recipe.calibration.dataset is None:
            raise DataError(
                f"{stage.label} needs calibration data: pass --calibration DATA, or name a dataset in the recipe under "
                "`calibration:`"
            )
        if stage.trains and plan.training_data.dataset is None:
            raise DataError(
                f"{stage.label} trains: pass --train DATA, or name a dataset in the recipe under `calibration:`"
            )


def read_calibration(plan: Plan, tokenizer: Any, model: Any = None) -> CalibrationData | None:
    """Read and check the calibration batches; None if no stage needs any.

    ``model`` may be on the meta device; None leaves out whether the batches have all that it reads. Raises
    ``DataError``.
    """
    if not plan.needs_calibration:
        return None
    data = build_calibration_data(
        None,
        model_config=plan.source.config,
        tokenizer=tokenizer,
        data=plan.recipe.calibration,
        load_processor=partial(find_multimodal_processor, plan.source.model, **plan.source.load_kwargs),
    )
    if model is not None:
        require_inputs(model, data)
    return data


def read_data(plan: Plan, model: Any) -> tuple[int | None, int | None]:
    """Read the data of a plan that is on this machine, as the run would. Raises ``DataError`` for unsuitable data.

    Returns the rows of the training data and the tokens of the calibration data; None where these are not needed, not
    named or not on this machine.
    """
    tokenizer = load_processor(plan.source, type(model))
    rows = tokens = None
    if plan.needs_calibration and _is_here(plan.recipe.calibration):
        found = read_calibration(plan, tokenizer, model)
        tokens = found.description.get("tokens") if found is not None else None
    if plan.trains and _is_here(plan.training_data):
        rows = len(training_rows(model, tokenizer, plan.training_data)[0])
    elif plan.trains and plan.training_data.dataset != RANDOM and task_of_model(model).tag in TEXT_TASKS:
        require_tokenizer(tokenizer)
    return rows, tokens


def _is_here(data: DataConfig) -> bool:
    return data.dataset is not None and (data.dataset == RANDOM or is_local(data.dataset))


def _meta_model(plan: Plan, offline: bool) -> MetaModel | None:
    from ...checkpoints import meta_model

    if offline and not meta_model.is_local(plan.source):
        return None
    try:
        return meta_model.build(plan.source)
    except ModelError as error:
        # The other drivers can load code that cannot be loaded without weights.
        if plan.recipe.driver == "streamed":
            raise
        log.debug("not checked without weights: %s", error)
        return None


# -- the shards -------------------------------------------------------------------------------------------------------
def check_shards(found: MetaModel, source: str, strict: bool) -> list[str]:
    """Check that the shards hold every tensor of the model; return warnings about additional tensors.

    ``strict`` refuses any missing tensor; otherwise only those of blocks (a new head is trained later). Raises
    ``CheckpointError``.
    """
    kind = type(found.model).__name__
    inside = tuple(f"{block.name}." for block in topology.known_blocks(found.model))
    missing = [name for name in found.missing if strict or name.startswith(inside)]
    if missing:
        raise CheckpointError(
            f"{source} has no weights for {len(missing)} tensors of {kind} ({', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}): load it with the class that its config.json names, or fetch the "
            "missing shards"
        )
    for entry in SafetensorsHeaders(found.files).entries.values():
        if entry.type not in TORCH_DTYPES:
            raise CheckpointError(
                f"{entry.file.name}: {entry.key} has the type {entry.type}, which hf_optim cannot read"
            )
    extra = found.unexpected
    return [f"{len(extra)} tensors of the checkpoint do not belong to {kind}: {', '.join(extra[:3])}"] if extra else []

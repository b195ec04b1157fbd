"""The YAML front matter of a model card, in the form that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ...recipes.catalogue import catalogue
from ...recipes.contract import Reload
from ...recipes.traits import QUANTIZED
from ...runs.record import Record
from ...trust.text import one_line, tag
from ..reported import REPORTED_METRICS, is_number
from .result import Result


def front_matter(result: Result, name: str) -> str:
    """Return the YAML metadata of a card titled ``name``."""
    from huggingface_hub import EvalResult, ModelCardData

    record = result.record
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": hub_tags(result)}
    base = record.base_model
    if is_hub_id(base.get("id")):
        metadata |= {"base_model": base["id"], "base_model_relation": _relation(record)}
    if tag(base.get("license") or ""):
        metadata["license"] = base["license"]
    if result.model_class():
        metadata["pipeline_tag"] = result.task().tag
    dataset = str(record.calibration.get("dataset") or "").partition(":")[0]
    if is_hub_id(dataset):
        metadata["datasets"] = [dataset]
    after, data = record.measured.get("after", {}), evaluation_name(record)
    results = [
        EvalResult(
            task_type=_task(result),
            dataset_type=data if is_hub_id(data) else "local",
            dataset_name=data,
            metric_type=metric.hub_name,
            metric_name=metric.label,
            metric_value=after[metric.key],
        )
        for metric in REPORTED_METRICS
        if data and metric.hub_name and is_number(after.get(metric.key))
    ]
    if results:
        metadata |= {"eval_results": results, "model_name": name}
    return ModelCardData(**metadata).to_yaml() + "\n"


def is_hub_id(name: Any) -> bool:
    """Return True if a name is a repository id of the Hub with an owner; the name of a local folder has none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "~", "/")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _relation(record: Record) -> str:
    return "quantized" if str(QUANTIZED) in record.traits else "finetune"


def hub_tags(result: Result) -> list[str]:
    """Return the tags for the Hub: ``hf_optim``, the format, the techniques and their families."""
    tags = ["hf_optim"]
    if result.is_compressed_tensors:
        tags.append("compressed-tensors")
    if result.reload is Reload.REMOTE_CODE:
        tags.append("custom_code")
    for step in result.record.recipe.get("steps", ()):
        spec = technique_spec(step)
        tags += [step["technique"], *([spec.family] if spec else [])]
    return list(dict.fromkeys(name for name in tags if tag(name)))


def technique_spec(step: Mapping[str, Any]) -> Any:
    """Return the ``TechniqueSpec`` of a recipe step, or None if its technique is not installed here."""
    try:
        return catalogue().get(step["technique"]).spec
    except (RecipeError, ImportError):
        return None


def _task(result: Result) -> str:
    return tag(result.record.measured.get("after", {}).get("task") or "") or result.task().tag


def evaluation_name(record: Record) -> str:
    """Return the Hub id or the file name of the evaluation data; empty if nothing was evaluated on data."""
    name = str(record.measured.get("evaluation", {}).get("dataset") or "")
    return name if is_hub_id(name) else one_line(Path(name).name, 200)

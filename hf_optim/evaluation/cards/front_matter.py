"""The YAML front matter of a model card, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.tasks import task_of
from ...errors import RecipeError
from ...recipes.catalogue import catalogue
from ...recipes.contract import Reload
from ...recipes.traits import QUANTIZED
from ...runs.record import Record
from ..reported import REPORTED_METRICS, is_number


def front_matter(record: Record, name: str, class_name: str) -> str:
    """YAML metadata as the Hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    known: dict[str, Any] = {"library_name": "transformers", "tags": tags(record)}
    base = record.base_model
    if is_hub_id(base.get("id")):
        known |= {"base_model": base["id"], "base_model_relation": _relation(record)}
    if base.get("license"):
        known["license"] = base["license"]
    if class_name:
        known["pipeline_tag"] = task_of(class_name).tag
    dataset = str(record.calibration.get("dataset") or "").partition(":")[0]
    if is_hub_id(dataset):
        known["datasets"] = [dataset]
    after, data = record.measured.get("after", {}), evaluation_name(record)
    results = [
        EvalResult(
            task_type=_task(record, class_name),
            dataset_type=data if is_hub_id(data) else "local",
            dataset_name=data,
            metric_type=figure.metric,
            metric_name=figure.label,
            metric_value=after[figure.key],
        )
        for figure in REPORTED_METRICS
        if data and figure.metric and is_number(after.get(figure.key))
    ]
    if results:
        known |= {"eval_results": results, "model_name": name}
    return ModelCardData(**known).to_yaml() + "\n"


def is_hub_id(name: Any) -> bool:
    """Whether a name is the id of a repository on the Hub, with its owner (a local folder's name has none)."""
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


def tags(record: Record) -> list[str]:
    """Of the Hub: ``hf_optim``, the format, the techniques and their families."""
    found = ["hf_optim"]
    if record.reload == Reload.STOCK_FORMAT.name:
        found.append("compressed-tensors")
    if record.reload == Reload.REMOTE_CODE.name:
        found.append("custom_code")
    for step in record.recipe.get("steps", ()):
        spec = spec_of(step)
        found += [step["technique"], *([spec.family] if spec else [])]
    return list(dict.fromkeys(found))


def spec_of(step: Mapping[str, Any]) -> Any:
    """The spec of a step's technique, or None."""
    # A card may be rendered where the technique's distribution is not installed.
    try:
        return catalogue().get(step["technique"]).spec
    except (RecipeError, ImportError):
        return None


def _task(record: Record, class_name: str) -> str:
    return str(record.measured.get("after", {}).get("task") or task_of(class_name).tag)


def evaluation_name(record: Record) -> str:
    """The Hub id of the evaluation data, or its file name; empty when nothing was measured on data."""
    name = str(record.measured.get("evaluation", {}).get("dataset") or "")
    return name if is_hub_id(name) else Path(name).name

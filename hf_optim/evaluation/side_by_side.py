"""Compare several models on the same data: quality, agreement with one of them, bytes and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.tasks import Task, task_of_model
from ..errors import DataError, ModelError
from ..recipes.config import DataConfig
from .evaluate import compare, evaluate
from .latency import time_models, workload_of
from .sizes import parameter_bytes

# A model, or a function that loads one. What is loaded is freed before the next model is.
Loadable = Any


def compare_models(
    models: Mapping[str, Loadable],
    tokenizer: Any,
    data: DataConfig,
    *,
    reference: str | None = None,
    speed: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluate models on the same data and compare their predictions with those of one of them.

    At most two models are in memory at a time, the reference and one other, if the others are given as functions that
    load them. Their logits are compared batch by batch; those of the reference are computed again for every model
    instead of being kept, since they take the tokens of the data times the vocabulary.

    Args:
        models: by name, each a model on its device, or a function without arguments that returns one.
        tokenizer: of all of them, or their image processor.
        data: which data, and how much of it.
        reference: the name of the model that the others are compared with; None means the first.
        speed: also time each model and the reference in turn.

    Returns for each model the metrics of ``evaluate``, ``parameter_bytes``, and except for the reference
    ``top1_agreement`` and ``kl`` (nats per position). With ``speed``, also its time in milliseconds, and
    ``relative_time``, its time as a multiple of the reference's from the same rounds.

    Raises ``ModelError`` if there are fewer than two models or no such reference, and if a model cannot be compared
    with the reference (``require_comparable``); ``DataError`` if the data does not fit.
    """
    first = next(iter(models), "") if reference is None else reference
    if first not in models or len(models) < 2:
        raise ModelError(
            f"compare_models takes at least two models, and {first!r} among them as the reference, not {list(models)}"
        )
    base = _loaded(models[first])
    found = {first: _evaluated(base, tokenizer, data)}
    for name, one in models.items():
        if name != first:
            model = _loaded(one)
            require_comparable(name, task_of_model(model), model.config, first, task_of_model(base), base.config)
            times = _times(base, model) if speed else {}
            found[first] = {**times.get("reference", {}), **found[first]}
            found[name] = {**_evaluated(model, tokenizer, data), **compare(model, base, tokenizer, data)}
            found[name] |= times.get("model", {})
            del model
    return {name: found[name] for name in models}


def require_comparable(name: str, task: Task, config: Any, reference: str, other: Task, reference_config: Any) -> None:
    """Raise ``ModelError`` if the predictions of two models cannot be compared, with the reason.

    Args:
        name, task, config: a model: its name in the message, its task and its configuration.
        reference, other, reference_config: the same of the model that it is to be compared with.
    """
    begin = f"{name} cannot be compared with {reference}"
    if task != other:
        raise ModelError(f"{begin}: their tasks are {task.tag} and {other.tag}")
    sizes = [_classes(one, task.tag) for one in (config, reference_config)]
    if sizes[0] != sizes[1]:
        what = "classes" if task.tag.endswith("-classification") else "entries in their vocabularies"
        raise ModelError(f"{begin}: they have {sizes[0]} and {sizes[1]} {what}")


def require_same_tokens(name: str, tokenizer: Any, reference: str, other: Any) -> None:
    """Raise ``DataError`` if two tokenizers number tokens differently; without both of them there is nothing to check.

    Logits of equal shape are compared position by position, which would be meaningless.
    """
    tables: list[Any] = [getattr(one, "get_vocab", dict)() for one in (tokenizer, other)]
    if all(tables) and tables[0] != tables[1]:
        differing = next(iter(sorted(set(tables[0].items()) ^ set(tables[1].items()))))[0]
        raise DataError(
            f"{name} cannot be compared with {reference}: their tokenizers number tokens differently, such as "
            f"{differing!r}"
        )


def _classes(config: Any, tag: str) -> Any:
    if tag.endswith("-classification"):
        return getattr(config, "num_labels", None)
    return getattr(config.get_text_config(), "vocab_size", None)


def _loaded(one: Loadable) -> Any:
    # A model is callable too.
    return one if hasattr(one, "config") else one()


def _evaluated(model: Any, tokenizer: Any, data: DataConfig) -> dict[str, Any]:
    return {**evaluate(model, tokenizer, data, speed=False), "parameter_bytes": parameter_bytes(model)}


def _times(base: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Time two models in turn. Empty if there is no workload for them."""
    workload = workload_of(base)
    if workload is None:
        return {}
    times = time_models({"reference": base, "model": model}, workload)
    found = {name: timing.metrics(workload.key) for name, timing in times.items()}
    found["model"]["relative_time"] = times["model"].median / times["reference"].median
    return found

"""Tasks of EleutherAI's lm-eval on a model in memory. The package is optional: ``pip install 'hf-optim[lm-eval]'``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.tasks import task_of_model
from ..errors import DataError, ModelError, OptimError
from ..recipes.field_checks import did_you_mean
from ..toolkit.modules.modes import eval_mode
from ..trust.bounds import first_line, shown
from .reported import is_number

TASKS = ("text-generation", "text2text-generation", "image-text-to-text")


def require_lm_eval() -> None:
    """Raise ``OptimError`` if lm-eval is not installed."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise OptimError(f"lm-eval is not installed ({first_line(error)}): pip install 'hf-optim[lm-eval]'") from error


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval on a model in memory.

    Task files are code: ``!function`` in their YAML imports Python from their folder. Those of the installed lm-eval
    are used by name; others only from ``include_path``, a folder that the caller trusts. A path among ``tasks`` is
    refused. Tasks that run what the model writes (``humaneval``) are refused by lm-eval.

    lm-eval seeds the random generators of Python, numpy and torch.

    Args:
        model: a language model, on its device.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags, or patterns with ``*``.
        limit: number of examples of each task; None means all.
        num_fewshot: number of examples in the prompt; None means the task's own.
        include_path: a folder with more task files.
        batch_size: of requests.

    Returns ``{task: {metric: value}}`` with lm-eval's names: ``acc,none``, ``acc_stderr,none``.

    Raises ``OptimError`` if lm-eval is not installed, ``DataError`` for unknown tasks and tasks that cannot run (such
    as those whose data is not on this machine), ``ModelError`` for a model that is not a language model.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = list(tasks)
    if task_of_model(model).tag not in TASKS:
        raise ModelError(f"lm-eval runs language models, and {type(model).__name__} has no language modeling head")
    if tokenizer is None:
        raise DataError("lm-eval needs the model's tokenizer")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"{include_path} is not a folder with task files of lm-eval")
    try:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        chosen = _known_tasks(manager, tasks)
        with eval_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = simple_evaluate(
                model=wrapped,
                tasks=chosen,
                limit=limit,
                num_fewshot=num_fewshot,
                task_manager=manager,
                log_samples=False,
            )
    except (OptimError, MemoryError):
        raise
    except Exception as error:  # of its task files, their code, and the libraries that fetch data
        raise DataError(f"lm-eval cannot run {shown(tasks)}: {first_line(error, typed=True)}") from error
    return {task: dict(metrics) for task, metrics in results["results"].items()}


def task_rows(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return a row ``(label, text)`` for each metric of ``lm_eval_tasks``: ``("arc_easy acc", "0.5200 ± 0.0112")``."""
    rows = []
    for task, metrics in found.items():
        for key, value in metrics.items():
            metric, comma, filter_name = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            rows.append((f"{task} {name}", f"{value:.4f}" + (f" ± {error:.4f}" if is_number(error) else "")))
    return rows


def _known_tasks(manager: Any, tasks: Iterable[str]) -> list[str]:
    """Return the names that lm-eval knows; a name that is a path would run the code beside that file."""
    chosen: dict[str, None] = {}
    for name in tasks:
        matched = manager.match_tasks([name])
        if not matched:
            raise DataError(
                f"lm-eval has no task {shown(name)}{did_you_mean(name, manager.all_tasks)} (task files of your own are "
                "found in the folder of --include-path, include_path=)"
            )
        chosen |= dict.fromkeys(matched)
    if not chosen:
        raise DataError("no task of lm-eval is named")
    return list(chosen)

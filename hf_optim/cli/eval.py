"""``hf-optim eval``: Evaluate a checkpoint on data, with the metrics of its task.

Perplexity for language models, accuracy for classifiers, and for sentence encoders the Spearman correlation with the
column `score`; for all models peak memory and time: milliseconds per token for models that generate text, else per
example, as the median of several rounds ± half their interquartile range. Times of two models can only be compared if
they were measured in turn, as `hf-optim compare` and `hf-optim compress --eval` do. --tasks runs tasks of lm-eval, if
it is installed. --json has the keys of the record, unrounded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..evaluation.comparison import measurement_rows
from ..trust.bounds import shown
from .options import add_data_options, add_model_options, data_config_from_args, positive_int, source_from_args
from .table import print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..checkpoints.source import ModelSource
    from ..recipes.config import DataConfig

EXAMPLE = "hf-optim eval llama-w4a16 --data eval.jsonl"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument("--data", metavar="DATA", help="evaluation data (needed without --tasks)")
    parser.add_argument(
        "--tokenizer",
        metavar="TOKENIZER",
        help="a Hub id or a folder with the tokenizer or image processor (default: the model's own)",
    )
    parser.add_argument("--auto", action="store_true", help="run a compressed checkpoint on hf_optim's kernels")
    parser.add_argument("--no-time", action="store_true", help="measure no time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_task_options(parser)
    add_data_options(parser, "default: all")
    add_model_options(parser)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for tasks of lm-eval."""
    group = parser.add_argument_group("tasks", "Tasks of EleutherAI's lm-eval: pip install 'hf-optim[lm-eval]'.")
    group.add_argument("--tasks", metavar="NAMES", help="names of tasks, separated by commas: arc_easy,hellaswag")
    group.add_argument("--limit", type=positive_int, metavar="N", help="examples of each task (default: all)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    group.add_argument(
        "--include-path", metavar="DIR", help="a folder with more task files; they can run code, so name one you trust"
    )


def run(args: argparse.Namespace) -> int:
    if args.data is None and args.tasks is None:
        raise DataError("nothing to evaluate on: pass --data DATA, or --tasks NAMES of lm-eval")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise DataError(f"--num-fewshot is a number >= 0, not {args.num_fewshot}")
    measured = measure(args, data_config_from_args(args, args.data))
    if args.json:
        print(json.dumps(measured))
        return 0
    from ..evaluation.harness import task_rows

    rows = measurement_rows({key: value for key, value in measured.items() if key != "tasks"})
    print_table(("metric", "value"), [*task_rows(measured.get("tasks", {})), *rows])
    return 0


def _processor(args: argparse.Namespace, source: ModelSource, cls: type[PreTrainedModel]) -> Any:
    """Return the tokenizer or image processor that the options name, or the model's own; None if it has none."""
    import dataclasses

    from ..checkpoints.source import load_processor

    if args.tokenizer is None:
        return load_processor(source, cls)
    found = load_processor(dataclasses.replace(source, model=args.tokenizer, revision=None), cls)
    if found is None:
        kind = "image processor" if cls.main_input_name == "pixel_values" else "tokenizer"
        raise DataError(f"--tokenizer {shown(args.tokenizer)}: there is no {kind} that transformers can load")
    return found


def measure(args: argparse.Namespace, data: DataConfig) -> dict[str, Any]:
    """Load a checkpoint like stock transformers (with ``--auto``, on hf_optim's kernels), and return its metrics."""
    import torch

    from ..checkpoints.source import load_model, resolve_device
    from ..data.datasets import require_readable
    from ..evaluation.evaluate import evaluate
    from ..evaluation.harness import lm_eval_tasks, require_lm_eval
    from ..runs.memory import PeakMemory
    from .jobs.timed_models import load_on_kernels

    if args.tasks is not None:
        require_lm_eval()
    require_readable(data)
    source = source_from_args(args)
    device = resolve_device(args.device) or torch.device("cpu")
    measured: dict[str, Any] = {}
    with PeakMemory(device) as memory:
        model = load_on_kernels(source, device) if args.auto else load_model(source).to(device)
        processor = _processor(args, source, type(model))
        if data.dataset is not None:
            measured |= evaluate(model, processor, data, speed=not args.no_time)
        if args.tasks is not None:
            names = [name.strip() for name in args.tasks.split(",") if name.strip()]
            measured["tasks"] = lm_eval_tasks(
                model,
                processor,
                names,
                limit=args.limit,
                num_fewshot=args.num_fewshot,
                include_path=args.include_path,
            )
    return {**measured, **memory.metrics()}

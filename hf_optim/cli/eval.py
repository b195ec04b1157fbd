"""``hf-optim eval``: Evaluate a checkpoint on data, with the metrics of its task.

Perplexity for language models, accuracy for classifiers, and for sentence encoders the Spearman correlation with the
column `score`; for all models peak memory and time: milliseconds per token for models that generate text, else per
example, as the median of several rounds ± half their interquartile range. Times of two models can only be compared if
they were measured in turn, as `hf-optim compress --eval` does. --json has the keys of the record, unrounded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..evaluation.comparison import measurement_rows
from .options import add_data_options, add_model_options, data_config_from_args, source_from_args
from .table import print_table

if TYPE_CHECKING:
    from ..recipes.config import DataConfig

EXAMPLE = "hf-optim eval llama-w4a16 --data eval.jsonl"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help="evaluation data")
    parser.add_argument("--auto", action="store_true", help="run a compressed checkpoint on hf_optim's kernels")
    parser.add_argument("--no-time", action="store_true", help="measure no time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_data_options(parser, "default: all")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    measured = measure(args, data_config_from_args(args, args.data))
    if args.json:
        print(json.dumps(measured))
        return 0
    print_table(("metric", "value"), measurement_rows(measured))
    return 0


def measure(args: argparse.Namespace, data: DataConfig) -> dict[str, Any]:
    """Load a checkpoint like stock transformers (with ``--auto``, on hf_optim's kernels), and return its metrics."""
    import torch

    from ..checkpoints.source import load_model, load_processor, resolve_device
    from ..data.datasets import require_readable
    from ..evaluation.evaluate import evaluate
    from ..runs.memory import PeakMemory
    from .jobs.timed_models import load_on_kernels

    source = source_from_args(args)
    require_readable(data)
    device = resolve_device(args.device) or torch.device("cpu")
    with PeakMemory(device) as memory:
        model = load_on_kernels(source, device) if args.auto else load_model(source).to(device)
        measured = evaluate(model, load_processor(source, type(model)), data, speed=not args.no_time)
    return {**measured, **memory.metrics()}

"""``hf-optim eval``: Evaluate a checkpoint on data, with the metrics of its task.

Perplexity for language models, accuracy for classifiers, and for sentence encoders the Spearman correlation with the
column `score`; for all models peak memory, and for models that generate also milliseconds per token."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..evaluation.reported import REPORTED_METRICS
from .options import add_data_options, add_model_options, data_config_from_args, source_from_args
from .table import print_table

if TYPE_CHECKING:
    from ..recipes.config import DataConfig

EXAMPLE = "hf-optim eval llama-w4a16 --data eval.jsonl"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help="evaluation data")
    parser.add_argument("--auto", action="store_true", help="run a compressed checkpoint on hf_optim's kernels")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_data_options(parser, "default: all")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    measured = measure(args, data_config_from_args(args, args.data))
    if args.json:
        print(json.dumps(measured))
        return 0
    known = {metric.key: metric for metric in REPORTED_METRICS}
    rows = [
        (known[key].label, known[key].format(value)) if key in known and value is not None else (key, value)
        for key, value in measured.items()
    ]
    print_table(("metric", "value"), rows)
    return 0


def measure(args: argparse.Namespace, data: DataConfig) -> dict[str, Any]:
    """Load a checkpoint like stock transformers (with ``--auto``, on hf_optim's kernels), and return its metrics."""
    import torch

    from ..checkpoints.source import load_model, load_processor, resolve_device
    from ..compressed.packed.accelerate import accelerate
    from ..data.datasets import require_readable
    from ..evaluation.evaluate import evaluate
    from ..runs.memory import PeakMemory

    source = source_from_args(args)
    require_readable(data)
    device = resolve_device(args.device) or torch.device("cpu")
    with PeakMemory(device) as memory:
        model = load_model(source).to(device)
        if args.auto:
            accelerate(model)
        measured = evaluate(model, load_processor(source, type(model)), data)
    return {**measured, **memory.metrics()}

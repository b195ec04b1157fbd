"""``hf-optim eval``: Measure a checkpoint on data, by what the model is for.

Language models give their perplexity, classifiers their accuracy, sentence encoders the Spearman correlation with the
column `score`; all give their peak memory, and models that generate their milliseconds per token."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..evaluation.reported import REPORTED_METRICS
from .options import data_config, data_options, model_options, source_of
from .table import print_table

if TYPE_CHECKING:
    from ..recipes.config import DataConfig

EXAMPLE = "hf-optim eval llama-w4a16 --data eval.jsonl"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help="data to measure on")
    parser.add_argument("--auto", action="store_true", help="run a compressed checkpoint on hf_optim's kernels")
    parser.add_argument("--json", action="store_true", help="print JSON")
    data_options(parser, "default: all")
    model_options(parser)


def run(args: argparse.Namespace) -> int:
    measured = measure(args, data_config(args, args.data))
    if args.json:
        print(json.dumps(measured))
        return 0
    known = {metric.key: metric for metric in REPORTED_METRICS}
    rows = [
        (known[key].label, known[key].format(value)) if key in known and value is not None else (key, value)
        for key, value in measured.items()
    ]
    print_table(("measure", "value"), rows)
    return 0


def measure(args: argparse.Namespace, data: DataConfig) -> dict[str, Any]:
    """Load the checkpoint as stock transformers does (or, with ``--auto``, on our kernels) and measure it."""
    import torch

    from ..checkpoints.source import load_model, load_processor, resolve_device
    from ..compressed.packed.accelerate import accelerate
    from ..evaluation.evaluate import evaluate
    from ..runs.memory import PeakMemory

    source = source_of(args)
    device = resolve_device(args.device) or torch.device("cpu")
    with PeakMemory(device) as memory:
        model = load_model(source).to(device)
        if args.auto:
            accelerate(model)
        measured = evaluate(model, load_processor(source, type(model)), data)
    return {**measured, **memory.metrics()}

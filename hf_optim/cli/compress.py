"""``hf-optim compress``: Run a recipe on a model, and write the checkpoint, its record (hf_optim.json) and model card.

With --eval, the model is evaluated before and after, and the card shows both: quality, agreement, bytes, peak memory,
and times that are measured on original and result in turn, also on hf_optim's kernels if they run it. Problems that
can be detected without reading weights are reported before any weights are read. --resume continues a run that was
killed, with bit-exact results. Under `torchrun -m hf_optim.cli compress` (or accelerate launch), the ranks share the
calibration data."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..evaluation.comparison import TERMINAL_TITLES, column_titles, comparison_notes, comparison_rows
from ..evaluation.reported import format_coverage, recipe_trains
from ..runs.record import Record
from .options import (
    add_data_options,
    add_driver_options,
    add_model_options,
    positive_int,
    recipe_from_args,
    source_from_args,
    training_from_args,
)
from .table import print_json, print_line, print_table, result_alone

EXAMPLE = """hf-optim compress meta-llama/Llama-3.2-1B --recipe w4a16 --output llama-w4a16 \\
    --calibration Salesforce/wikitext:wikitext-2-raw-v1 --eval eval.jsonl"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="R",
        help="a YAML or JSON file, or the name of a shipped recipe, a technique or a scheme",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="D",
        help="the directory to write; replaced atomically at the end, other files in it are kept",
    )
    parser.add_argument("--calibration", metavar="DATA", help="calibration data (default: the dataset in the recipe)")
    parser.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="the calibration data holds conversations (a column messages or conversations, or --text-column): render "
        "them by the model's chat template",
    )
    parser.add_argument("--train", metavar="DATA", help="training data (default: the calibration data)")
    parser.add_argument("--eval", metavar="DATA", help="evaluation data; the model is evaluated before and after")
    parser.add_argument(
        "--control",
        metavar="MODEL",
        help="with --eval, also evaluate this model and show it beside the result: for recipes that train, a dense "
        "model that was trained alike. `train` trains it here, from the original on the same data with the recipe's "
        "`training` section and no technique, which costs as much again as the training of the recipe",
    )
    parser.add_argument("--dense", action="store_true", help="write dequantized weights, not a compressed format")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue a run that was killed, from its last completed block or training checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print the measured metrics and the coverage as JSON")
    add_driver_options(parser)
    add_data_options(parser, "default: 128 for calibration, all with --train; for --eval see --eval-samples")
    parser.add_argument(
        "--eval-samples",
        type=positive_int,
        metavar="N",
        help="number of sequences or examples for evaluation (default: all of the data)",
    )
    parser.add_argument("--eval-split", metavar="NAME", help="split of a Hub dataset for evaluation (default: --split)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..recipes.config import DataConfig, OptimConfig
    from ..runs import distributed
    from .jobs.compress import Job, compress

    if args.eval_samples and not args.eval:
        raise RecipeError("--eval-samples is for the data of --eval: give that too, or leave out --eval-samples")
    if args.control and not args.eval:
        raise RecipeError("--control is evaluated on the data of --eval: give that too, or leave out --control")
    recipe = recipe_from_args(args, OptimConfig.parse(args.recipe))
    evaluation = DataConfig(
        dataset=args.eval,
        split=args.eval_split or args.split or "train",
        text_column=args.text_column,
        samples=args.eval_samples,
        seq_len=args.seq_len,
    )
    with result_alone(args.quiet), distributed.joined(), without_coverage_log(), _resumable(args.output):
        done = compress(
            Job(
                source=source_from_args(args),
                recipe=recipe,
                output=args.output,
                evaluation=evaluation if args.eval else None,
                training=training_from_args(args, recipe.calibration),
                control=args.control,
                dense=args.dense,
                resume=args.resume,
                device=args.device,
            )
        )
        if not distributed.is_main():
            return 0
    if args.json:
        print_json(result_of(done.record, args.output))
    else:
        print_result(done.record)
    return 0


@contextlib.contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Say how to continue if the body is interrupted after a part of the work was kept."""
    from .jobs.compress import has_kept_work

    try:
        yield
    except KeyboardInterrupt:
        if has_kept_work(output):
            print("hf-optim: the finished part is kept: the same command with --resume continues", file=sys.stderr)
        raise


def result_of(record: Record, output: Path) -> dict[str, Any]:
    """Return what ``--json`` prints: ``output``, and ``measured`` and ``coverage`` as in hf_optim.json."""
    return {"output": str(output), "measured": record.measured, "coverage": record.coverage}


def print_result(record: Record) -> None:
    """Print the metrics before and after, how they were measured, and the share of the weights that each step changed.

    These shares are in the log, too: a command that prints them here runs in ``without_coverage_log``.
    """
    if sys.stdout.isatty():
        print()  # between the notes and the result
    measured, trained = record.measured, recipe_trains(record.recipe)
    print_table(column_titles(measured, TERMINAL_TITLES), comparison_rows(measured, trained))
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    for note in comparison_notes(measured, trained):
        for line in textwrap.wrap(f"- {note}.", width, subsequent_indent="  "):
            print_line(line)
    print()
    for step, coverage in record.coverage.items():
        changed = format_coverage(coverage["weights_touched"], coverage["weights_total"], coverage["share"])
        print_line(f"{step} changed {changed}")
        for reason, names in coverage["skipped"].items():
            print_line(f"  skipped {len(names)}: {reason} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})")


@contextlib.contextmanager
def without_coverage_log() -> Iterator[None]:
    """Keep the coverage of steps out of the log, for a command that prints it with its result."""
    logger = logging.getLogger("hf_optim.runs.coverage")
    logger.addFilter(_refuse)
    try:
        yield
    finally:
        logger.removeFilter(_refuse)


def _refuse(message: logging.LogRecord) -> bool:
    return False

"""``hf-optim compress``: Run a recipe on a model; write the checkpoint, its record (hf_optim.json) and its card.

With --eval the model is measured before and after, and both stand on the card. Everything that can be refused is
refused before the weights are read. A run that was killed goes on with --resume, and ends with the same bits.
Under `torchrun -m hf_optim.cli compress` (or accelerate launch) the ranks share the calibration data."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..evaluation.reported import comparison_rows
from ..runs.record import Record
from .options import data_config, data_options, driver_of, driver_options, model_options, source_of
from .table import print_table

EXAMPLE = """hf-optim compress meta-llama/Llama-3.2-1B --recipe w4a16 --output llama-w4a16 \\
    --calibration Salesforce/wikitext:wikitext-2-raw-v1 --eval eval.jsonl"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hub id or the directory of a checkpoint")
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML or JSON file, or the name of a shipped recipe or technique"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="D",
        help="the directory to write; replaced at once when all is done",
    )
    parser.add_argument("--calibration", metavar="DATA", help="data to calibrate on (default: what the recipe names)")
    parser.add_argument("--train", metavar="DATA", help="data for steps that train (default: the calibration data)")
    parser.add_argument("--eval", metavar="DATA", help="data to measure on, before and after")
    parser.add_argument("--dense", action="store_true", help="write the dense equivalent of a compressed format")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was killed, from its last block or training checkpoint",
    )
    driver_options(parser)
    data_options(parser, "default: 128 to calibrate, all to train with --train, all to measure")
    parser.add_argument("--eval-split", metavar="NAME", help="split of a Hub dataset to measure on (default: --split)")
    model_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..recipes.config import DataConfig, OptimConfig
    from ..runs import distributed
    from .jobs.compress import Job, compress

    recipe = OptimConfig.parse(args.recipe)
    calibration = data_config(args, args.calibration, base=recipe.calibration)
    recipe = dataclasses.replace(recipe, calibration=calibration, **driver_of(args, recipe))
    evaluation = DataConfig(
        dataset=args.eval,
        split=args.eval_split or args.split or "train",
        text_column=args.text_column,
        samples=None,
        seq_len=args.seq_len,
    )
    training = dataclasses.replace(calibration, dataset=args.train, samples=args.samples) if args.train else None
    with distributed.joined():
        done = compress(
            Job(
                source=source_of(args),
                recipe=recipe,
                output=args.output,
                evaluation=evaluation if args.eval else None,
                training=training,
                dense=args.dense,
                resume=args.resume,
                device=args.device,
                say=print,
            )
        )
        if not distributed.is_main():
            return 0
    print()
    print_result(done.record)
    return 0


def print_result(record: Record) -> None:
    """The table before against after, of what was measured; below it what share of the weights each step touched."""
    before, after = record.measured.get("before", {}), record.measured.get("after", {})
    print_table(("measure", "before", "after", "change"), comparison_rows(before, after))
    print()
    for step, coverage in record.coverage.items():
        total, touched = coverage["weights_total"], coverage["weights_touched"]
        print(f"{step} changed {touched:,} of {total:,} weights ({coverage['share']:.1%})")
        for reason, names in coverage["skipped"].items():
            print(f"  left out {len(names)}: {reason} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})")

"""``hf-optim demo``: Run the whole workflow on the model bundled with hf_optim, on a CPU, in about a minute.

Compress it to 4 bits, evaluate it before and after, write the checkpoint with its record and model card, and reload it
with stock transformers."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from .compress import print_result, result_of, without_coverage_log
from .table import print_json, result_alone

NOTE = (
    "The demo runs in float32 on a CPU, where hf_optim keeps decoded weights: what 4 bits save here are bytes on disk. "
    "Less memory and time per token need bfloat16 or float16 on a device with kernels; docs/kernels.md has measured "
    "times."
)
EXAMPLE = "hf-optim demo --output demo-w4a16"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-w4a16"),
        metavar="D",
        help="directory to write (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the measured metrics and the coverage as JSON")


def run(args: argparse.Namespace) -> int:
    from .jobs.demo import demo

    with result_alone(args.quiet), without_coverage_log():
        record = demo(args.output)
    if args.json:
        print_json(result_of(record, args.output))
        return 0
    print_result(record)
    print()
    for line in textwrap.wrap(NOTE, 120):
        print(line)
    print(f"\nThe checkpoint, its record (hf_optim.json) and its model card are in {args.output}")
    return 0

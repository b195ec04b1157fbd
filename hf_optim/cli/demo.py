"""``hf-optim demo``: Do the whole job on the model that comes with hf_optim: compress it to 4 bits, measure it before
and after, write checkpoint, record and card, and reload it with stock transformers. On a CPU, in about a minute."""

from __future__ import annotations

import argparse
from pathlib import Path

from .compress import print_result

EXAMPLE = "hf-optim demo --output demo-w4a16"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("demo-w4a16"), metavar="D", help="where to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from .jobs.demo import demo

    record = demo(args.output)
    print()
    print_result(record)
    print(f"\ncheckpoint, hf_optim.json and the model card with its plots: {args.output}")
    return 0

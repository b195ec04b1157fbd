"""``hf-optim card``: Render the model card (README.md, with its plots) of a checkpoint again from hf_optim.json.

For a folder of checkpoints or cards, render the index that compares them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import CheckpointError

EXAMPLE = "hf-optim card llama-w4a16"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="D", help="a checkpoint with hf_optim.json, or a folder of checkpoints or cards"
    )


def run(args: argparse.Namespace) -> int:
    from ..evaluation.cards.card import Card
    from ..evaluation.cards.index import render_index
    from ..runs.record import FILE_NAME, Record

    home = args.directory
    if os.path.lexists(home / FILE_NAME):
        print(Card(Record.read(home), home).write(home))
    elif os.path.isdir(home) and any(home.glob(f"*/{FILE_NAME}")):
        render_index(home)
        print(home / "README.md")
    else:
        raise CheckpointError(f"{home} has no {FILE_NAME}, and neither has any folder in it")
    return 0

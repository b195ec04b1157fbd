"""``hf-optim card``: Render the model card (README.md, with its plots) of a checkpoint again from hf_optim.json.

For a folder of checkpoints or cards, render the index that compares them: index.html, a page to filter and sort in a
browser, without a server or outside requests, and README.md, the same table with its plots."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import CheckpointError
from .table import print_json

EXAMPLE = """\
hf-optim card llama-w4a16
hf-optim card checkpoints    # index.html and README.md of all in this folder"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="D", help="a checkpoint with hf_optim.json, or a folder of checkpoints or cards"
    )
    parser.add_argument(
        "--control",
        type=Path,
        metavar="DIR",
        help="a checkpoint with hf_optim.json that was evaluated on the same data, to show beside this one: for "
        "recipes that train, a dense model that was trained alike",
    )
    parser.add_argument("--json", action="store_true", help="print the written files as JSON")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.cards.card import Card
    from ..evaluation.cards.index import PAGE, README, render_index
    from ..runs.record import FILE_NAME, Record

    home = args.directory
    if os.path.lexists(home / FILE_NAME):
        if args.control is not None:
            add_control(home, args.control)
        written = [Card(Record.read(home), home).write(home)]
    elif args.control is not None:
        raise CheckpointError(f"{home} has no {FILE_NAME}: --control is for the card of one checkpoint")
    elif os.path.isdir(home) and any(home.glob(f"*/{FILE_NAME}")):
        render_index(home)
        written = [home / README, home / PAGE]
    else:
        raise CheckpointError(f"{home} has no {FILE_NAME}, and neither has any folder in it")
    if args.json:
        print_json({"written": [str(path) for path in written]})
    else:
        print(*written, sep="\n")
    return 0


def add_control(home: Path, control: Path) -> None:
    """Write the figures of another checkpoint into the record of the one in ``home``, as its control.

    Raises ``CheckpointError`` if the two were not evaluated on the same data.
    """
    from ..evaluation.cards.card import write_page
    from ..evaluation.reported import has_hub_metrics
    from ..evaluation.timings import SPREAD
    from ..runs.record import FILE_NAME, Record, public_name

    record, other = Record.read(home), Record.read(control)
    data, same = other.measured.get("evaluation"), record.measured.get("evaluation")
    if not data or not has_hub_metrics(other.measured.get("after", {})):
        raise CheckpointError(f"{control} was not evaluated: make it with `hf-optim compress --eval`, on the same data")
    if data != same:
        differing = sorted(key for key in {**data, **(same or {})} if data.get(key) != (same or {}).get(key))
        raise CheckpointError(
            f"{control} and {home} were evaluated on different data (they differ in {', '.join(differing)}): evaluate "
            "the control as the checkpoint was evaluated"
        )
    # Times of two runs cannot be compared: those of one table are measured in turn.
    left = {"top1_agreement", "kl", "time_rounds", *SPREAD, *SPREAD.values()}
    figures = {key: value for key, value in other.measured["after"].items() if key not in left}
    record.measured["control"] = {**figures, "name": public_name(control)}
    write_page(home / FILE_NAME, record.to_json())

"""``hf-optim push``: Upload a finished checkpoint, with its record and its model card, to the Hub.

The token comes from `hf auth login` or HF_TOKEN. The repository is created if it does not exist."""

from __future__ import annotations

import argparse
from pathlib import Path

from .table import print_json

EXAMPLE = "hf-optim push llama-w4a16 me/llama-w4a16"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="D", help="a checkpoint written by `hf-optim compress`")
    parser.add_argument("repo", metavar="REPO", help="the repository on the Hub: owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to, created if it does not exist (default: main)"
    )
    parser.add_argument("--json", action="store_true", help="print the address of the commit as JSON")
    parser.add_argument(
        "--message", metavar="TEXT", default="Upload with hf-optim", help="commit message (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from ..checkpoints.hub import push

    url = push(args.directory, args.repo, private=args.private, revision=args.revision, message=args.message)
    if args.json:
        print_json({"url": url})
    else:
        print(url)
    return 0

"""``hf-optim serving``: Say which of vLLM, SGLang and TGI read a checkpoint, and why the others do not.

The configuration and the headers of the weights are held against the schema of compressed-tensors and against rules
that were written from reading the loaders of the servers. Nothing is loaded, and no server is needed."""

from __future__ import annotations

import argparse
import dataclasses

from .table import print_json, print_line, print_table

EXAMPLE = "hf-optim serving llama-w4a16"
SERVERS = ("vllm", "sglang", "tgi")
ANSWERS = {True: "yes", False: "no", None: "not known"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="the directory of a checkpoint, or a Hub id (configuration only)"
    )
    parser.add_argument("--server", choices=SERVERS, help="judge this one; exit status 1 if it does not read the model")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from ..checkpoints.serving import check_serving

    report = check_serving(args.model, args.revision)
    verdicts = [each for each in report.verdicts if args.server in (None, each.server.lower())]
    if args.json:
        print_json({**dataclasses.asdict(report), "verdicts": [dataclasses.asdict(v) for v in verdicts]})
    else:
        for scheme in report.schemes or ("dense weights",):
            print_line(scheme)
        rows = [
            (f"{v.server} {v.version}", ANSWERS[v.reads], line)
            for v in verdicts
            for line in [*v.reasons, *(f"note: {note}" for note in v.notes)] or [v.command]
        ]
        print_table(("server", "reads it", "why"), _without_repeats(rows))
        print_line(f"Not checked: whether the server has {report.architecture}. {report.basis}")
    return 1 if args.server is not None and verdicts[0].reads is False else 0


def _without_repeats(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Leave the server and its answer out of rows that continue those of the same server."""
    return [
        ("", "", line) if at and rows[at - 1][0] == server else (server, answer, line)
        for at, (server, answer, line) in enumerate(rows)
    ]

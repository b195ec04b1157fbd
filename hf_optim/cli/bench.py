"""``hf-optim bench``: Benchmark the kernels against the dense product and other libraries, or benchmark a whole model.

Writes a table, JSON and a roofline plot. Without a GPU, the operators with a CPU implementation are timed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptimError
from ..runs.disk_errors import readable_disk_errors
from ..trust.bounds import shown
from .options import positive_int
from .table import print_json, print_table

if TYPE_CHECKING:
    from ..evaluation.bench.environment import Deadline
    from ..evaluation.bench.results import Results

EXAMPLE = """\
hf-optim bench --op wna16 --peers --output bench
hf-optim bench --end-to-end llama-3-8b --scheme dense w4a16"""
DEFAULT_MODEL = "llama-3-8b"

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", metavar="OP", help="operators to time (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list operators and peers (other libraries), and exit")
    parser.add_argument("--peers", action="store_true", help="also time the peers that are installed")
    parser.add_argument(
        "--shape", action="append", type=_shape, metavar="OUTxIN", help="shape of a layer; may be repeated"
    )
    parser.add_argument("--rows", nargs="+", type=positive_int, metavar="M", help="rows of the input (batch x tokens)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of inputs and outputs"
    )
    parser.add_argument("--quick", action="store_true", help="one layer shape and few row counts")
    parser.add_argument("--tune", action="store_true", help="find the fastest tiles first, and cache them")
    whole = parser.add_argument_group("a whole model", "Random weights, stock `generate`, greedy decoding.")
    whole.add_argument(
        "--end-to-end",
        nargs="?",
        const=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"time `generate` instead: of a preset ({DEFAULT_MODEL}, tiny), or of the architecture of a Hub model",
    )
    whole.add_argument("--scheme", nargs="+", metavar="NAME", help="dense, w4a16, w8a8, 2:4, 2:4-w4a16 (default: all)")
    whole.add_argument(
        "--cache",
        nargs="+",
        choices=("dynamic", "static", "unguarded", "graph"),
        help="kinds of KV cache (default: all that the device has); static and unguarded are compiled on a GPU, "
        "unguarded with compile_config(), graph is hf_optim.generate",
    )
    whole.add_argument(
        "--batch", nargs="+", type=positive_int, default=[1], metavar="N", help="batch size (default: 1)"
    )
    whole.add_argument("--new-tokens", type=_new_tokens, default=64, metavar="N", help="new tokens (default: 64)")
    whole.add_argument(
        "--prefill", nargs="+", type=positive_int, default=[], metavar="N", help="also time prompts of this many tokens"
    )
    whole.add_argument("--profile", action="store_true", help="also report how busy the GPU is in a decoding step")
    out = parser.add_argument_group("results")
    out.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no new measurement after this time")
    out.add_argument("--output", type=Path, metavar="DIR", help="write results.json, README.md and roofline.png")
    out.add_argument("--append", action="store_true", help="keep the rows of an earlier run on this device in DIR")
    out.add_argument("--render", type=Path, metavar="DIR", help="render the page of an existing results.json again")
    out.add_argument(
        "--json", action="store_true", help="print the results (with --list, the operators and peers) as JSON"
    )


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bench import environment, table
    from ..evaluation.bench.results import Results

    if args.render is not None:
        loaded = Results.load(args.render)
        _print_written(table.publish(loaded, args.render))
        if args.json:
            print_json(loaded.to_json())
        return 0
    if args.list:
        return _list(args.json)
    _refuse(args)
    deadline = environment.Deadline.after(args.time_limit)
    results = environment.start_results(_command())
    earlier = _earlier(args.output) if args.append and args.output is not None else None

    def whole() -> Results:
        return results.merged_after(earlier) if earlier is not None else results

    def keep() -> None:
        # What was measured is there when the run is ended from outside.
        if args.output is not None:
            with readable_disk_errors(args.output, "the results"):
                whole().save(args.output)

    if args.end_to_end is not None:
        _run_model(args, results, deadline, keep)
    else:
        _run_ops(args, results, deadline, keep)
    results = whole()
    if args.output is not None:
        _print_written(table.publish(results, args.output))
    if args.json:
        print_json(results.to_json())
    elif args.output is None:
        print(table.render(results))
    ours = [row for row in results.rows if row.role == "ours"]
    if ours and all(row.failure for row in ours):
        raise OptimError(f"all {len(ours)} measurements failed, the first with: {ours[0].failure}")
    return 0


def _refuse(args: argparse.Namespace) -> None:
    """Raise ``OptimError`` for what is not there, before the first measurement, which takes seconds."""
    from ..evaluation.bench import environment, models
    from .jobs.preflight import require_writable

    known = environment.timing_tools().operations()
    for what, given, listed in (("operator", args.op, known), ("scheme", args.scheme, models.SCHEMES)):
        unknown = sorted(set(given or ()) - set(listed))
        if unknown:
            raise OptimError(f"no {what} {', '.join(map(shown, unknown))}; available: {', '.join(listed)}")
    if args.time_limit is not None and not args.time_limit >= 0:
        raise OptimError(f"--time-limit must be a number of seconds, not {args.time_limit}")
    if args.end_to_end is not None:
        models.resolve_config(args.end_to_end)
    if args.output is not None:
        if os.path.exists(args.output) and not os.path.isdir(args.output):
            raise OptimError(f"{args.output} is a file, not a directory")
        require_writable(args.output)
        if args.append:
            _earlier(args.output)


def _run_ops(args: argparse.Namespace, results: Results, deadline: Deadline, keep: Callable[[], None]) -> None:
    import torch

    from ..evaluation.bench import environment, op_runner

    ops = args.op or environment.timing_tools().operations()
    cuda = torch.cuda.is_available()
    shapes = args.shape or (op_runner.QUICK_SHAPES if args.quick or not cuda else op_runner.SHAPES)
    rows = args.rows or (op_runner.QUICK_ROWS if args.quick else op_runner.ROWS if cuda else op_runner.CPU_ROWS)
    dtype = getattr(torch, args.dtype)
    if args.tune:
        op_runner.tune_ops(results, ops, shapes, rows, dtype, deadline)
    op_runner.run_ops(results, ops, shapes, rows, dtype, args.peers, deadline, keep)


def _run_model(args: argparse.Namespace, results: Results, deadline: Deadline, keep: Callable[[], None]) -> None:
    import torch

    from ..evaluation.bench import decode, models
    from ..evaluation.bench.model_runner import ModelBenchSettings, run_models

    modes = args.cache or (decode.MODES if torch.cuda.is_available() else decode.CPU_MODES)
    settings = ModelBenchSettings(modes, args.batch, args.new_tokens, args.prefill, args.profile)
    schemes = args.scheme or models.SCHEMES
    run_models(results, args.end_to_end, schemes, settings, getattr(torch, args.dtype), deadline, keep)


def _list(as_json: bool) -> int:
    from ..evaluation.bench import environment, peers

    operators = environment.timing_tools().operations()
    if as_json:
        found = [{"name": p.name, "missing": p.missing() or None, "operators": list(p.ops)} for p in peers.PEERS]
        print_json({"operators": list(operators), "peers": found})
        return 0
    installed = [(p.name, p.missing() or "installed", ", ".join(p.ops) or "all") for p in peers.PEERS]
    print_table(("operator",), [(op,) for op in operators])
    print()
    print_table(("peer", "", "compared with"), installed)
    return 0


def _earlier(directory: Path) -> Results | None:
    """Return the results that a folder has; None without."""
    from ..evaluation.bench.results import FILE, Results

    return Results.load(directory) if os.path.lexists(directory / FILE) else None


def _print_written(paths: list[Path]) -> None:
    log.info("wrote %s", ", ".join(map(str, paths)))


def _command() -> str:
    """Return the command line without the directories of this machine, since results are published."""
    return " ".join(["hf-optim", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, such as 14336x4096")
    return int(parts[0]), int(parts[1])


def _new_tokens(text: str) -> int:
    if positive_int(text) < 4:
        raise argparse.ArgumentTypeError("fewer than 4 tokens do not show steady decoding")
    return int(text)

"""``hf-optim bench``: Time the kernels beside the dense product and the peers that are installed; or a whole model.

Writes a table, JSON and a roofline plot. Without a GPU, the operators that a CPU has are timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import OptimError
from .table import print_table

EXAMPLE = """\
hf-optim bench --op wna16 --peers --output bench
hf-optim bench --end-to-end llama-3-8b --scheme dense w4a16"""
DEFAULT_MODEL = "llama-3-8b"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", metavar="OP", help="these operators (default: all; --list names them)")
    parser.add_argument("--list", action="store_true", help="name the operators and the peers, and stop")
    parser.add_argument("--peers", action="store_true", help="time the peers that are installed, too")
    parser.add_argument(
        "--shape", action="append", type=_shape, metavar="OUTxIN", help="a layer; may stand several times"
    )
    parser.add_argument("--rows", nargs="+", type=_positive, metavar="M", help="rows of the input")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of inputs and outputs")
    parser.add_argument("--quick", action="store_true", help="one layer and few rows")
    parser.add_argument("--tune", action="store_true", help="first find the fastest tiles, and keep them in the cache")
    whole = parser.add_argument_group("a whole model", "random weights, stock `generate`, greedy")
    whole.add_argument(
        "--end-to-end",
        nargs="?",
        const=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"instead: time `generate` of a shape ({DEFAULT_MODEL}, tiny), or of the architecture of a Hub model",
    )
    whole.add_argument("--scheme", nargs="+", metavar="NAME", help="dense, w4a16, w8a8, 2:4, 2:4-w4a16 (default: all)")
    whole.add_argument(
        "--cache",
        nargs="+",
        choices=("dynamic", "static", "unguarded"),
        help="default: all; static is compiled, unguarded too, with hf_optim.compile_config()",
    )
    whole.add_argument("--batch", nargs="+", type=_positive, default=[1], metavar="N", help="default: 1")
    whole.add_argument("--new-tokens", type=_steps, default=64, metavar="N", help="default: 64")
    whole.add_argument(
        "--prefill", nargs="+", type=_positive, default=[], metavar="N", help="also time prompts of so many tokens"
    )
    whole.add_argument("--profile", action="store_true", help="also tell how much of a step the GPU computes")
    out = parser.add_argument_group("results")
    out.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing new after so long")
    out.add_argument("--output", type=Path, metavar="DIR", help="write results.json, README.md and roofline.png")
    out.add_argument("--append", action="store_true", help="keep the rows of an earlier run on this device in DIR")
    out.add_argument("--render", type=Path, metavar="DIR", help="write the page of an earlier results.json anew")
    out.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bench import environment, table
    from ..evaluation.bench.results import Results

    if args.render is not None:
        _say(table.publish(Results.load(args.render), args.render))
        return 0
    if args.list:
        return _list()
    deadline = environment.Deadline.after(args.time_limit)
    results = environment.start_results(_command())
    if args.end_to_end is not None:
        _run_model(args, results, deadline)
    else:
        _run_ops(args, results, deadline)
    if args.append and args.output is not None:
        results = _joined(results, args.output)
    if args.output is not None:
        _say(table.publish(results, args.output))
    if args.json:
        print(json.dumps(results.to_json(), indent=1))
    elif args.output is None:
        print(table.render(results))
    return 0


def _run_ops(args: argparse.Namespace, results: Any, deadline: Any) -> None:
    import torch

    from ..evaluation.bench import environment, op_runner

    known = environment.timing_tools().operations()
    ops = args.op or known
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise OptimError(f"no operator {', '.join(unknown)}; there are {', '.join(known)}")
    cuda = torch.cuda.is_available()
    shapes = args.shape or (op_runner.QUICK_SHAPES if args.quick or not cuda else op_runner.SHAPES)
    rows = args.rows or (op_runner.QUICK_ROWS if args.quick else op_runner.ROWS if cuda else op_runner.CPU_ROWS)
    dtype = getattr(torch, args.dtype)
    if args.tune:
        op_runner.tune_ops(results, ops, shapes, rows, dtype, deadline)
    op_runner.run_ops(results, ops, shapes, rows, dtype, args.peers, deadline)


def _run_model(args: argparse.Namespace, results: Any, deadline: Any) -> None:
    import torch

    from ..evaluation.bench import decode, models
    from ..evaluation.bench.model_runner import ModelBenchSettings, run_models

    unknown = sorted(set(args.scheme or ()) - set(models.SCHEMES))
    if unknown:
        raise OptimError(f"no scheme {', '.join(unknown)}; there are {', '.join(models.SCHEMES)}")
    settings = ModelBenchSettings(args.cache or decode.MODES, args.batch, args.new_tokens, args.prefill, args.profile)
    schemes = args.scheme or models.SCHEMES
    run_models(results, args.end_to_end, schemes, settings, getattr(torch, args.dtype), deadline)


def _list() -> int:
    from ..evaluation.bench import environment, peers

    installed = [(p.name, p.missing() or "installed", ", ".join(p.ops) or "all") for p in peers.PEERS]
    print_table(("operator",), [(op,) for op in environment.timing_tools().operations()])
    print()
    print_table(("peer", "", "compared with"), installed)
    return 0


def _joined(results: Any, directory: Path) -> Any:
    """Add the rows of earlier results that these do not replace."""
    from ..evaluation.bench.results import FILE, Results

    if not (directory / FILE).exists():
        return results
    return results.merged_after(Results.load(directory))


def _say(paths: list[Path]) -> None:
    print("wrote " + ", ".join(map(str, paths)), file=sys.stderr)


def _command() -> str:
    """As typed, without the folders of this machine, since results are published."""
    return " ".join(["hf-optim", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, as 14336x4096")
    return int(parts[0]), int(parts[1])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def _steps(text: str) -> int:
    if _positive(text) < 4:
        raise argparse.ArgumentTypeError("steady decoding cannot be seen in fewer than 4 tokens")
    return int(text)

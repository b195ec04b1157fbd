"""The command ``hf-optim`` (also ``python -m hf_optim.cli`` and ``optimum-cli optim``)."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..errors import OptimError

# Name -> help. Each command is a module of this package: ``EXAMPLE``, ``arguments(parser)``, and ``run(args) -> int``
# with heavy imports inside, so that `hf-optim list` does not wait for what `hf-optim compress` needs.
COMMANDS = {
    "list": "show the techniques and the shipped recipes, or all about one of them",
    "check": "tell whether a recipe composes, what it needs, and what will come out",
    "compress": "run a recipe on a model; write the checkpoint, its record and its card",
    "eval": "measure a checkpoint on data",
    "card": "render the model card of a checkpoint anew from its record",
    "push": "push a checkpoint with its card to the Hub",
    "bench": "time the kernels beside their peers, or the decoding of a whole model",
    "demo": "do the whole job on the bundled model, on a CPU, in about a minute",
}
STATUS = "exit status: 0 done, 1 a recipe that `check --json` refuses, 2 an error, explained in one line"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (see ``STATUS``)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return execute(args)


def execute(args: argparse.Namespace) -> int:
    """Run a parsed command; errors become one line on standard error, with ``--verbose`` below their traceback."""
    with _logging(args.verbose):
        try:
            return importlib.import_module(f"{__name__}.{args.command}").run(args)
        except KeyboardInterrupt:
            print("hf-optim: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our output has gone (`hf-optim list | head`); the interpreter must not write there again.
            sys.stdout = None  # type: ignore[assignment]
            return 0
        except OptimError as error:
            return _explain(error, str(error), args.verbose)
        except Exception as error:
            hint = "" if args.verbose else " (-v shows where)"
            return _explain(error, f"{type(error).__name__}: {error}{hint}", args.verbose)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``hf-optim``."""
    parser = argparse.ArgumentParser(
        prog="hf-optim",
        description="Make a Hugging Face transformer cheaper to run: compress it, measure it, publish it.",
        epilog=STATUS,
    )
    parser.add_argument("--version", action="version", version=f"hf-optim {__version__}")
    add_commands(parser)
    return parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add every command as a subparser; the chosen one is ``args.command``, for ``execute``."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, help_line in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name,
            help=help_line,
            description=(module.__doc__ or "").split(": ", 1)[-1].strip(),
            epilog="example:\n  " + module.EXAMPLE.replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "-v", "--verbose", action="store_true", help="show debug messages, and tracebacks of errors"
        )
        module.arguments(command)


def _explain(error: Exception, message: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(f"hf-optim: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """hf_optim's own messages on standard error while a command runs; other libraries' loggers are left alone."""
    logger = logging.getLogger("hf_optim")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

"""The command ``hf-optim`` (also ``python -m hf_optim.cli`` and ``optimum-cli optim``)."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from .. import __version__
from ..errors import MAX_MESSAGE, OptimError, cli_message, printable
from ..runs import progress
from .parser import CommandParser

# Name -> help. Each command is a module of this package with ``EXAMPLE``, ``arguments(parser)`` and
# ``run(args) -> int``. Heavy imports are inside ``run``, so that `hf-optim list` does not wait for those of `compress`.
COMMANDS = {
    "list": "list the techniques and the shipped recipes, or describe one of them",
    "check": "check a recipe: is it valid, what does it need, what does it produce",
    "compress": "run a recipe on a model; write the checkpoint, its record and its model card",
    "eval": "evaluate a checkpoint on data",
    "convert-recipe": "translate a recipe file of llm-compressor",
    "compare": "compare the quality, size, memory and time of several checkpoints",
    "serving": "say which of vLLM, SGLang and TGI read a checkpoint, and why the others do not",
    "card": "render the model card of a checkpoint again from its record",
    "push": "upload a checkpoint and its model card to the Hub",
    "bench": "benchmark the kernels against other libraries, or the decoding of a whole model",
    "demo": "run the whole workflow on a bundled model, on a CPU, in about a minute",
}
STATUS = (
    "exit status: 0 success; 1 a negative answer (`check` refuses the recipe, `serving --server` the checkpoint); 2 an "
    "error, the command did not do its work (one line on standard error); 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status (see ``STATUS``)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return execute(args)


def execute(args: argparse.Namespace) -> int:
    """Run a parsed command. Errors are printed as one line on standard error; ``--verbose`` adds their traceback."""
    with progress.command(args.quiet), _logging(args.verbose, args.quiet):
        try:
            status: int = _module(args.command).run(args)
            print(end="", flush=True)  # a reader who has left is noticed here, and not at the end of Python
            return status
        except KeyboardInterrupt:
            print("hf-optim: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of the output has exited (`hf-optim list | head`). What is left in the buffer goes nowhere.
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            return 0
        except OptimError as error:
            return _print_error(error, cli_message(error), args.verbose)
        except Exception as error:
            hint = "" if args.verbose else " (-v shows the traceback)"
            return _print_error(error, f"{type(error).__name__}: {error}{hint}", args.verbose)


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of ``hf-optim``."""
    parser = CommandParser(
        prog="hf-optim",
        description="Make a Hugging Face transformer cheaper to run: compress it, measure it, publish it.",
        epilog=STATUS,
    )
    parser.add_argument("--version", action="version", version=f"hf-optim {__version__}")
    add_commands(parser)
    return parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add every command as a subparser. The chosen one is stored in ``args.command``, for ``execute``."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=CommandParser)
    for name, help_line in COMMANDS.items():
        module = _module(name)
        command = commands.add_parser(
            name,
            help=help_line,
            description=(module.__doc__ or "").split(": ", 1)[-1].strip(),
            epilog="example:\n  " + module.EXAMPLE.replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        said = command.add_mutually_exclusive_group()
        said.add_argument("-v", "--verbose", action="store_true", help="print debug messages, and tracebacks of errors")
        said.add_argument(
            "-q", "--quiet", action="store_true", help="show no progress and no notes, only the result and errors"
        )
        module.arguments(command)


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")


def _print_error(error: Exception, message: str, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(f"hf-optim: {printable(' '.join(message.split()), MAX_MESSAGE)}", file=sys.stderr)
    return 2


class _PrintableFormatter(logging.Formatter):
    """Escapes what is not printable: names in messages may come from a stranger's checkpoint."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line, 10 * MAX_MESSAGE) for line in super().format(record).splitlines())


@contextmanager
def _logging(verbose: bool, quiet: bool = False) -> Iterator[None]:
    """Log hf_optim's messages to standard error while a command runs; ``quiet``: no messages and warnings of anybody.

    Otherwise loggers of other libraries are not changed.
    """
    logger = logging.getLogger("hf_optim")
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(_PrintableFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with _without_warnings() if quiet else ExitStack():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _without_warnings() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

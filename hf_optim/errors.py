"""The errors of hf_optim. Each message names what is wrong, where, and what to do."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 1500


def printable(text: str, limit: int) -> str:
    """Return text on one line of at most ``limit`` characters; others than printable ones are escaped.

    The middle of a longer text is left out. What comes from a file cannot move the cursor of a terminal, or reverse the
    order of the text around it.
    """
    text = text if len(text) <= 2 * limit else f"{text[:limit]}{text[-limit:]}"
    line = text if text.isprintable() else " ".join(text.split())
    line = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in line)
    if len(line) <= limit:
        return line
    end = (limit - 5) // 3
    return f"{line[: limit - 5 - end]} ... {line[len(line) - end :]}"


class OptimError(Exception):
    """Base of all errors that hf_optim raises deliberately.

    A message is one line of at most 1,500 printable characters, whatever the names and values in it are. It names
    arguments of Python; where those of the commands have other names, ``cli`` is the message of ``hf-optim``.
    """

    def __init__(self, *args: Any, cli: str = "") -> None:
        super().__init__(*(printable(arg, MAX_MESSAGE) if isinstance(arg, str) else arg for arg in args))
        self.cli = printable(cli, MAX_MESSAGE)


def cli_message(error: BaseException) -> str:
    """Return the message of an error as a command prints it, with the names of options.

    An error that repeats the message of its cause repeats what a command would print of the cause.
    """
    if own := getattr(error, "cli", ""):
        return str(own)
    message, cause = str(error), error.__cause__
    if isinstance(cause, OptimError) and str(cause) and str(cause) in message:
        return message.replace(str(cause), cli_message(cause))
    return message


class RecipeError(OptimError, ValueError):
    """A recipe cannot be read, has a wrong field, or has steps that do not compose."""


class MissingRecipe(RecipeError):
    """There is no such recipe, or its file cannot be opened."""


class DataError(OptimError, ValueError):
    """Calibration, training or evaluation data is missing, unreadable or unsuitable."""


class ModelError(OptimError, ValueError):
    """A step does not support the model."""


class NumericalError(OptimError, ArithmeticError):
    """An activation is not finite or a matrix is singular; the message names the module and the step."""


class CheckpointError(OptimError, OSError):
    """A checkpoint cannot be read or written."""


class RankError(OptimError, RuntimeError):
    """A rank of a process group has ended, or did not answer in time, while ranks exchanged tensors."""


def require_any_model(model: object) -> None:
    """Raise ``ModelError`` for what is not a model, such as its path or None; torch is not imported for it."""
    if not callable(getattr(model, "named_modules", None)):
        raise ModelError(
            f"expected a model, not a value of type {type(model).__name__}: load it with from_pretrained(...)"
        )

"""Errors of transformers for configurations and weights that it cannot use, as errors of hf_optim.

A configuration is input: with a wrong value in it, transformers and huggingface_hub raise errors of any type from
wherever the value is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, ModelError, OptimError
from ...trust.bounds import first_line, shown
from ...trust.weights import describe_other_weights
from .safetensors import UnsupportedCheckpoint

# Errors that are not about the input.
PASSED = (OptimError, UnsupportedCheckpoint, MemoryError, torch.OutOfMemoryError)
# Every layer takes memory and time, even on the meta device. The deepest models have hundreds.
MAX_LAYERS = 10_000
_COUNTS = re.compile(r"(num|n)_\w*(layer|block|expert)s?$|depths?$|\w*layers$")


@contextmanager
def stock_errors(source: Any, doing: str = "cannot load") -> Iterator[None]:
    """Raise ``CheckpointError`` (for ``OSError``) or ``ModelError`` in place of what the body raises.

    ``doing`` and ``source`` begin the message.
    """
    try:
        yield
    except PASSED:
        raise
    except Exception as error:
        raise stock_error(error, source, doing) from error


@contextmanager
def explained(reason: str) -> Iterator[None]:
    """Add to an ``OptimError`` of the body why hf_optim did not read the checkpoint by itself; ``""`` adds nothing."""
    try:
        yield
    except OptimError as error:
        if not reason:
            raise
        raise type(error)(f"{error}. hf_optim does not read this checkpoint by itself: {reason}") from error


@contextmanager
def config_errors(source: Any, subfolder: str = "") -> Iterator[None]:
    """Raise ``ModelError`` in place of what loading the configuration of ``source`` raises."""
    try:
        yield
    except PASSED:
        raise
    except Exception as error:  # whatever a value of the configuration led to
        if needs_code(error):
            raise code_error(source) from error
        home, reason = Path(str(source), subfolder), first_line(error)
        if home.is_dir() and not (home / "config.json").exists():
            other = describe_other_weights(home)
            rest = f"; it holds {other}" if other else ": name the directory that save_pretrained wrote, or a Hub id"
            reason = f"it has no config.json{rest}"
        raise ModelError(f"no model configuration at {shown(str(source))}: {reason}") from error


def stock_error(error: BaseException, source: Any, doing: str = "cannot load") -> OptimError:
    """Return the ``CheckpointError`` or ``ModelError`` for an error of transformers."""
    if needs_code(error):
        return code_error(source)
    kind = CheckpointError if isinstance(error, OSError) else ModelError
    return kind(f"{doing} {source}: {first_line(error)}")


def needs_code(error: BaseException) -> bool:
    """Return True if transformers refused to run code that comes with a checkpoint without the caller's word."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def code_error(source: Any) -> ModelError:
    """Return the error for a checkpoint whose code may not run."""
    needed = f"{source} needs model code of its own: if you trust it, pass"
    return ModelError(f"{needed} trust_remote_code=True", cli=f"{needed} --trust-remote-code")


def require_bounded(config: Any, source: Any) -> None:
    """Raise ``ModelError`` for a configuration with more than 10,000 layers, blocks or experts."""
    waiting = [config.to_dict() if hasattr(config, "to_dict") else config]
    while waiting:
        part = waiting.pop()
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(value, Mapping):
                waiting.append(value)
            for number in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(number, int) and number > MAX_LAYERS and _COUNTS.match(str(key)):
                    raise ModelError(f"config.json of {source}: {key} is {shown(value)}, more than {MAX_LAYERS:,}")

"""A worker of the sweep: reads names of classes from stdin, and writes one line of JSON for each.

Each class is checked in a process of its own, forked from this one after the libraries are imported, with a limit of
time and memory: a hang or a crash costs one class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

MEMORY = 12 * 2**30


def serve(seconds: float) -> None:
    """Check the classes named on stdin, one after another.

    Args:
        seconds: limit of one class.
    """
    import torch
    from transformers.utils import logging as theirs

    from ..stock import StockTransformers
    from .checks import Result

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    warnings.simplefilter("ignore")
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    _import_all()
    while line := sys.stdin.readline():
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(StockTransformers(fork=True))
            while line:
                job = json.loads(line)
                answer, sound = _in_child(job, process, seconds)
                lost = dict.fromkeys(job["recipes"], ("FAIL", "the process crashed or took too long"))
                result = answer or dataclasses.asdict(Result(recipes=lost))
                print(json.dumps({"name": job["name"], **result}), flush=True)
                if not sound:
                    break  # the stock process may be in the middle of an answer: start another
                line = sys.stdin.readline()


def _in_child(job: dict[str, Any], process: Any, seconds: float) -> tuple[dict[str, Any] | None, bool]:
    """Return the result of one class, and whether its process ended by itself."""
    from .checks import check_class

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                _limit_memory()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                result = check_class(job["name"], home, process, job["recipes"])
                (home / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
                code = 0
            os._exit(code)
        status = _wait(child, seconds)
        written = home / "result.json"
        return (json.loads(written.read_text()) if written.exists() else None), status == 0


def _import_all() -> None:
    """Import what a class needs before the first fork: once, not for each class."""
    from ..models import tiny_llama
    from .checks import check_recipe
    from .inputs import random_inputs
    from .recipes import RECIPES

    model = tiny_llama()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        model.save_pretrained(folder)
        for recipe in RECIPES:
            batches = [random_inputs(model, 0)]
            check_recipe(type(model), Path(folder), recipe, batches, Path(folder) / recipe, None)


def _wait(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve(float(sys.argv[1]))

"""Evaluations that ``hf-optim`` starts, as forked copies of it: importing takes longer than the work of a tiny model.

Call ``begin()`` in a copy of a session. Other children, such as the one that times, are started as users have them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from forks import fork
from session_worker import status_of


def begin() -> None:
    """Replace what runs the children of commands in this process."""
    from hf_optim.runs import progress

    start = progress.run_child

    def run(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        if list(arguments[1:4]) != ["-m", "hf_optim.cli", "eval"]:
            return start(arguments, env)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            if (copy := fork()) == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                # What the command has put in the place of its streams, such as the line of its progress, is not theirs.
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.update(env)
                os._exit(status_of(lambda: evaluate(arguments[3:])))
            status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, status, out.read(), err.read())

    progress.run_child = run


def evaluate(words: Sequence[str]) -> int:
    from hf_optim.cli import main

    return main(words)

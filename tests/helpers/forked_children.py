"""Children that ``hf-optim`` starts, as forked copies of it: importing takes longer than the work of a tiny model.

Call ``begin()`` in a copy of a session.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence

from forks import fork
from session_worker import status_of


def begin() -> None:
    """Replace what runs the children of commands in this process."""
    from hf_optim.runs import progress

    def run(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        assert list(arguments[:2]) == [sys.executable, "-m"], arguments
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            if (copy := fork()) == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                # What the command has put in the place of its streams, such as the line of its progress, is not theirs.
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.update(env)
                os._exit(status_of(lambda: run_module(arguments[2], arguments[3:])))
            status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, status, out.read(), err.read())

    progress.run_child = run


def run_module(name: str, words: Sequence[str]) -> int:
    """Run a module as ``python -m`` does."""
    sys.argv = ["-m", *words]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it may be imported already
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0

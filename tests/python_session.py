"""A Python process that a test talks to: with other environment variables, and one import for many calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WORKER = """
import contextlib, io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
names = {}
exec(sys.argv[1], names)
for line in sys.stdin:
    request, out, err = json.loads(line), io.StringIO(), io.StringIO()
    names["result"], status = None, 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "argv" in request:
                from hf_optim.cli import main
                status = main(request["argv"])
            else:
                exec(request["code"], names)
        except BaseException:
            traceback.print_exc()
            status = 70
    answer = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "result": names["result"]}
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""
BLOCK = "import sys; sys.modules['hf_optim'] = None\n"


class Done(NamedTuple):
    """What a call gave: exit status, standard output and error, and what it bound to ``result`` (JSON types)."""

    status: int
    out: str
    err: str
    result: Any


class PythonSession:
    """A child process with variables ``environment`` beside ours.

    It starts with the code ``begin`` and does not wait for it; with ``stock=True`` it cannot import hf_optim.
    """

    def __init__(self, environment: Mapping[str, str], begin: str = "", stock: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", (BLOCK if stock else "") + WORKER, begin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> Done:
        """``hf-optim`` with these arguments."""
        return self._ask({"argv": [os.fspath(word) for word in argv]})

    def run(self, code: str) -> Any:
        """Execute code (names last from call to call) and return what it bound to ``result``."""
        done = self._ask({"code": code})
        assert done.status == 0, done.err
        return done.result

    def close(self) -> None:
        """End the process; it has nothing to keep, so it is not asked to tidy up."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        return Done(**json.loads(line))

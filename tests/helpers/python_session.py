"""A Python process that tests share: it imports once, and a call can run in a copy of it, as in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imported_process import Begun, ImportedProcess

WORKER = Path(__file__).with_name("session_worker.py")
OURS = ("hf_optim", "hf_optim_plugins", "hf_optim_kernels", "hf_optim_generated")
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OURS}))\n"


class Done(NamedTuple):
    """The end of a call: exit status or minus the signal that killed it, standard output and error, and ``result``."""

    status: int
    out: str
    err: str
    result: Any


class PythonSession:
    """A child process with the variables ``environment`` beside ours, one import for many calls.

    It starts with the code ``begin`` and does not wait for it; with ``stock=True`` it cannot import hf_optim. With
    ``imported`` it begins as a copy of that process and has its imports. ``run`` executes code in the session itself.
    All others take a forked copy of the session, which may change what it likes, or be killed: nothing of it is left
    but the files that it wrote.

    A call that is interrupted, as by a test that runs out of time, ends the process with all of its copies, and another
    begins: a late answer would be taken for that of the next call.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        begin: str = "",
        stock: bool = False,
        imported: ImportedProcess | None = None,
    ) -> None:
        self._begin = (BLOCK if stock else "") + begin
        self._words = [sys.executable, str(WORKER), self._begin]
        self._environment = {**os.environ, **environment}
        self._imported = imported
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str] | Begun:
        """Return a new process, the leader of a group that its copies are in."""
        if self._imported is not None:
            return self._imported.begin(f"import session_worker; session_worker.start({self._begin!r})", {})
        return subprocess.Popen(
            self._words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._environment,
            start_new_session=True,
        )

    def command(
        self, argv: Sequence[str | os.PathLike[str]], before: str = "", folder: str | os.PathLike[str] = ""
    ) -> Done:
        """Run ``hf-optim`` with these arguments in a copy, after the code ``before``, in ``folder``."""
        return self._ask(copy=True, code=before, argv=[os.fspath(word) for word in argv], folder=str(folder))

    def copy(self, code: str, **environment: str) -> Done:
        """Execute code in a copy, with more environment variables."""
        return self._ask(copy=True, code=code, environment=environment)

    def script(self, file: str | os.PathLike[str], *arguments: object, **environment: str) -> Done:
        """Run a Python file as a program in a copy."""
        return self._ask(copy=True, file=os.fspath(file), argv=list(map(str, arguments)), environment=environment)

    def ranks(self, file: str | os.PathLike[str], *arguments: object) -> Done:
        """Run a Python file (or ``hf-optim``, if that is empty) as two ranks on the CPU, each in a copy.

        The first that fails ends the other.
        """
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = list(map(str, arguments))
        return self._ask(copy=True, ranks=True, file=os.fspath(file), argv=words, environment=environment)

    def run(self, code: str) -> Any:
        """Execute code in the session (names last from call to call) and return what it bound to ``result``."""
        done = self._ask(code=code)
        assert done.status == 0, done.err
        return done.result

    def close(self) -> None:
        """End the process and its copies; they have nothing to keep, so they are not asked to tidy up."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _ask(self, **given: Any) -> Done:
        default = {"copy": False, "ranks": False, "code": "", "file": "", "argv": [], "environment": {}, "folder": ""}
        request = default | given
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BaseException:
            self.close()
            self._process = self._started()
            raise
        assert line, f"the process ended with {self._process.wait()}"
        return Done(**json.loads(line))

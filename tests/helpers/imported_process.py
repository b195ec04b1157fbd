"""A process that has imported what many processes import, and begins them as copies of itself."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

WORKER = Path(__file__).with_name("imports_worker.py")


class Begun:
    """A process with pipes, as a ``subprocess.Popen`` in text mode has them, that another process has begun."""

    def __init__(self, pid: int, stdin: TextIO, stdout: TextIO) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout

    def wait(self, timeout: float | None = None) -> str:
        """Return what is left of its output when it ends; it is not our child, so its exit status is not known."""
        return self.stdout.read()

    def communicate(self) -> None:
        """Wait until nothing of a killed process is left, and close its pipes."""
        self.wait()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class ImportedProcess:
    """A child process that executes the code ``imports``, with the variables ``environment`` beside ours."""

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(theirs.fileno()), imports],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def begin(self, code: str, environment: Mapping[str, str]) -> Begun:
        """Begin a process that executes ``code``, the leader of a group of its own, with more variables."""
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        request = json.dumps({"code": code, "environment": dict(environment)}).encode()
        socket.send_fds(self._socket, [f"{len(request):8}".encode()], [theirs_in, theirs_out])
        self._socket.sendall(request)
        for file in (theirs_in, theirs_out):
            os.close(file)
        answer = self._socket.recv(8)
        assert answer, f"the process that imports ended with {self._process.wait()}"
        return Begun(array.array("q", answer)[0], open(ours_in, "w"), open(ours_out))

    def close(self) -> None:
        """End the process; those that it has begun go on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

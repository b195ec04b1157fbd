"""Run by ``imported_process``: imports once, then begins processes as copies of itself.

Its arguments are the number of a socket and the code that imports.

A request has a length of eight bytes, a JSON object ``{"code", "environment"}``, and two file descriptors: what the new
process has as standard input and output. The answer is the id of the process, which leads a group of its own.
"""

from __future__ import annotations

import array
import gc
import json
import os
import socket
import sys
import traceback

from forks import fork

THRESHOLD = 50_000  # of the garbage collector, as in ``collecting``


def begin(request: dict[str, object], stdin: int, stdout: int) -> None:
    """Be the process of a request; do not return."""
    os.setsid()
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    for file in (stdin, stdout):
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    os.environ.update(request["environment"])  # type: ignore[arg-type]
    status = 0
    try:
        exec(str(request["code"]), {"__name__": "begun"})
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 70
    os._exit(status)


def serve(asked: socket.socket) -> None:
    while True:
        head, files, _, _ = socket.recv_fds(asked, 8, 2)
        if not head:
            return
        text = b""
        while len(text) < int(head):
            text += asked.recv(int(head) - len(text))
        if (copy := fork()) == 0:
            asked.close()
            begin(json.loads(text), *files)
        for file in files:
            os.close(file)
        asked.sendall(array.array("q", [copy]).tobytes())


if __name__ == "__main__":
    gc.disable()
    exec(sys.argv[2], {"__name__": "imports"})
    gc.enable()
    gc.freeze()  # nor does the collector walk in each process what all have imported
    gc.set_threshold(THRESHOLD, *gc.get_threshold()[1:])
    serve(socket.socket(fileno=int(sys.argv[1])))

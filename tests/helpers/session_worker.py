"""Run by ``python_session``: takes requests from standard input and performs them here, or in forked copies."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from forks import fork

names: dict[str, Any] = {"__name__": "session"}


def perform(request: dict[str, Any]) -> int:
    """Execute the code of a request, then its file or command; return the exit status."""
    os.environ.update(request["environment"])
    if request["folder"]:
        os.chdir(request["folder"])
    exec(request["code"], names)
    if not request["file"] and not request["argv"]:
        return 0
    return as_two_ranks(lambda: work(request)) if request["ranks"] else work(request)


def work(request: dict[str, Any]) -> Any:
    """Run the file of a request as a program with its arguments, or ``hf-optim`` with these."""
    if request["file"]:
        sys.argv = [request["file"], *request["argv"]]
        runpy.run_path(request["file"], run_name="__main__")
        return 0
    from hf_optim.cli import main

    return main(request["argv"])


def status_of(call: Callable[[], Any]) -> int:
    """Return the exit status of a call as Python would end with it, with the traceback on standard error."""
    try:
        status = call()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(isinstance(status, str))


def as_two_ranks(call: Callable[[], Any]) -> int:
    """Call in two copies with torchrun's variables; the first that fails ends the other, and its status is ours."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = set()
    for rank in range(2):
        if (copy := fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(status_of(call))
        ranks.add(copy)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def answer(request: dict[str, Any], result: TextIO) -> int:
    names["result"] = None
    status = status_of(lambda: perform(request))
    json.dump(names["result"], result)
    result.flush()
    return status


def captured(request: dict[str, Any], out: TextIO, err: TextIO, result: TextIO) -> int:
    """Answer with both streams in files; return the status, of a copy that was killed minus the signal."""
    kept = os.dup(1), os.dup(2)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    try:
        if not request["copy"]:
            return answer(request, result)
        if (copy := fork()) == 0:
            os._exit(answer(request, result))
        return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    finally:
        for number, stream in enumerate(kept, 1):
            os.dup2(stream, number)
            os.close(stream)


def serve(requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        with tempfile.TemporaryDirectory() as folder:
            files = [open(os.path.join(folder, name), "w+") for name in ("out", "err", "result")]  # noqa: SIM115
            status = captured(json.loads(line), *files)
            texts = []
            for file in files:
                file.seek(0)
                texts.append(file.read())
                file.close()
        found = {"status": status, "out": texts[0], "err": texts[1], "result": json.loads(texts[2] or "null")}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def start(begin: str) -> None:
    """Take the pipes of this process for requests and answers, execute ``begin``, and serve."""
    pipes = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what asks gets no request
    os.dup2(2, 1)  # what is printed is no answer
    exec(begin, names)
    gc.freeze()  # copies share what has been imported
    serve(*pipes)


if __name__ == "__main__":
    start(sys.argv[1])

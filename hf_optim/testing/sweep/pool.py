"""Shares the classes of a sweep out to workers."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any


def sweep(jobs: Sequence[dict[str, Any]], workers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the result of each job as it is done.

    Args:
        jobs: mappings of ``name`` (a class) and ``recipes`` (a list).
        workers: how many processes.
        seconds: limit of one class.
    """
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threads = [threading.Thread(target=_work, args=(waiting, answers, seconds), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        answer = answers.get()
        if answer is None:
            running -= 1
        else:
            yield answer


def _work(waiting: Any, answers: Any, seconds: float) -> None:
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_optim.testing.sweep.worker", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        while not waiting.empty():
            job = waiting.get()
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a worker of the sweep ended at {job['name']}")
            answers.put(json.loads(line))
        process.stdin.close()
        process.wait()
    finally:
        answers.put(None)

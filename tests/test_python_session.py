"""The Python process that tests share."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from python_session import PythonSession


class Interrupted(Exception):
    pass


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_call_leaves_no_answer_to_the_next(tmp_path):
    def interrupt(*_):
        raise Interrupted

    def interrupt_later():
        while not (tmp_path / "copy").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    session = PythonSession({}, "import os, time\nfrom pathlib import Path\n")
    former = signal.signal(signal.SIGUSR1, interrupt)
    waits = threading.Thread(target=interrupt_later)
    waits.start()
    begun = f"part, file = Path({str(tmp_path / 'part')!r}), Path({str(tmp_path / 'copy')!r})\n"
    try:
        with pytest.raises(Interrupted):
            session.copy(begun + "part.write_text(str(os.getpid())); part.rename(file); time.sleep(60); print('late')")
        assert session.copy("print('next')").out == "next\n"
        assert not is_running(int((tmp_path / "copy").read_text()))
    finally:
        waits.join()
        signal.signal(signal.SIGUSR1, former)
        session.close()

"""The Python process that tests share."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from imported_process import ImportedProcess
from python_session import PythonSession


class Interrupted(Exception):
    pass


def has_ended(process: int) -> bool:
    """Return True when a process has ended, or will within ten seconds: one that was killed ends a little later."""
    return any(not is_running(process) or time.sleep(0.01) for _ in range(1000))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def imported():
    process = ImportedProcess("import fractions", {"GIVEN": "to all"})
    yield process
    process.close()


@pytest.mark.parametrize("begun", [False, True], ids=["alone", "a copy"])
def test_an_interrupted_call_leaves_no_answer_to_the_next(begun, imported, tmp_path):
    def interrupt(*_):
        raise Interrupted

    def interrupt_later():
        while not (tmp_path / "copy").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    begin = "import os, time\nfrom pathlib import Path\n"
    session = PythonSession({}, begin, imported=imported if begun else None)
    former = signal.signal(signal.SIGUSR1, interrupt)
    waits = threading.Thread(target=interrupt_later)
    waits.start()
    files = f"part, file = Path({str(tmp_path / 'part')!r}), Path({str(tmp_path / 'copy')!r})\n"
    try:
        with pytest.raises(Interrupted):
            session.copy(files + "part.write_text(str(os.getpid())); part.rename(file); time.sleep(60); print('late')")
        assert session.copy("print('next')").out == "next\n"
        assert has_ended(int((tmp_path / "copy").read_text()))
    finally:
        waits.join()
        signal.signal(signal.SIGUSR1, former)
        session.close()


def test_sessions_of_one_process_share_its_imports_and_nothing_else(imported):
    named = "'fractions' in sys.modules, 'hf_optim' in sys.modules"
    found = f"import os, sys; result = [os.environ['GIVEN'], {named}, os.getpid()]"
    sessions = PythonSession({}, imported=imported), PythonSession({}, stock=True, imported=imported)
    try:
        sessions[0].run("import colorsys, os; os.environ['GIVEN'] = 'to one'")
        first, second = (session.run(found) for session in sessions)
        assert first[:3] == ["to one", True, False]
        assert second[:3] == ["to all", True, True]
        assert first[3] != second[3]
        assert sessions[1].copy("import hf_optim").status == 70
        assert sessions[0].copy("import sys; sys.exit('colorsys' in sys.modules)").status == 1
        assert sessions[1].run("import sys; result = 'colorsys' in sys.modules") is False
    finally:
        for session in sessions:
            session.close()
    assert has_ended(first[3])


def test_what_a_process_begins_ends_by_itself_or_with_its_session(imported):
    process = imported.begin("import sys; print(sys.stdin.readline() * 2, flush=True)", {})
    process.stdin.write("line\n")
    process.stdin.flush()
    assert process.wait() == "line\nline\n\n"
    process.communicate()

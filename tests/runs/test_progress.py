"""The progress display: one line on a terminal, nothing in a pipe, and nobody else's bars inside our work."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import tqdm as tqdm_package
from terminal import bars_allowed, terminal
from tqdm.auto import tqdm
from tqdm.std import tqdm as std_tqdm
from transformers.utils import logging as transformers_logging

import hf_optim
from hf_optim.runs import progress
from hf_optim.runs.progress import EVENTS
from hf_optim.runs.progress_line import EVENT, Shown, parse_event


@pytest.fixture(autouse=True)
def as_started(monkeypatch):
    """No switch of other tests decides, and the constructor of tqdm is as it was afterwards."""
    before = std_tqdm.__dict__["__init__"]
    with bars_allowed(monkeypatch):
        yield
    assert std_tqdm.__dict__["__init__"] is before
    for thread in threading.enumerate():
        if thread.name == "hf_optim-progress":
            thread.join(5)
            assert not thread.is_alive()


def work(kind=tqdm, n=3, **options):
    for _ in kind(range(n), **{"desc": "theirs", **options}):
        pass


def test_a_loop_shows_counts_and_times_and_leaves_nothing():
    with terminal() as seen, progress.progress(range(4), "calibrating", unit="blocks") as shown:
        for number in shown:
            shown.note(f"layers.{number}")
    counts = [frame.split(" |")[0] for frame in seen.frames if "layers.2" in frame]
    assert counts == ["calibrating: 2/4 blocks", "calibrating: 3/4 blocks"]
    assert all("elapsed" in frame for frame in seen.frames)
    assert any("left, layers.3" in frame for frame in seen.frames)
    assert seen.screen == [""]
    assert "\x1b" not in seen.written


def test_a_stage_without_counts_shows_those_of_another_library():
    with terminal() as seen, progress.stage("loading llama"):
        work(tqdm_package.tqdm, 5)
        work(tqdm, 3, unit="shards")
    assert "theirs" not in seen.written
    assert "loading llama: 2/5" in seen.written
    assert "loading llama: 2/3 shards" in seen.written
    assert seen.screen == [""]


def test_a_stage_with_counts_keeps_its_own():
    with terminal() as seen, progress.progress(range(2), "calibrating", unit="blocks") as shown:
        for _ in shown:
            work(n=7)
    assert {frame.split(" |")[0] for frame in seen.frames} == {f"calibrating: {i}/2 blocks" for i in range(3)}


def test_stages_nest_in_one_line():
    with terminal() as seen, progress.stage("measuring"):
        with progress.progress(range(2), "evaluating", unit="batches") as shown:
            list(shown)
        with progress.stage("timing"):
            pass
    assert any(frame.startswith("measuring: evaluating: 1/2 batches") for frame in seen.frames)
    assert any(frame.startswith("measuring: timing,") for frame in seen.frames)
    assert "\n" not in seen.written


def test_what_is_printed_stands_above_the_line(capsys):
    with terminal() as seen, progress.stage("training"):
        print("a note")
        print("an error", file=sys.stderr)
        sys.stdout.write("in ")
        sys.stdout.write("pieces\n")
    assert seen.screen == ["a note", "an error", "in pieces", ""]


def test_a_bar_of_the_caller_is_put_aside_and_comes_back():
    with terminal() as seen:
        for _ in tqdm(range(2), desc="theirs", file=sys.stderr, mininterval=0):
            with progress.stage("ours"):
                pass
    assert any(frame.startswith("ours") for frame in seen.frames)
    assert seen.screen[0].startswith("theirs: 100%")
    assert "\x1b[A" not in seen.written


def test_nothing_is_drawn_into_a_pipe_and_the_stage_is_logged(capsys, caplog):
    with caplog.at_level(logging.INFO, "hf_optim"), progress.stage("saving"):
        work()
        with progress.stage("inner"):
            work(tqdm_package.tqdm)
    assert capsys.readouterr() == ("", "")
    (line,) = caplog.messages
    assert line.startswith("saving: 0.")
    assert line.endswith(" s")


def test_bars_outside_our_work_are_untouched(capsys):
    made, drawn = threading.Event(), threading.Event()

    def theirs():
        assert made.wait(10)
        work(file=sys.stdout)
        drawn.set()

    thread = threading.Thread(target=theirs)
    thread.start()
    with progress.stage("ours"):
        made.set()
        assert drawn.wait(10)
    thread.join()
    work(file=sys.stdout)
    assert capsys.readouterr().out.count("theirs: 100%") == 2


def test_two_threads_show_one_line():
    inside = threading.Event()

    def other():
        with progress.stage("the other's"):
            work(desc="of the other")
        inside.set()

    with terminal() as seen, progress.stage("mine"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        thread.join()
    assert {frame.split(",")[0] for frame in seen.frames} == {"mine"}


def fail_in_a_loop():
    with progress.stage("outer"), progress.progress(range(3), "inner") as shown:
        for _ in shown:
            raise KeyError


def test_an_error_removes_the_line_and_restores_everything(caplog):
    streams = sys.stdout, sys.stderr
    with caplog.at_level(logging.INFO, "hf_optim"), terminal() as seen, pytest.raises(KeyError):
        fail_in_a_loop()
    assert seen.screen == [""]
    assert (sys.stdout, sys.stderr) == streams
    assert caplog.messages == []
    assert progress._display._stages == []


def disabled_by_python():
    hf_optim.disable_progress_bars()
    return hf_optim.enable_progress_bars


def disabled_by_transformers():
    transformers_logging.disable_progress_bar()
    return transformers_logging.enable_progress_bar


@pytest.mark.parametrize("disable", [disabled_by_python, disabled_by_transformers, "TQDM_DISABLE", "RANK"])
def test_switches_that_hide_progress(monkeypatch, disable):
    if isinstance(disable, str):
        monkeypatch.setenv(disable, "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        enable = None
    else:
        enable = disable()
    try:
        with terminal() as seen, progress.stage("ours"):
            work()
    finally:
        if enable is not None:
            enable()
    assert seen.written == ""
    monkeypatch.undo()
    with terminal() as seen, progress.stage("ours"):
        pass
    assert "ours" in seen.written


def test_silenced_work_shows_nothing_of_others_and_keeps_their_switches():
    before = transformers_logging.is_progress_bar_enabled()
    with terminal() as seen:
        with progress.silenced():
            work()
        with progress.silenced(everywhere=True), progress.stage("ours"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert seen.written == ""
    assert transformers_logging.is_progress_bar_enabled() == before


def test_a_bar_that_its_library_disabled_is_not_counted():
    with terminal() as seen, progress.stage("loading"):
        work(disable=True)
        for _ in std_tqdm(range(2), None, None, True, None, None, 0.1, 10.0, None, None, True):
            pass
    assert {frame.split(",")[0] for frame in seen.frames} == {"loading"}


def test_a_bar_can_be_counted_by_hand_and_writes_through_the_log(caplog):
    caplog.set_level(logging.INFO, "hf_optim")
    with terminal() as seen, progress.stage("uploading"), tqdm(total=10, unit="B") as bar:
        bar.update(4)
        bar.set_description("renamed")
        bar.write("{'loss': 1.0}")
        bar.total = 20
        bar.refresh()
        assert bar.n == 4
    assert "uploading: 4/10 B" in seen.written
    assert "uploading: 4/20 B" in seen.written
    assert caplog.messages[0] == "{'loss': 1.0}"


def test_names_are_escaped_and_lines_fit_the_terminal():
    with terminal(40) as seen, progress.stage("loading \x1b[2J" + "x" * 100):
        pass
    assert "\x1b" not in seen.written
    assert max(map(len, seen.frames)) <= 40


def test_a_child_shows_its_progress_in_the_line_of_its_parent(tmp_path):
    program = (
        "import sys, logging; logging.basicConfig(level=logging.INFO)\n"
        "from hf_optim.runs.progress import progress\n"
        "with progress(range(3), 'evaluating', unit='batches') as shown:\n"
        "    for i in shown: print('to stderr', i, file=sys.stderr)\n"
        "print('the result'); sys.exit(3)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin"}
    with terminal() as seen, progress.stage("measuring"):
        done = progress.run_child([sys.executable, "-c", program], environment)
    assert "measuring: evaluating: 0/3 batches" in seen.written
    assert (done.returncode, done.stdout) == (3, "the result\n")
    assert [line for line in done.stderr.splitlines() if "to stderr" in line] == [f"to stderr {i}" for i in range(3)]
    assert EVENT not in done.stderr + seen.written
    alone = progress.run_child([sys.executable, "-c", program], environment)
    assert (alone.returncode, alone.stdout) == (3, "the result\n")
    assert EVENT not in alone.stderr


@pytest.mark.parametrize("line", ["", "plain", EVENT, EVENT + "[]", EVENT + '{"what": 1}', EVENT + "{" + "x" * 20_000])
def test_a_line_that_is_no_event(line):
    assert parse_event(line) is None


def test_an_event_comes_back(monkeypatch, capsys):
    monkeypatch.setenv(EVENTS, "events")
    with progress.progress(range(2), "evaluating", unit="batches") as shown:
        next(iter(shown))
    lines = capsys.readouterr().err.splitlines()
    found = parse_event(lines[0])
    assert isinstance(found, Shown)
    assert (found.what, found.n, found.total, found.unit) == ("evaluating", 0, 2, "batches")

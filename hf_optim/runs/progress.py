"""One display of what is being done, how much of it, for how long already and how long to go.

Work is a ``stage``; stages nest, and one line shows the innermost, with the name of the outermost::

    with stage("saving"):
        ...
    with progress(batches, "evaluating", unit="batches") as shown:
        for batch in shown:
            ...

The line is drawn if standard error is a terminal (or in a notebook), by rank 0 only. Elsewhere nothing is drawn; each
outermost stage is logged with its duration when it ends, at level INFO. Bars of other libraries (``foreign_bars``) are
silenced inside a stage, and a stage without counts of its own shows theirs. Outside stages nothing is changed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

from ..trust.figures import format_seconds
from . import progress_line
from .foreign_bars import ForeignBar, Watcher, captured
from .progress_line import EventLine, Shown, TerminalLine, parse_event

log = logging.getLogger(__name__)

T = TypeVar("T")

EVENTS = "HF_OPTIM_PROGRESS"  # environment: "events" for a process whose parent shows its progress
KEPT_LINES = 200  # of the standard error of a child process


class Counts(Protocol):
    """What a stage without counts of its own shows: those of another library, or of another process."""

    @property
    def what(self) -> str: ...
    @property
    def n(self) -> float: ...
    @property
    def total(self) -> float | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def started(self) -> float: ...


class Stage:
    """A piece of work, for the time that it takes.

    Attributes:
        what: its name: ``calibrating``.
        total: number of units of work, or None if it is unknown.
        unit: what is counted, in the plural.
        n: units done.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "") -> None:
        self.what, self.total, self.unit, self.n = what, total, unit, 0
        self.started = time.time()
        self._note = ""
        self._counts: Counts | None = None

    def update(self, n: int = 1) -> None:
        """Count ``n`` units as done."""
        self.n += n
        _display.changed(self)

    def note(self, text: str) -> None:
        """Show a few words beside the counts: what is being worked on."""
        self._note = text
        _display.changed(self)

    def over(self, iterable: Iterable[T]) -> Iterator[T]:
        """Yield the items of an iterable, and count them."""
        for item in iterable:
            yield item
            self.update()

    def relay(self, counts: Counts | None) -> None:
        """Show the counts of someone else; None to end that."""
        self._counts = counts
        _display.changed(self)


class Items(Generic[T]):
    """The items of an iterable, counted in a stage."""

    def __init__(self, iterable: Iterable[T], current: Stage) -> None:
        self._iterable, self._stage = iterable, current

    def __iter__(self) -> Iterator[T]:
        return self._stage.over(self._iterable)

    def note(self, text: str) -> None:
        """Show a few words beside the counts."""
        self._stage.note(text)


@contextmanager
def stage(what: str, total: int | None = None, unit: str = "", everywhere: bool = False) -> Iterator[Stage]:
    """Show a piece of work while the body runs.

    Args:
        what: a verb in its -ing form, and perhaps its object: ``loading llama``.
        total: number of units of work, if it is known; count them with ``Stage.update``.
        unit: what is counted, in the plural: ``blocks``.
        everywhere: silence the bars of other libraries in all threads, for work that a library does in its own.
    """
    current = Stage(what, total, unit)
    with captured(_display, everywhere):
        outermost = _display.push(current)
        try:
            yield current
        finally:
            _display.pop(current)
    if outermost:
        log.info("%s: %s", what, format_seconds(time.time() - current.started))


@contextmanager
def progress(iterable: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[Items[T]]:
    """Show a loop over ``iterable`` while the body runs; the body iterates over the value of ``with``.

    ``total`` is the number of items, if the iterable has no length; the other arguments are those of ``stage``.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with stage(what, total, unit) as current:
        yield Items(iterable, current)


@contextmanager
def silenced(everywhere: bool = False) -> Iterator[None]:
    """Draw no bars of other libraries in the body; ``everywhere``: in no thread, and show no stages either."""
    with captured(Watcher(), everywhere), _display.hidden() if everywhere else nullcontext():
        yield


@contextmanager
def command(quiet: bool = False) -> Iterator[None]:
    """Run a whole command: no bars of other libraries, and what is printed stands above the line.

    ``quiet`` hides the line, too.
    """
    with ExitStack() as stack:
        stack.enter_context(captured(_display, everywhere=True))
        stack.enter_context(progress_line.printing_above())
        if quiet:
            stack.enter_context(_display.hidden())
        yield


def disable_progress_bars() -> None:
    """Show no progress from now on, as with ``HF_HUB_DISABLE_PROGRESS_BARS`` or ``TQDM_DISABLE`` in the environment.

    ``transformers.utils.logging.disable_progress_bar`` does the same, for transformers as well.
    """
    _display.enabled = False


def enable_progress_bars() -> None:
    """Show progress again after ``disable_progress_bars``."""
    _display.enabled = True


def run_child(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command like ``subprocess.run(..., capture_output=True, text=True)``, and show its progress as ours.

    A child that is a command of hf_optim writes events on its standard error; these are not part of the result. Of what
    else it writes there, the last lines are kept.
    """
    current = _display.innermost()
    if current is None:
        return subprocess.run(arguments, capture_output=True, text=True, check=False, env=dict(env))
    printed: list[str] = []
    kept: list[str] = []
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(arguments, env={**env, EVENTS: "events"}, **pipes) as child:
        out: Any = child.stdout
        errors: Any = child.stderr
        reader = threading.Thread(target=lambda: printed.append(out.read()))
        reader.start()
        try:
            for line in errors:
                if (event := parse_event(line)) is not None:
                    current.relay(event)
                else:
                    kept[:] = [*kept[-KEPT_LINES:], line]
        except BaseException:
            child.kill()
            raise
        finally:
            current.relay(None)
            reader.join()
    return subprocess.CompletedProcess(arguments, child.returncode, "".join(printed), "".join(kept))


class _Display(Watcher):
    """The stages of the thread that shows them, from the outermost to the innermost, and the line.

    Only one thread shows stages at a time; those of others are not shown.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._lock = threading.Lock()
        self._hidden = 0
        self._owner: int | None = None
        self._stages: list[Stage] = []
        self._line: TerminalLine | EventLine | None = None
        self._process = 0  # the one that opened the line: a forked worker of a DataLoader draws nothing
        self._streams = ExitStack()

    # -- stages ---------------------------------------------------------------------------------------------------
    def push(self, current: Stage) -> bool:
        """Begin a stage. Returns True if it is the outermost of its thread, and is to be logged."""
        me = threading.get_ident()
        with self._lock:
            if self._owner not in (None, me) or self._hidden:
                return False
            outermost = not self._stages
            self._owner = me
            self._stages.append(current)
        if outermost:
            self._open()
        self._show()
        return outermost

    def pop(self, current: Stage) -> None:
        """End a stage, and those inside it."""
        with self._lock:
            if current not in self._stages:
                return
            del self._stages[self._stages.index(current) :]
            over = not self._stages
            if over:
                self._owner = None
        if over:
            self._close()
        else:
            self._show()

    def changed(self, current: Stage | None = None) -> None:
        """Show new counts."""
        if self._line is not None and (current is None or current in self._stages):
            self._show()

    def innermost(self) -> Stage | None:
        """Return the innermost stage of this thread, if it is shown."""
        mine = self._line is not None and self._owner == threading.get_ident()
        return self._stages[-1] if mine and self._stages else None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Show nothing that begins in the body."""
        with self._lock:
            self._hidden += 1
        try:
            yield
        finally:
            with self._lock:
                self._hidden -= 1

    # -- bars of other libraries ----------------------------------------------------------------------------------
    def made(self, bar: ForeignBar) -> None:
        current = self.innermost()
        if current is not None and current.total is None and current._counts is None:
            current.relay(bar)

    def closed(self, bar: ForeignBar) -> None:
        for current in list(self._stages):
            if current._counts is bar:
                current.relay(None)

    def write(self, text: str) -> None:
        log.info("%s", text)

    # -- the line -------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        events = os.environ.get(EVENTS) == "events"
        drawn = events or progress_line.is_terminal() or progress_line.is_notebook()
        if not drawn or not self.enabled or _is_disabled():
            return
        self._process = os.getpid()
        if events:
            self._line = EventLine(sys.stderr)
        else:
            file = progress_line.plain_stream(sys.stderr)
            self._streams.enter_context(progress_line.printing_above())
            self._line = progress_line.open_line(file)

    def _close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            progress_line.close_line(line)
            self._streams.close()

    def _show(self) -> None:
        line, stages = self._line, list(self._stages)
        if line is None or not stages or self._process != os.getpid():
            return
        first, last = stages[0], stages[-1]
        counted: Any = next((s for s in reversed(stages) if s.total or s.n or s._counts is not None), last)
        names = [first.what, *([] if first.what.startswith(last.what) else [last.what])]
        if counted._counts is not None:
            counted = counted._counts
            names += [counted.what] if counted.what else []
        note = getattr(counted, "note", "") if isinstance(counted, Shown) else last._note
        line.show(Shown(": ".join(names), counted.n, counted.total, counted.unit, counted.started, note))


_display = _Display()


def _is_disabled() -> bool:
    """Return True if the environment or a library's own switch forbids bars, or another rank shows them."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false", "no", "off"):
        return True
    if os.environ.get("RANK", "0") != "0" and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return True
    from huggingface_hub.utils import are_progress_bars_disabled

    theirs = sys.modules.get("transformers.utils.logging")
    return are_progress_bars_disabled() or (theirs is not None and not theirs.is_progress_bar_enabled())

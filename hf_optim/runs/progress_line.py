"""Where progress is shown: one line of a terminal or a notebook, or events for the process that started this one."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from ..errors import printable
from ..trust.figures import format_count

LONGEST, SHORTEST = 200, 16
BESIDE = 55  # columns for counts, times and the bar
EVENT = "@hf_optim progress "
BAR = "{desc} |{bar:16}| {elapsed} elapsed, {remaining} left{postfix}"
NO_BAR = "{desc}, {elapsed} elapsed{postfix}"


@dataclass(frozen=True)
class Shown:
    """What is shown: ``what`` is being done, ``n`` of ``total`` units since ``started`` (``time.time``), and a note."""

    what: str
    n: float = 0
    total: float | None = None
    unit: str = ""
    started: float = 0.0
    note: str = ""

    def describe(self, columns: int | None) -> str:
        """Return the name of the work with its counts, for a line of ``columns``."""
        counts = ""
        if self.total:
            counts = f": {format_count(self.n)}/{format_count(self.total)} {self.unit}".rstrip()
        elif self.n:
            counts = f": {format_count(self.n)} {self.unit}".rstrip()
        return printable(self.what, max(SHORTEST, columns - BESIDE) if columns else LONGEST) + counts


class TerminalLine:
    """The last line of a terminal, drawn by tqdm; in a notebook, its widget.

    Bars that are on the terminal already (of a loop of the caller) are cleared, and drawn again at the end.
    """

    # Redrawn at most so often; the clock in the line moves once a second.
    INTERVAL, TICK = 0.1, 1.0

    def __init__(self, file: TextIO) -> None:
        from tqdm.std import tqdm

        self._others = [bar for bar in list(getattr(tqdm, "_instances", ())) if not bar.disable and hasattr(bar, "sp")]
        for bar in self._others:
            bar.clear()
        self._lock = tqdm.get_lock()
        self._shown: Shown | None = None
        self._drawn, self._printed_at = False, 0.0
        self._bar = _bar_class()(
            file=file, leave=False, position=0, dynamic_ncols=True, disable=False, bar_format=NO_BAR, delay=1e-9
        )
        self._mid_line = False
        self._stop = threading.Event()
        threading.Thread(target=self._tick, name="hf_optim-progress", daemon=True).start()

    def show(self, shown: Shown) -> None:
        """Draw a line, at once if it is about something else than before."""
        with self._lock:
            now, before = time.time(), self._shown
            self._shown = shown
            same = before is not None and (before.what, before.total) == (shown.what, shown.total)
            if not same or now - self._printed_at >= self.INTERVAL:
                self._draw()

    def interrupt(self, text: str) -> None:
        """Clear the line, since ``text`` is being printed; it is drawn again when a line is complete."""
        with self._lock:
            if self._drawn:
                self._bar.clear()
                self._drawn = False
            self._mid_line = not text.endswith("\n")

    @property
    def lock(self) -> Any:
        """Held while something is printed."""
        return self._lock

    def close(self) -> None:
        """Remove the line."""
        self._stop.set()
        with self._lock:
            if self._drawn:
                self._bar.clear()
            self._bar.close()
        for bar in self._others:
            if not bar.disable:
                bar.refresh()

    def _draw(self) -> None:
        shown, bar = self._shown, self._bar
        if shown is None or self._mid_line:
            return
        bar.bar_format = BAR if shown.total else NO_BAR
        columns = bar.dynamic_ncols(bar.fp)[0] if getattr(bar, "dynamic_ncols", None) else None
        bar.desc, bar.n, bar.total = shown.describe(columns), shown.n, shown.total
        bar.start_t = bar.last_print_t = shown.started
        bar.postfix = printable(shown.note, LONGEST) if shown.note else None
        bar.refresh()
        self._drawn, self._printed_at = True, time.time()

    def _tick(self) -> None:
        while not self._stop.wait(self.TICK):
            with self._lock:
                if not self._stop.is_set():
                    self._draw()


class EventLine:
    """Lines of JSON on standard error, for the display of the process that started this one."""

    INTERVAL = 0.2

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last: tuple[Any, float] = (None, 0.0)

    def show(self, shown: Shown) -> None:
        """Write an event, at once if it is about something else than before."""
        now, about = time.time(), (shown.what, shown.total)
        if about == self._last[0] and now - self._last[1] < self.INTERVAL:
            return
        self._last = about, now
        try:
            self._file.write(f"{EVENT}{json.dumps(asdict(shown))}\n")
            self._file.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any longer

    def close(self) -> None:
        """Do nothing: the reader sees the process end."""


def parse_event(line: str) -> Shown | None:
    """Return what a line of another process's standard error shows; None for an ordinary line."""
    if not line.startswith(EVENT) or len(line) > 10_000:
        return None
    try:
        found = json.loads(line[len(EVENT) :])
        total = found["total"]
        return Shown(
            str(found["what"]),
            float(found["n"]),
            None if total is None else float(total),
            str(found["unit"]),
            float(found["started"]),
            str(found["note"]),
        )
    except (ValueError, TypeError, KeyError):
        return None


class AboveLine:
    """A stream of a terminal: what is written to it stands above the progress line."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = _current
        if line is None:
            return self._stream.write(text)
        with line.lock:
            if text:
                line.interrupt(text)
            written = self._stream.write(text)
            self._stream.flush()
            return written

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_current: TerminalLine | None = None


def open_line(file: TextIO) -> TerminalLine:
    """Show a line on a terminal; only one may be open."""
    global _current
    _current = TerminalLine(file)
    return _current


def close_line(line: TerminalLine | EventLine) -> None:
    """Remove a line that ``open_line`` showed."""
    global _current
    if line is _current:
        _current = None
    line.close()


def plain_stream(stream: Any) -> Any:
    """Return the stream under ``AboveLine``."""
    return stream._stream if isinstance(stream, AboveLine) else stream


@contextmanager
def printing_above() -> Iterator[None]:
    """Print what goes to standard output and standard error, if they are a terminal, above the progress line."""
    replaced = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, AboveLine) and _is_terminal(stream):
            replaced[name] = AboveLine(stream)
            setattr(sys, name, replaced[name])
    try:
        yield
    finally:
        for name, stream in replaced.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, stream._stream)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # closed
        return False


def is_terminal() -> bool:
    """Return True if standard error is a terminal."""
    return sys.stderr is not None and _is_terminal(sys.stderr)


def is_notebook() -> bool:
    """Return True in a notebook, where tqdm draws a widget."""
    if "IPython" not in sys.modules:
        return False
    from tqdm.auto import tqdm

    return tqdm.__mro__[1].__name__ == "tqdm_notebook"


@functools.cache
def _bar_class() -> Any:
    from tqdm.auto import tqdm
    from tqdm.utils import disp_trim

    class Bar(tqdm):  # type: ignore[misc, valid-type]
        """The bar of the line: not silenced as those of others are, and never wider than the terminal."""

        is_hf_optim = True

        def __str__(self) -> str:
            text = super().__str__()
            return disp_trim(text, self.ncols) if self.ncols else text

    return Bar

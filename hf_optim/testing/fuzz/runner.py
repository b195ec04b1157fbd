"""Runs inputs through doors, and judges what comes out."""

from __future__ import annotations

import contextlib
import io
import signal
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ...errors import OptimError
from ...runs.progress import silenced
from .door import Door, StockError, WrongResult, frames_of_ours
from .doors import DOORS
from .examples import Examples

SECONDS = 20.0
MAX_MESSAGE = 1500


# Outcomes that are not findings. ``stock`` is an error of transformers before hf_optim is reached, which a process
# without hf_optim raises for the same files, too; only doors of stock's own classes can have it.
FINE = ("read", "refused", "stock")


class Hang(BaseException):
    """An input took longer than the limit."""


@dataclass(frozen=True)
class Finding:
    """An input that was neither refused nor read right.

    Attributes:
        seed: of the input; ``run_input(door, seed, examples)`` repeats it.
        outcome: ``raw`` (another exception), ``hang``, ``wrong`` (a wrong result), or ``message`` (a
            message that is empty, long or not printable).
        text: the error, and where it was raised.
    """

    door: Door
    seed: str
    outcome: str
    text: str


@dataclass
class Report:
    """What came out: counts by (kind, door, outcome), and the findings."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """Return the counts as text."""
        outcomes = ("read", "refused", "stock", "raw", "hang", "wrong", "message")
        lines = [f"{'input':14}{'door':18}" + "".join(f"{name:>9}" for name in outcomes)]
        for kind, name in dict.fromkeys((kind, name) for kind, name, _ in sorted(self.counts)):
            lines.append(f"{kind:14}{name:18}" + "".join(f"{self.counts[kind, name, o]:9}" for o in outcomes))
        total = {o: sum(n for (_, _, outcome), n in self.counts.items() if outcome == o) for o in outcomes}
        return "\n".join([*lines, f"{'all':14}{'':18}" + "".join(f"{total[o]:9}" for o in outcomes)])


def run(
    inputs: int,
    seed: int,
    doors: Sequence[Door] = DOORS,
    seconds: float = SECONDS,
    verbose: bool = False,
    examples: Examples | None = None,
) -> Report:
    """Run ``inputs`` inputs, in turn through each door.

    Args:
        inputs: how many.
        seed: of the mutations.
        doors: which doors.
        seconds: of processor time that one input may take; six times as long in all.
        verbose: print findings at once.
        examples: None makes new ones.
    """
    report = Report()
    with tempfile.TemporaryDirectory() as folder, _quiet(), contextlib.ExitStack() as stack:
        examples = examples or stack.enter_context(contextlib.closing(Examples(Path(folder))))
        for number in range(inputs):
            door = doors[number % len(doors)]
            outcome, text = run_input(door, f"{seed}-{number}", examples, seconds)
            report.counts[door.kind, door.name, outcome] += 1
            if outcome not in FINE:
                report.findings.append(Finding(door, f"{seed}-{number}", outcome, text))
                if verbose:
                    print(f"{door.kind} {door.name} {seed}-{number} {outcome}: {text}", flush=True)
    return report


def run_input(door: Door, seed: str, examples: Examples, seconds: float = SECONDS) -> tuple[str, str]:
    """Run one input. Returns its outcome (one of ``FINE`` or of ``Finding``), and the error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _limit(seconds), contextlib.redirect_stdout(io.StringIO()):
                door.enter(examples, Path(folder), Random(f"{door.kind} {door.name} {seed}"))
        except OptimError as error:
            text = str(error)
            good = 0 < len(text) <= MAX_MESSAGE and text.isprintable()
            return ("refused", text) if good else ("message", ascii(text[:300]))
        except Hang:
            return "hang", f"more than {seconds:g} s"
        except WrongResult as error:
            return "wrong", str(error)
        except StockError as error:
            return "stock", str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in (*frames_of_ours(error)[-2:], last)]
            return "raw", f"{type(error).__name__}: {str(error)[:200]!r} at {' > '.join(where)}"
    return "read", ""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise ``Hang`` after ``seconds`` of processor time, or six times as long in all, where signals can be used."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 6 * seconds))
    former = [
        (timer, sign, signal.signal(sign, stop), signal.setitimer(timer, limit)[0]) for timer, sign, limit in timers
    ]
    try:
        yield
    finally:
        for timer, sign, handler, left in former:
            signal.setitimer(timer, 0)
            signal.signal(sign, handler)
            if left:  # that of pytest-timeout
                signal.setitimer(timer, left)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the libraries print and log about bad input."""
    import logging

    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), silenced(everywhere=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        theirs.set_verbosity(level)

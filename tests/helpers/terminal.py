"""A terminal: standard output and standard error of this process or of another, and what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager

BAR = re.compile(r"elapsed")


class Terminal:
    """What was written to a terminal of ``columns`` columns."""

    def __init__(self, columns=100):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.columns = columns
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:
                return
            if not part:
                return
            self._parts.append(part)

    def close(self):
        os.close(self.slave)
        self._reader.join(10)
        os.close(self.master)

    @property
    def written(self):
        """All that was written, with carriage returns."""
        return b"".join(self._parts).decode(errors="replace").replace("\r\n", "\n")

    @property
    def frames(self):
        """Every state of a progress line that was drawn."""
        return [part.strip() for part in re.split(r"[\r\n]", self.written) if BAR.search(part)]

    @property
    def screen(self):
        """The lines that are left at the end."""
        lines = []
        for line in self.written.split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@contextmanager
def bars_allowed(monkeypatch):
    """Undo every switch that hides progress, and each update is drawn; for the time of a test."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as theirs

    for name in ("TQDM_DISABLE", "RANK", "WORLD_SIZE", "HF_OPTIM_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("hf_optim.runs.progress._display.enabled", True)
    monkeypatch.setattr("hf_optim.runs.progress_line.TerminalLine.INTERVAL", 0.0)
    hub, transformers = not are_progress_bars_disabled(), theirs.is_progress_bar_enabled()
    theirs.enable_progress_bar()
    try:
        yield
    finally:
        if not transformers:
            theirs.disable_progress_bar()
        if not hub:
            disable_progress_bars()


@contextmanager
def terminal(columns=100, stdout=True):
    """Make standard error (and standard output) of this process a terminal."""
    opened = Terminal(columns)
    before = sys.stdout, sys.stderr
    files = [os.fdopen(os.dup(opened.slave), "w", encoding="utf-8", buffering=1) for _ in range(2)]
    if stdout:
        sys.stdout = files[0]
    sys.stderr = files[1]
    try:
        yield opened
    finally:
        sys.stdout, sys.stderr = before
        for file in files:
            file.close()
        opened.close()


def run_on_terminal(command, env, columns=100):
    """Run a command with its three streams on a terminal; returns its exit status and the terminal."""
    opened = Terminal(columns)
    done = subprocess.run(command, env=env, stdin=opened.slave, stdout=opened.slave, stderr=opened.slave, check=False)
    opened.close()
    return done.returncode, opened

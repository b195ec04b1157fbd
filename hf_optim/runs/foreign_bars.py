"""Progress bars of other libraries: silenced while a display of ours is on, and read, so that it can show their counts.

transformers, compressed-tensors, accelerate, datasets and huggingface_hub all draw with tqdm, each through a subclass
or an alias of its own; compressed-tensors has no switch. So the constructor of tqdm's base class is replaced while
``captured`` is active anywhere, and put back afterwards. Only bars made inside ``captured`` are affected: those of
other threads are drawn as always.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

DISABLE = 10  # position of ``disable`` among the arguments of tqdm's constructor

_lock = threading.Lock()
_users = 0
_everywhere = 0
_default: Watcher | None = None  # of threads without their own, while ``_everywhere``
_original: Any = None
_here = threading.local()


class Watcher:
    """What is told about captured bars; this one ignores them."""

    def made(self, bar: ForeignBar) -> None:
        """Take note of a new bar."""

    def changed(self) -> None:
        """Take note of a bar's new counts."""

    def closed(self, bar: ForeignBar) -> None:
        """Take note of a bar's end."""

    def write(self, text: str) -> None:
        """Take a line that was to be printed above a bar."""


class ForeignBar:
    """The counts of a bar that another library made, and that is not drawn.

    Attributes:
        n, total: its counts; ``total`` is None if it is unknown.
        unit: what it counts.
        what: empty: the stage that shows it has a name.
        started: when it was made, on the clock of ``time.time``.
    """

    what = ""

    def __init__(self, bar: Any, unit: str, watcher: Watcher) -> None:
        self._bar = weakref.ref(bar)
        self._watcher = watcher
        self.unit = "" if unit == "it" else unit
        self.started = time.time()

    @property
    def n(self) -> float:
        return getattr(self._bar(), "n", 0) or 0

    @property
    def total(self) -> float | None:
        return getattr(self._bar(), "total", None)

    def changed(self) -> None:
        self._watcher.changed()

    def close(self) -> None:
        self._watcher.closed(self)

    def write(self, text: str) -> None:
        self._watcher.write(text)


@contextmanager
def captured(watcher: Watcher, everywhere: bool = False) -> Iterator[None]:
    """Silence the bars that are made in this thread (``everywhere``: in any thread), and report them to ``watcher``."""
    before = getattr(_here, "watcher", None)
    _install(watcher if everywhere else None)
    _here.watcher = watcher
    try:
        yield
    finally:
        _here.watcher = before
        _uninstall(everywhere)


def _install(default: Watcher | None) -> None:
    global _users, _everywhere, _original, _default
    from tqdm.std import tqdm

    with _lock:
        _users += 1
        if default is not None:
            _everywhere += 1
            _default = default
        if _users == 1:
            _original = tqdm.__dict__["__init__"]
            tqdm.__init__ = _constructor(_original)  # type: ignore[method-assign]


def _uninstall(everywhere: bool) -> None:
    global _users, _everywhere, _original, _default
    from tqdm.std import tqdm

    with _lock:
        _users -= 1
        if everywhere:
            _everywhere -= 1
            _default = _default if _everywhere else None
        if _users == 0:
            # One that somebody has put around ours since stays: ours then passes every call on.
            if getattr(tqdm.__dict__["__init__"], "_hf_optim", False):
                tqdm.__init__ = _original  # type: ignore[method-assign]
            _original = None


def _constructor(original: Any) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain = original.__get__(self, type(self))
        watcher = getattr(_here, "watcher", None) or _default
        given = args[DISABLE] if len(args) > DISABLE else kwargs.get("disable")
        if watcher is None or given or getattr(self, "is_hf_optim", False):
            plain(*args, **kwargs)
            return
        if len(args) > DISABLE:
            args = (*args[:DISABLE], True, *args[DISABLE + 1 :])
        else:
            kwargs["disable"] = True
        unit = str(kwargs.get("unit", "it"))
        plain(*args, **kwargs)
        _watch(self, ForeignBar(self, unit, watcher))
        watcher.made(self.hf_optim_bar)

    __init__._hf_optim = True  # type: ignore[attr-defined]
    return __init__


def _watch(bar: Any, watched: ForeignBar) -> None:
    """Count in a bar that is disabled, which by itself would not. The bar must not refer to itself."""
    own = weakref.ref(bar)

    def update(n: float | None = 1) -> None:
        found = own()
        if found is not None:
            found.n += n or 0
            watched.changed()

    def refresh(*args: Any, **kwargs: Any) -> None:
        watched.changed()

    def write(text: str, *args: Any, **kwargs: Any) -> None:
        watched.write(str(text))

    bar.hf_optim_bar = watched
    bar.update, bar.refresh, bar.close, bar.write = update, refresh, watched.close, write
    if bar.iterable is not None:
        bar.iterable = _Counted(bar.iterable, own, watched)


class _Counted:
    """An iterable whose items are counted in a bar. Other attributes are those of the iterable."""

    def __init__(self, iterable: Iterable[Any], bar: weakref.ref[Any], watched: ForeignBar) -> None:
        self._iterable, self._bar, self._watched = iterable, bar, watched

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._iterable:
                yield item
                bar = self._bar()
                if bar is not None:
                    bar.n += 1
                    self._watched.changed()
        finally:
            self._watched.close()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterable, name)

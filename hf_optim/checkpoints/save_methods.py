"""The methods of an optimized model that replace those of its class, without the model referring to itself.

A method bound to a model in the model's own dict is a cycle: the memory of a deleted model would be kept until the
garbage collector runs. So the methods are installed in the class of the model, where they apply to models that have a
run; others of the class get the former method. They are removed with the last model of the class that needs them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..runs.run import find_run
from ..toolkit.exits import exits_of

_OWN = "_hf_optim_own"  # attribute of a dispatcher: what the class itself had under its name, or None
Methods = Mapping[str, Callable[..., Any]]

_installed: dict[type, dict[str, Callable[..., Any]]] = {}
"""Class -> the dispatchers in it, by name."""
_users: dict[type, set[weakref.ref[nn.Module]]] = {}
"""Class -> the models of it that need the dispatchers."""
_lock = threading.RLock()  # re-entrant: a model may be freed, which calls ``_leave``, while the lock is held
_former: ContextVar[frozenset[tuple[int, str]]] = ContextVar("former", default=frozenset())
"""The models, by id, and methods whose former method runs."""


def install(model: nn.Module, methods: Methods) -> None:
    """Install methods ``name -> function(model, ...)`` in the class of a model, for models that have a run."""
    cls = type(model)
    with _lock:
        if cls not in _installed:
            _installed[cls] = {name: _dispatcher(cls, name, method) for name, method in methods.items()}
            for name, dispatcher in _installed[cls].items():
                setattr(cls, name, dispatcher)
        for name, dispatcher in _installed[cls].items():
            if name not in vars(cls):  # someone who had replaced the method of the class has undone that since
                setattr(cls, name, dispatcher)
        _users.setdefault(cls, set()).add(weakref.ref(model, functools.partial(_leave, cls)))


def uninstall(model: nn.Module) -> None:
    """Remove the methods from the classes in which they were installed for this model, if no other model needs them."""
    own = weakref.ref(model)
    with _lock:
        for cls in [cls for cls, users in list(_users.items()) if own in users]:
            _leave(cls, own)


def call_former(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that the class of a model has without ``install``."""
    cls = type(model)
    method = getattr(model, name)
    if cls in _installed:
        method = _inherited(cls, _installed[cls][name].__dict__[_OWN], model, name)
    token = _former.set(_former.get() | {(id(model), name)})
    try:
        return method(*args, **kwargs)
    finally:
        _former.reset(token)


def _inherited(cls: Any, own: Any, model: Any, name: str) -> Any:
    """Return the method of a model without the dispatcher in ``cls``, which had ``own`` (or nothing) in its place."""
    return getattr(super(cls, model), name) if own is None else own.__get__(model, type(model))


def _dispatcher(cls: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    own = cls.__dict__.get(name)
    while own is not None and _OWN in getattr(own, "__dict__", ()):
        own = own.__dict__[_OWN]  # a dispatcher that was put back into the class after it had been removed

    @functools.wraps(getattr(cls, name))
    def dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (id(self), name) not in _former.get() and (find_run(self) is not None or exits_of(self) is not None):
            return method(self, *args, **kwargs)
        return _inherited(cls, own, self, name)(*args, **kwargs)

    dispatch.__dict__[_OWN] = own
    return dispatch


def _leave(cls: Any, user: weakref.ref[nn.Module]) -> None:
    with _lock:
        users = _users.get(cls, set())
        users.discard(user)
        if users:
            return
        _users.pop(cls, None)
        for name, dispatcher in _installed.pop(cls, {}).items():
            if cls.__dict__.get(name) is not dispatcher:
                continue  # wrapped by someone else since: without a run it only passes calls on
            own = dispatcher.__dict__[_OWN]
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)

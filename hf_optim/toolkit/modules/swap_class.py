"""Change the class of a module in place, and undo it.

The module stays the same object, so hooks on it, references to it and its parameters in an optimizer stay valid.
Parameters keep their names, so checkpoints of the model do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

FORMER = "_hf_optim_former"  # attribute that holds the former class, and the names of the attributes to remove

M = TypeVar("M", bound=nn.Module)


def swap_class(module: nn.Module, new: type[M], **attributes: Any) -> M:
    """Change the class of ``module`` to ``new`` in place, and return it.

    Args:
        module: a module whose layout ``new`` can work with, usually an instance of a base class of ``new``.
        new: its class from now on. ``__init__`` is not called.
        attributes: set on the module as plain attributes, and removed by ``restore_class``. Tensors among them are
            neither parameters nor buffers.
    """
    vars(module).update(attributes, **{FORMER: (type(module), tuple(attributes))})
    module.__class__ = new
    return cast(M, module)


def restore_class(module: nn.Module) -> nn.Module:
    """Undo ``swap_class``, and return the module. Raises ``KeyError`` if its class was not swapped."""
    former, names = vars(module).pop(FORMER)
    for name in names:
        vars(module).pop(name, None)
    module.__class__ = former
    return module


def subclass_of(former: Any, forward: Callable[..., Any], rebuild: Callable[[Any], Any]) -> Any:
    """Return a subclass with another forward that has the name of its base class, and is the same to transformers.

    ``rebuild`` of the base class returns an empty module of the subclass, for copies and pickles.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return rebuild, (former,), vars(self)

    own = {"__module__": former.__module__, "__qualname__": former.__qualname__}
    return type(former.__name__, (former,), {"forward": forward, "__reduce_ex__": reduce, **own})

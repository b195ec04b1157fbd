"""Views of a model: the same modules and tensors, with other modules in a few places.

A view is a shallow copy of the modules on the path to what differs. The model is not changed, so that threads can run
views of one model at the same time, and a view costs no memory to speak of.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError
from ..offloading import STATE

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def view(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """Return a view of a model in which the modules named by ``changes`` are others.

    Hooks on the modules along the path do not run in it: who watches the model does not see its views. Raises
    ``ModelError`` for a module on the path whose forward was replaced on the object, as accelerate does to move
    weights between devices: that forward would run the model, not the view.
    """
    root = _shallow(model)
    copied = {""}
    for name, module in changes.items():
        parent, path = root, ""
        *above, last = name.split(".")
        for part in above:
            path = f"{path}.{part}" if path else part
            if path not in copied:
                parent._modules[part] = _shallow(parent._modules[part])  # type: ignore[arg-type]
                copied.add(path)
            parent = parent._modules[part]  # type: ignore[assignment]
        parent._modules[last] = module
    return root


def _shallow(module: nn.Module) -> nn.Module:
    own = vars(module).get("forward")
    if own is not None and not _is_wrapped(module, own):
        raise ModelError(
            f"the forward of {type(module).__name__} was replaced on the object (accelerate does that to move weights "
            "between devices), so its blocks cannot be run in parts: load the model on one device"
        )
    made = object.__new__(type(module))
    # The state of an offloaded block stays: its view waits for the weights, too.
    held = {key: value for key, value in vars(module).items() if key == STATE or not key.startswith("_hf_optim")}
    vars(made).update(held)
    if own is not None:
        vars(made)["forward"] = MethodType(own.__func__, made)
    vars(made)["_modules"] = dict(module._modules)
    for name in _HOOKS:
        if held.get(name):
            vars(made)[name] = OrderedDict()
    return made


def _is_wrapped(module: nn.Module, forward: Any) -> bool:
    """Return True if a forward that is kept on a module is its class's, wrapped as a function of the module.

    accelerate does this for mixed precision; bound to a view, it runs the view.
    """
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return bound and inspect.unwrap(forward.__func__) is inspect.unwrap(type(module).forward)


def list_with(blocks: nn.Module, members: Sequence[nn.Module]) -> nn.Module:
    """Return a view of a block list with other members, in the same places."""
    made = _shallow(blocks)
    vars(made)["_modules"] = dict(zip(blocks._modules, members, strict=True))
    return made


class StandIn(nn.Module):
    """Is in the place of a block, whose attributes it has (kinds of attention, say), and returns what it is given.

    ``hidden`` None returns the block's input; ``width`` is the number of values that the block returns, 0 for a tensor
    that is not in a tuple.
    """

    def __init__(self, block: nn.Module, values: int, hidden: Tensor | None = None) -> None:
        super().__init__()
        vars(self)["_block"], vars(self)["_values"], vars(self)["_hidden"] = block, values, hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = vars(self)["_hidden"]
        return as_returned(first_state(args, kwargs) if hidden is None else hidden, vars(self)["_values"])


def first_state(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a block."""
    if args:
        return args[0]
    named = kwargs.get("hidden_states")
    return named if named is not None else next(value for value in kwargs.values() if isinstance(value, Tensor))


def as_returned(hidden: Tensor, values: int) -> Any:
    """Return a hidden state as a block returns it."""
    return (hidden, *[None] * (values - 1)) if values else hidden


def returned_state(output: Any) -> Tensor:
    """Return the hidden state in what a block returned."""
    return output[0] if isinstance(output, tuple) else output

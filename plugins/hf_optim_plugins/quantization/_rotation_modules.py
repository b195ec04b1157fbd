"""What is rotated at run time, by Hadamard transforms of blocks of channels, where no weight can take the rotation.

- The input of a linear layer, behind an activation function. The weight of the layer holds the same rotation:
  ``(x H) (W H)^T = x W^T``.
- Queries and keys, behind the rotary embedding, which does not commute with the rotation. Scores stay as they are,
  ``(q H) (k H)^T = q k^T``; a key/value cache holds the rotated keys.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import ReplacedModules, mixed

from ._hadamard_kernel import transform_by_kernel

LEAST_BLOCK = 256  # channels; smaller blocks spread an outlier over few others


def block_of(width: int) -> int:
    """Return the channels of a block: the largest power of two that divides the width, if it is large enough.

    Otherwise the largest power of two up to the width: two blocks that overlap then cover it.
    """
    even = width & -width
    return even if even >= min(LEAST_BLOCK, width) else 1 << (width.bit_length() - 1)


def hadamard_blocks(x: Tensor, block: int) -> Tensor:
    """Return ``x`` with every ``block`` neighbouring channels times Sylvester's matrix over ``sqrt(block)``.

    ``x`` is ``[..., channels]``; ``block`` is a power of two that divides the channels. Sums are taken in float32 (in
    float64 for float64) and rounded once.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    parts = wide.unflatten(-1, (-1, block))
    step = 1
    while step < block:
        pairs = parts.unflatten(-1, (-1, 2, step))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        parts = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return (parts.flatten(-2) * block**-0.5).to(x.dtype)


def rotated_input(x: Tensor, block: int, inverse: bool = False) -> Tensor:
    """Return ``x`` ``[..., channels]`` rotated by Hadamard transforms of ``block`` channels, a power of two.

    If blocks do not fill the channels, the first ``block`` channels are transformed, then the last ones; with
    ``inverse`` in the other order, which undoes it.
    """
    width = x.shape[-1]
    if width % block == 0:
        return _transformed(x, block)
    for last in (True, False) if inverse else (False, True):
        if last:
            x = torch.cat([x[..., : width - block], _transformed(x[..., width - block :], block)], -1)
        else:
            x = torch.cat([_transformed(x[..., :block], block), x[..., block:]], -1)
    return x


def _transformed(x: Tensor, block: int) -> Tensor:
    found = transform_by_kernel(x, block)
    return hadamard_blocks(x, block) if found is None else found


class RotatedInput(nn.Module):
    """A linear layer whose input is rotated first. ``inner`` is the layer; for ``block`` see ``rotated_input``."""

    def __init__(self, inner: nn.Module, block: int) -> None:
        super().__init__()
        self.inner, self.block = inner, block

    def forward(self, x: Tensor) -> Tensor:
        # On a kernel that multiplies int8 inputs, one kernel before it rotates them and rounds them to their codes.
        at_once = getattr(self.inner, "rotated_forward", None)
        found = None if at_once is None else at_once(x, self.block)
        return self.inner(rotated_input(x, self.block)) if found is None else found

    def extra_repr(self) -> str:
        return f"block={self.block}"

    @torch.no_grad()
    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock layer, its weight rotated back, and True: it computes the same."""
        weight: Any = self.inner.weight
        transposed = isinstance(self.inner, Conv1D)
        stock = rotated_input(weight.T if transposed else weight, self.block, inverse=True)
        weight.copy_(stock.T if transposed else stock)
        return self.inner, True


class RotatedScores:
    """Mixin of the class of an attention: queries and keys are rotated behind the rotary embedding.

    A subclass of it and of the attention (``mixed``) has the forward of the attention, which reads another function
    under the name of that of the rotary embedding.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__mro__[1] is RotatedScores:  # a subclass of such a class inherits or calls that forward
            cls.forward = forward_with_rotation(cls.__mro__[2])  # type: ignore[attr-defined]

    def to_dense(self) -> tuple[Any, bool]:
        """Return the stock module, this one in its former class, and True: it computes the same."""
        self.__class__ = type(self).__mro__[2]  # type: ignore[assignment]
        return self, True


def rotary_function(attention: type) -> str | None:
    """Return the name of the function by which the forward of a class turns queries and keys; None if it has none.

    Its first parameters are queries and keys and the next one is not values: these three names begin all over
    transformers with q, k and another letter.
    """
    forward: Any = inspect.unwrap(attention.forward)  # type: ignore[attr-defined]
    found = []
    for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
        turn = forward.__globals__.get(name)
        if "rotary" in name and inspect.isfunction(turn):
            first = [each[0] for each in inspect.signature(turn).parameters][:3]
            found += [name] if first[:2] == ["q", "k"] and first[2:] != ["v"] else []
    return found[0] if len(found) == 1 else None


def forward_with_rotation(attention: type) -> Callable[..., Any]:
    """Return the forward of a class of attention, with queries and keys rotated behind the rotary embedding."""
    name = rotary_function(attention)
    if name is None:
        raise ValueError(f"the forward of {attention.__name__} has no function that turns queries and keys")
    forward = inspect.unwrap(attention.forward)  # type: ignore[attr-defined]
    turn = forward.__globals__[name]

    def turned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = turn(*args, **kwargs)
        return rotated_input(query, block_of(query.shape[-1])), rotated_input(key, block_of(key.shape[-1]))

    # Without the name of its module, where torch.compile would look for the function instead.
    own = {each: value for each, value in forward.__globals__.items() if each != "__name__"} | {name: turned}
    made = types.FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__, made.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return made


class RotatedInputModel(ReplacedModules):
    """Base of a model class whose modules in ``config.rotated_inputs`` rotate: linear layers and attentions."""

    replaced_field = "rotated_inputs"

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        if "block" in entry:
            return RotatedInput(module, entry["block"])
        module.__class__ = mixed(RotatedScores, type(module))  # type: ignore[arg-type]
        return module

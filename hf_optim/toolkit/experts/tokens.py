"""Which rows of a mixture layer are tokens and which padding, although experts get their tokens without a mask.

The part of the model that holds the layers notes the shape and the mask of its batch before it computes. Its class is
changed for that, in place: the new class has the former one's name and forward, and is the same class to transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ..modules.swap_class import restore_class, subclass_of, swap_class
from . import registry

TOKENS = "_hf_optim_tokens"
INPUTS = ("input_ids", "inputs_embeds")
# An additive mask adds this, or less, to the scores of what must not be attended to.
MASKED_SCORE = -1e3


@dataclass(eq=False)
class BatchTokens:
    """The batch that runs through a part of a model.

    Attributes:
        shape: rows and positions; None if unknown.
        real: bool ``[B, N]``, True for tokens, False for padding; None if there is no mask.
    """

    shape: tuple[int, int] | None = None
    real: Tensor | None = None


def note_tokens(module: nn.Module) -> BatchTokens:
    """Let a module note the tokens of each of its batches; return where it notes them. Undone by ``forget_tokens``."""
    tokens = BatchTokens()
    former: Any = type(module)
    swap_class(module, _noting(former), **{TOKENS: tokens})
    registry.use(module)
    return tokens


def forget_tokens(module: nn.Module) -> None:
    """Undo ``note_tokens``."""
    restore_class(module)
    registry.drop(module)


def is_noting(module: nn.Module) -> bool:
    """Return True after ``note_tokens``."""
    return TOKENS in vars(module)


@functools.cache
def _noting(former: Any) -> Any:
    """Return the subclass of a class of modules that notes tokens."""
    places = {name: place for place, name in enumerate(list(inspect.signature(former.forward).parameters)[1:])}

    def argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        place = places.get(name)
        return args[place] if place is not None and place < len(args) else kwargs.get(name)

    @functools.wraps(former.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = vars(self)[TOKENS]
        inputs = next((x for name in INPUTS if (x := argument(name, args, kwargs)) is not None), None)
        tokens.shape = None if inputs is None else tuple(inputs.shape[:2])
        tokens.real = (
            None if inputs is None else real_tokens(argument("attention_mask", args, kwargs), *inputs.shape[:2])
        )
        return former.forward(self, *args, **kwargs)

    return subclass_of(former, forward, _rebuild)


def _rebuild(former: Any) -> Any:
    """Return an empty module of the subclass, for copies and pickles of a model."""
    cls = _noting(former)
    module = cls.__new__(cls)
    registry.use(module)
    return module


def real_tokens(mask: Any, rows: int, positions: int) -> Tensor | None:
    """Return bool ``[rows, positions]``, True for tokens, from the attention mask of a forward; None if all are.

    ``[B, S]`` masks name keys, of which the inputs are the last. In a mask of queries and keys ``[B, H, Q, K]``,
    boolean or additive, padding is a position that does not attend to itself or, with a cache, one that attends to
    nothing; in a mapping of masks by kind of layer, that of full attention counts. Raises ``ModelError`` for another
    form.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ModelError(
            f"an expert capacity leaves padding out, and cannot find it in a {type(mask).__name__}: pass a mask [B, T]"
        )
    if mask.dim() == 2:
        return mask[:, -positions:] != 0
    attends = mask if mask.dtype == torch.bool else mask > MASKED_SCORE
    square = mask.shape[-1] == mask.shape[-2]
    seen = attends.diagonal(dim1=-2, dim2=-1).any(1) if square else attends.any(-1).any(1)
    return seen.expand(rows, -1)

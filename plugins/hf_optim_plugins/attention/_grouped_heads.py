"""Attention whose query heads share key/value heads, in classes of transformers that have one of each per head.

This file is stored beside checkpoints, so it imports only torch and transformers.

- Separate projections of keys and values become narrower, and the class splits what they return into fewer heads.
- Where a projection is fused with others, or the class fixes the number of heads (OPT, GPT-NeoX), ``SharedRows``
  computes each shared head once and repeats it in the order that the class expects. Before keys and values reach a
  cache, ``OneOfEach`` drops the copies again, so that a cache holds each shared head once.

Attention itself gets ``[B, heads, T, d]`` queries and ``[B, shared heads, S, d]`` keys and values, as in the classes of
transformers with ``num_key_value_heads``. ``eager`` functions of the other classes expect equal numbers, so ``eager``
repeats the heads first, under the name ``hf_optim_shared_heads``.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import RefusedByStock, ReplacedModules

EAGER = "hf_optim_shared_heads"
CACHES = ("cache", "past_key_values", "layer_past", "past_key_value")
"""Names under which attention modules take a cache."""


def narrow(layer: Any, rows: int) -> nn.Module:
    """Return a linear layer like ``layer`` with another number of outputs, its weights not set."""
    about = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    with torch.device("meta"):
        if isinstance(layer, Conv1D):
            made: nn.Module = Conv1D(rows, layer.weight.shape[0])
        else:
            made = nn.Linear(layer.weight.shape[1], rows, bias=layer.bias is not None)
    for name, parameter in list(made.named_parameters()):
        empty = torch.empty(parameter.shape, **about)
        setattr(made, name, nn.Parameter(empty, requires_grad=layer.weight.requires_grad))
    return made.train(layer.training)


class SharedRows(nn.Module):
    """A projection that computes the rows of shared heads once, and repeats them in what it returns.

    Attributes:
        linear: the projection. Its rows are those of the first part, of all its heads, then of the next part.
        entry: ``heads`` of what is returned; ``groups``, heads that share one; ``parts``, for each of them the rows of
            a head and whether it is shared; ``by_head``, whether the parts of one head are returned next to each other
            (GPT-NeoX) or those of one part (GPT-2).
    """

    def __init__(self, linear: nn.Module, entry: dict[str, Any]) -> None:
        super().__init__()
        self.linear, self.entry = linear, entry

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., rows]`` for ``x`` ``[..., in]``."""
        heads, groups, parts = (self.entry[name] for name in ("heads", "groups", "parts"))
        sizes = [width * (heads // groups if shared else heads) for width, shared in parts]
        pieces = []
        for part, (width, shared) in zip(self.linear(x).split(sizes, dim=-1), parts, strict=True):
            piece = part.unflatten(-1, (-1, width))
            pieces.append(repeat(piece, groups, piece.dim() - 2) if shared else piece)
        if self.entry["by_head"]:
            return torch.cat(pieces, dim=-1).flatten(-2)
        return torch.cat([piece.flatten(-2) for piece in pieces], dim=-1)


def repeat(heads: Tensor, groups: int, dim: int) -> Tensor:
    """Return each entry along ``dim`` ``groups`` times, next to each other."""
    shape = [-1] * (heads.dim() + 1)
    shape[dim + 1] = groups
    return heads.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


class OneOfEach:
    """Stands for the cache of an attention whose heads are repeated: stores one of each group of equal heads."""

    def __init__(self, cache: Any, groups: int) -> None:
        self._cache, self._groups = cache, groups

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, shared heads, S, d]``, of the tokens in the cache too."""
        key_states, value_states = key_states[:, :: self._groups], value_states[:, :: self._groups]
        if self._cache is None:
            return key_states, value_states
        return self._cache.update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class BothOfEach(EncoderDecoderCache):
    """Stands for the two caches of a decoder with cross-attention, each of them ``OneOfEach``."""

    def __init__(self, cache: EncoderDecoderCache, groups: int) -> None:
        self.self_attention_cache = OneOfEach(cache.self_attention_cache, groups)  # type: ignore[assignment]
        self.cross_attention_cache = OneOfEach(cache.cross_attention_cache, groups)  # type: ignore[assignment]
        self.is_updated = cache.is_updated


class DropsCopies:
    """Mixin of an attention class whose heads are repeated: its cache, or the absence of one, is ``OneOfEach``.

    Attributes:
        arguments: names of the arguments of the forward.
    """

    arguments: tuple[str, ...]
    num_key_value_groups: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        name = next((name for name in CACHES if name in given), None)
        name = name or next(name for name in CACHES if name in self.arguments)
        cache = given.get(name)
        stands = BothOfEach if isinstance(cache, EncoderDecoderCache) else OneOfEach
        given[name] = stands(cache, self.num_key_value_groups)  # type: ignore[arg-type]
        return super().forward(**given)  # type: ignore[misc]


@memoize
def dropping_copies(attention: Any) -> type[nn.Module] | None:
    """Return a subclass of an attention class that drops copies of heads before they reach a cache.

    None if the class takes no cache.
    """
    arguments = tuple(inspect.signature(attention.forward).parameters)[1:]
    if not set(CACHES).intersection(arguments):
        return None
    fields = {"arguments": arguments, "__module__": __name__}
    made = type(f"Shared{attention.__name__}", (DropsCopies, attention), fields)
    globals()[made.__name__] = made  # so that it can be pickled
    return made


def share_heads(attention: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """Set, on an attention module, how many query heads share a key/value head; return it."""
    own: Any = type(attention)
    shared = dropping_copies(own) if entry["repeats"] else own
    if shared is not None:  # else the class, which has no cache, computes with the repeated heads
        attention.num_key_value_groups = entry["groups"]
        attention.__class__ = shared
    return attention


def replacement_of(module: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """Return what takes the place of a module: ``entry`` is its one in the config, of one of three kinds.

    ``attention``: query heads share; ``narrow``: a projection with ``rows`` rows; ``repeat``: one that repeats them.
    Raises ``ValueError`` for an entry that does not fit the module.
    """
    kind = entry.get("kind")
    if kind == "attention" and _is_count(entry.get("groups")) and not isinstance(module, (nn.Linear, Conv1D)):
        return share_heads(module, entry)
    if kind == "narrow" and _fits(module, entry.get("rows")):
        return narrow(module, entry["rows"])
    if kind == "repeat" and _fits(module, entry.get("rows")) and _fits(module, repeated_rows(entry)):
        return SharedRows(narrow(module, entry["rows"]), entry)
    raise ValueError(f"config.mqa does not describe a {type(module).__name__}: {str(entry)[:200]}")


def repeated_rows(entry: dict[str, Any]) -> int:
    """Return the rows that a projection of kind ``repeat`` returns; 0 for an entry with other sizes than its own."""
    heads: Any = entry.get("heads")
    groups: Any = entry.get("groups")
    parts: Any = entry.get("parts")
    if not (_is_count(heads) and _is_count(groups) and isinstance(parts, list) and heads % groups == 0):
        return 0
    if not all(isinstance(part, list) and len(part) == 2 and _is_count(part[0]) for part in parts):
        return 0
    kept = sum(width * (heads // groups if shared else heads) for width, shared in parts)
    return sum(width * heads for width, _ in parts) if kept == entry["rows"] else 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _fits(layer: Any, rows: Any) -> bool:
    """Return True if a linear layer has at least ``rows`` rows."""
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return False
    return _is_count(rows) and rows <= layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]


class GroupedModules(ReplacedModules):
    """Base of a model class in which query heads share key/value heads, as ``config.mqa`` says."""

    replaced_field = "mqa"

    def replacement(self, module: nn.Module, entry: dict[str, Any], field: dict[str, Any]) -> nn.Module:
        return replacement_of(module, entry)


class GroupedConfig(RefusedByStock):
    """Base of a configuration class whose ``eager`` attention repeats shared heads."""

    @property
    def _attn_implementation(self) -> str | None:
        requested = self._attn_implementation_internal
        return EAGER if requested == "eager" else requested

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        RefusedByStock._attn_implementation.fset(self, "eager" if value == EAGER else value)  # type: ignore[attr-defined]


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Repeat shared heads, and call the eager attention of the module's class.

    ``query`` is ``[B, H, T, d]``, ``key`` and ``value`` are ``[B, shared heads, S, d]``.
    """
    stock = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    forward = getattr(sys.modules[stock.__module__], "eager_attention_forward", None)
    if forward is None:
        raise ValueError(f"{stock.__name__} has no eager attention: set attn_implementation='sdpa'")
    groups = query.shape[1] // key.shape[1]
    return forward(module, query, repeat(key, groups, 1), repeat(value, groups, 1), attention_mask, **kwargs)


def register() -> None:
    """Register ``eager`` with shared heads. Repeated calls have no further effect."""
    AttentionInterface.register(EAGER, eager_attention)
    AttentionMaskInterface.register(EAGER, AttentionMaskInterface()["eager"])


register()

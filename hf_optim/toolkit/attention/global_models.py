"""Models with tokens that are global in their row: found from the batch, and handed to the attention function.

transformers passes keywords of a model's ``forward`` on to its attention function. So the class of the body finds the
global tokens of a batch and passes them as one more keyword; nothing is kept between calls, and what is computed again
in a backward gets the same keywords. A module of attention with projections of their own for global tokens passes its
input on in the same way.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.mixed_classes import mixed
from .attachment import FIELD, Attachment, Builder
from .global_tokens import BatchGlobals, Pieces, attend_globally
from .head_patterns import HeadPatterns
from .pattern import Pattern
from .pattern_models import PatternModel, is_detached
from .rows import Rows
from .settings import flag, whole, wholes
from .terms import GlobalTokens

TOKENS, INPUT = "hf_optim_global_tokens", "hf_optim_attention_input"  # keywords of the attention function
MARKS = "global_attention_mask"  # keyword of a model's forward
ARRIVED = "hf_optim_global_tokens_arrived"  # keyword from a model with a head to its body
PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
OWN = ("query_global", "key_global", "value_global")


def static_tokens(settings: Mapping[str, Any]) -> GlobalTokens | None:
    """Return the global tokens at fixed positions, or None. Raises ``ValueError`` for settings that name none."""
    first, last = whole(settings, "global_first"), whole(settings, "global_last")
    positions = wholes(settings, "global_positions")
    return GlobalTokens(first, last, positions) if first or last or positions else None


def has_own_projections(settings: Mapping[str, Any]) -> bool:
    """Return True if global tokens have projections of their own."""
    return flag(settings, "global_projections")


def differ_by_row(settings: Mapping[str, Any]) -> bool:
    """Return True if the attention function needs the global tokens of each batch."""
    return bool(wholes(settings, "global_token_ids")) or has_own_projections(settings)


def all_pieces(settings: Mapping[str, Any]) -> Pieces:
    """Return the pieces of a technique that computes all of attention between global and other tokens."""
    return Pieces()


@dataclass(frozen=True)
class GlobalAttachment(Attachment):
    """An attention implementation with global tokens.

    Attributes:
        build: builds the patterns with the global tokens at fixed positions.
        near: builds the patterns of tokens that are not global, where global tokens differ by row.
        pieces: returns what is computed between global and other tokens.
    """

    near: Builder = lambda settings, layer, heads, causal: []
    pieces: Callable[[Mapping[str, Any]], Pieces] = all_pieces

    def make(
        self, settings: Mapping[str, Any], context: int | None, layer: int, heads: int, causal: bool
    ) -> HeadPatterns:
        """Return the patterns of a layer; those of tokens that are not global must be there, too."""
        HeadPatterns.of(self.near(settings, layer, heads, causal), heads)
        return super().make(settings, context, layer, heads, causal)

    def read_others(self, settings: Mapping[str, Any]) -> None:
        """Read which tokens are global, and the pieces."""
        super().read_others(settings)
        has_own_projections(settings), self.pieces(settings), wholes(settings, "global_token_ids")

    def compute(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
        rows: Rows | None, mask: Tensor | None, dropout: float, given: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        settings = getattr(module.config, FIELD)
        tokens = given.get(TOKENS)
        if tokens is None:
            if differ_by_row(settings):
                raise ValueError(
                    "global tokens are found by the forward of the model: call the model, or its body, not a part of it"
                )
            return super().compute(module, query, key, value, heads, scale, rows, mask, dropout, given)
        tokens.readers.append(True)
        if heads.causal:
            raise ValueError("a causal model has global tokens at fixed positions only: its later tokens are not there")
        layer = getattr(module, "layer_idx", None)
        near = _near_patterns(self, json.dumps(settings, sort_keys=True), layer or 0, query.shape[1])
        own = None
        if has_own_projections(settings) and tokens.index.shape[1]:
            own = _projected(module, given[INPUT], tokens, query.shape[-1])
        pieces = self.pieces(settings)
        return attend_globally(query, key, value, near, scale, tokens, pieces, own, rows, mask, dropout)


@lru_cache(maxsize=1024)
def _near_patterns(attachment: GlobalAttachment, settings: str, layer: int, heads: int) -> HeadPatterns:
    return HeadPatterns.of(attachment.near(json.loads(settings), layer, heads, False), heads)


def _projected(module: Any, states: Tensor, tokens: BatchGlobals, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries of global tokens ``[B, H, g, D]``, keys and values of all ``[B, G, M, D]``, all projected."""
    parts = (tokens.projected(states, module.query_global), module.key_global(states), module.value_global(states))
    query, key, value = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    return query, key, value


def projections_of(module: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the projections of query, key and value in a module of attention; None if it has others."""
    for names in PROJECTIONS:
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(each, nn.Module) for each in found):
            return found  # type: ignore[return-value]
    return None


def global_tokens_of(settings: Mapping[str, Any], given: Mapping[str, Any], marks: Tensor | None) -> BatchGlobals:
    """Return the global tokens of a batch: those at fixed positions, with chosen ids, and marked ones.

    Args:
        settings: of the pattern.
        given: arguments of the body's forward, by name.
        marks: 1 for global tokens and 0 for others, ``[B, N]``, or ``[B, choices, N]`` as ids of choices are; or None.

    Positions count from the first token of a row that is not padding, and padding is never global; a mask of pairs of
    tokens (4-D) does not say what is padding. Raises ``ValueError`` for marks that do not fit, and if tokens are chosen
    by id but not given by id.
    """
    ids, states = given.get("input_ids"), given.get("inputs_embeds")
    chosen = wholes(settings, "global_token_ids")
    if ids is None and (states is None or (chosen and marks is None)):
        raise ValueError(f"global tokens are chosen by their id: pass input_ids, or mark them by {MARKS}")
    like: Tensor = states[..., 0] if ids is None else ids  # type: ignore[index]
    padding = given.get("attention_mask")
    valid = torch.ones_like(like, dtype=torch.bool)
    if padding is not None and padding.dim() == 2:
        valid = padding.to(like.device).bool()
    found = torch.zeros_like(valid)
    if (static := static_tokens(settings)) is not None:
        positions = Rows(torch.where(valid, 0, -1).int()).positions()
        found = found | static.holds(positions, valid.sum(1, keepdim=True))  # type: ignore[arg-type]
    if chosen and ids is not None:
        found = found | torch.isin(ids, torch.tensor(chosen, dtype=ids.dtype, device=ids.device))
    if marks is not None:
        marks = marks.flatten(0, -2) if marks.dim() > 2 else marks  # of several choices
        told = f"{MARKS} has 1 for global tokens and 0 for others, in the shape {tuple(found.shape)} of the batch"
        if marks.shape != found.shape:
            raise ValueError(f"{told}; this one has the shape {tuple(marks.shape)}")
        if bool((others := (marks != 0) & (marks != 1)).any()):
            raise ValueError(f"{told}; this one has {marks[others][0].item()}")
        found = found | marks.to(found.device).bool()
    return BatchGlobals.of(found & valid)


def finding_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward that takes ``global_attention_mask``, and hands global tokens to the attention."""
    stock = inspect.signature(forward)

    @functools.wraps(forward)
    def found(self: Any, *args: Any, global_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        settings = getattr(self.config, FIELD, None) or {}
        if is_detached(self.config):  # every token sees all
            kwargs.pop(ARRIVED, None)
            return forward(self, *args, **kwargs)
        if getattr(self, "base_model", self) is not self:
            if global_attention_mask is None:
                return forward(self, *args, **kwargs)
            arrived: list[bool] = []
            out = forward(self, *args, **{**kwargs, MARKS: global_attention_mask, ARRIVED: arrived})
            _require_passed(arrived, self)
            return out
        kwargs.pop(ARRIVED, []).append(True)
        if global_attention_mask is None and not differ_by_row(settings):
            return forward(self, *args, **kwargs)
        given = stock.bind_partial(self, *args, **kwargs).arguments
        tokens = global_tokens_of(settings, given, global_attention_mask)
        out = forward(self, *args, **{**kwargs, TOKENS: tokens})
        _require_passed(tokens.readers, self)
        return out

    # Trainers read the names of columns here.
    own = inspect.Parameter(MARKS, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    every = list(stock.parameters.values())
    at = next((i for i, each in enumerate(every) if each.kind is inspect.Parameter.VAR_KEYWORD), len(every))
    found.__signature__ = stock.replace(parameters=[*every[:at], own, *every[at:]])  # type: ignore[attr-defined]
    return found


def _require_passed(arrived: list[bool], model: Any) -> None:
    if not arrived:
        raise ValueError(f"{type(model).__name__} does not pass {MARKS} on to its attention: give it to its base_model")


class FindingTokens:
    """Mixin of a class whose forward finds global tokens."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass that inherits the forward of one that finds tokens has it already.
        if hasattr(cls, "forward") and not getattr(cls.forward, "finds_tokens", False):
            cls.forward = finding_tokens(cls.forward)
            cls.forward.finds_tokens = True


class PassingInput:
    """Mixin of a module of attention that passes its input on to the attention function."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention of ``hidden_states``, the first argument."""
        kwargs[INPUT] = args[0] if args else kwargs["hidden_states"]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class GlobalTokensModel(FindingTokens, PatternModel):
    """Mixin of a model class with global tokens, first among its bases. ``forward`` takes ``global_attention_mask``."""

    def why_not_captured(self) -> str:
        settings = getattr(self.config, FIELD, None) or {}  # type: ignore[attr-defined]
        if self.has_stock_attention or not differ_by_row(settings):
            return ""
        which = "have projections of their own" if has_own_projections(settings) else "are chosen by id"
        return f"its global tokens {which}, and the host finds them in each batch"

    def set_up_attention(self) -> None:
        super().set_up_attention()
        settings = getattr(self.config, FIELD, None) or {}  # type: ignore[attr-defined]
        body = self.base_model  # type: ignore[attr-defined]
        if body is not self:
            body.__class__ = mixed(FindingTokens, type(body))  # type: ignore[arg-type]
        if has_own_projections(settings):
            for module in [each for each in body.modules() if hasattr(each, "is_causal")]:
                add_projections(module)


def add_projections(module: nn.Module) -> None:
    """Give a module of attention projections for global tokens, that are copies of its own."""
    stock = projections_of(module)
    if stock is None:
        raise ValueError(f"{type(module).__name__} has no projections of query, key and value to copy")
    for name, projection in zip(OWN, stock, strict=True):
        if not hasattr(module, name):
            module.add_module(name, copy.deepcopy(projection))
    module.__class__ = mixed(PassingInput, type(module))  # type: ignore[arg-type, assignment]


def with_static(settings: Mapping[str, Any], patterns: list[Pattern]) -> list[Pattern]:
    """Return patterns with the global tokens at fixed positions as one more term."""
    static = static_tokens(settings)
    if static is None:
        return patterns
    return [Pattern((*pattern.terms, static), pattern.causal, pattern.repeats) for pattern in patterns]

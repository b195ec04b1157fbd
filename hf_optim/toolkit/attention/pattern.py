"""The pattern of one head: the union of its terms, in a causal model without keys behind the query.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from .terms import Term


def kept_tensors(maxsize: int) -> Callable[[Callable[..., Any]], Any]:
    """Keep what a function makes of hashable arguments for later calls, as ``lru_cache`` does: tensors for any use.

    They are ordinary tensors, on the CPU unless the function names a device: also if the first call is under
    ``torch.inference_mode`` or has another default device. What is made in a trace may have no values, so it is not
    kept, and what is kept is not mixed with that.
    """

    def decorated(make: Callable[..., Any]) -> Any:
        @lru_cache(maxsize=maxsize)
        def kept(*args: Any) -> Any:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*args)

        @wraps(make)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or is_traced():
                return make(*args)
            return kept(*args)

        call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return call

    return decorated


TRACES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def is_traced() -> bool:
    """Return True inside of a mode of dispatch whose tensors stand for others."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in TRACES)


@dataclass(frozen=True)
class Pass:
    """Terms that are computed together, in one order of the tokens; pairs of ``earlier`` terms are left out.

    Each pair counts ``times`` times in the softmax.
    """

    terms: tuple[Term, ...]
    earlier: tuple[Term, ...]
    causal: bool
    times: int = 1

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        """Return True where the pass computes a pair; arguments as in ``Term.sees``."""
        found = _any_sees(self.terms, query, key, length)
        if self.earlier:
            found = found & ~_any_sees(self.earlier, query, key, length)
        return found & (key <= query) if self.causal else found


@dataclass(frozen=True)
class Pattern:
    """What the queries of a head see.

    Attributes:
        terms: a query sees the keys of any of them.
        causal: keys behind the query are not seen, whatever the terms say.
        repeats: pairs that are counted again in the softmax, and how many times more.
    """

    terms: tuple[Term, ...]
    causal: bool = False
    repeats: tuple[tuple[Term, int], ...] = ()

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        """Return True where the query at a position sees the key at a position; arguments as in ``Term.sees``."""
        return Pass(self.terms, (), self.causal).sees(query, key, length)

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        """Return True for keys that a query at position ``query`` or later can see; arguments as in ``Term.stays``."""
        found = torch.zeros_like(key, dtype=torch.bool)
        for term in self.terms:
            found = found | term.stays(key, query, length)
        return found

    def passes(self) -> tuple[Pass, ...]:
        """Return disjoint passes whose union is the pattern: one for each order of tokens, the natural one first.

        Repeats follow them.
        """
        orders: dict[tuple[str, int], list[Term]] = {}
        for term in sorted(self.terms, key=lambda term: term.order != ("natural", 1)):
            orders.setdefault(term.order, []).append(term)
        found: list[Pass] = []
        earlier: tuple[Term, ...] = ()
        for terms in orders.values():
            found.append(Pass(tuple(terms), earlier, self.causal))
            earlier = (*earlier, *terms)
        found += [Pass((term,), (), self.causal, times) for term, times in self.repeats]
        return tuple(found)

    @property
    def moves_along(self) -> bool:
        """True if only the distance of query and key counts."""
        return all(term.moves_along for term in self.terms)

    def is_full(self, length: int) -> bool:
        """Return True if every query of a row of ``length`` tokens sees every key that the model allows."""
        if not self.repeats and any(term.holds_all(length, self.causal) for term in self.terms):
            return True
        if length > SMALL:
            return False
        place = torch.arange(length)
        if any(bool(term.sees(place[:, None], place[None, :], length).any()) for term, _ in self.repeats):
            return False
        seen = self.sees(place[:, None], place[None, :], length)
        return bool((seen | (place[None, :] > place[:, None])).all() if self.causal else seen.all())


SMALL = 1024  # up to this length a pattern is compared with all pairs


def visible(pattern: Pattern, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the pattern as bool ``[length, length]``: True where a query (row) sees a key (column)."""
    place = torch.arange(length, device=device)
    return pattern.sees(place[:, None], place[None, :], length).expand(length, length)


def _any_sees(terms: tuple[Term, ...], query: Tensor, key: Tensor, length: int) -> Tensor:
    found = torch.zeros((), dtype=torch.bool, device=key.device)
    for term in terms:
        found = found | term.sees(query, key, length)
    return found

"""LSH attention as a part of a model: its rotations, its attention function, and the state of a cache.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import recall
from .learned import LearnedAttachment, attentions
from .lsh_chunks import attention_behind, lsh_attention, unit_keys
from .lsh_hashing import columns_of, draw_rotations, hash_vectors
from .lsh_kernel import buckets_by_kernel
from .lsh_places import BUCKET, LshScheme, codes_of, with_padding
from .row_state import Call, TensorState


class LshPart(nn.Module):
    """The rotations of one attention, whole numbers that are saved with it: int32 ``[H, D, rounds, columns]``."""

    rotations: Tensor

    def __init__(self, scheme: LshScheme, layer: int) -> None:
        super().__init__()
        self.scheme, self.layer = scheme, layer
        size = scheme.heads, scheme.width, scheme.rounds, columns_of(scheme.factors)
        self.register_buffer("rotations", torch.empty(size, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rotations of the seed and the layer."""
        if not self.rotations.is_meta:
            self.rotations.copy_(self._drawn(self.scheme.seed * 1_000_003 + self.layer))

    def _drawn(self, seed: int) -> Tensor:
        scheme = self.scheme
        return draw_rotations(scheme.heads, scheme.width, scheme.rounds, scheme.factors, seed)

    def buckets(self, query: Tensor) -> Tensor:
        """Return the buckets of queries ``[R, H, n, D]``, int16 ``[R, H, rounds, n]``.

        In training with ``redraw``, the rotations are others each time: of a seed that PyTorch's generator draws.
        """
        rotations = self.rotations
        if self.training and self.scheme.redraw:
            rotations = self._drawn(int(torch.randint(2**62, (), device="cpu"))).to(query.device)
        found = buckets_by_kernel(query, rotations, self.scheme.factors)
        return hash_vectors(query, rotations, self.scheme.factors).short() if found is None else found


class LshAttachment(LearnedAttachment):
    """The attention function: full rows by chunks, and the last tokens of rows over what a cache holds.

    A subclass has ``read``, which returns an ``LshScheme``.
    """

    title = "LSH attention"

    def build_part(self, settings: Mapping[str, Any], layer: int) -> LshPart:
        """Return the rotations of a layer."""
        return LshPart(self.read(settings), layer)

    def compute_call(self, part: Any, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output and the new state, as ``LearnedAttachment.compute_call``; ``call.key`` is not read."""
        scheme: LshScheme = part.scheme
        if call.causal and scheme.after:
            raise ValueError("a causal model sees no chunk behind a token: set after to 0")
        buckets = recall(lambda: part.buckets(call.query))
        if call.state is None:
            out = lsh_attention(call.query, call.value, buckets, scheme, call.causal, call.lengths, call.dropout)
            return out, held_after(None, call, buckets.long(), scheme) if call.keeps else None
        state = held_after(call.state, call, buckets.long(), scheme)
        codes = state["codes"] if scheme.scheme == BUCKET else codes_of(state["codes"].long(), scheme)
        at = state["places"][:, -call.query.shape[2] :].long()
        out = attention_behind(
            call.query, at, state["keys"], state["values"], codes, state["places"], state["tokens"], scheme,
            call.dropout,
        )  # fmt: skip
        return out, state


def held_after(before: TensorState | None, call: Call, buckets: Tensor, scheme: LshScheme) -> TensorState:
    """Return what a cache holds after the tokens of a call.

    That is ``keys`` ``[R, H, M, D]``, ``values`` ``[R, G, M, D]``, ``places`` int32 ``[R, M]`` (-1 for padding),
    ``tokens`` int64 ``[R]``, and ``codes`` ``[R, H, rounds, M]``: in the ``bucket`` scheme those of ``codes_of``,
    int32, with ``counts`` int32 ``[R, H, rounds, buckets]``, the tokens of each bucket; in the others buckets, int16,
    since later tokens change the codes of earlier ones.
    """
    count, device = call.query.shape[2], call.query.device
    start = buckets.new_zeros(len(buckets)) if before is None else before["tokens"]
    place = torch.arange(count, device=device)
    lengths = buckets.new_full((len(buckets),), count) if call.lengths is None else call.lengths
    places = torch.where(place < lengths[:, None], start[:, None] + place, -1).int()
    buckets = with_padding(buckets, call.lengths, scheme, True)
    new = {"keys": unit_keys(call.query), "values": call.value, "places": places}
    other: dict[str, Tensor] = {"tokens": start + lengths}
    if scheme.scheme == BUCKET:
        counts = None if before is None else before["counts"]
        new["codes"] = codes_of(buckets, scheme, counts)
        ones = torch.ones_like(buckets, dtype=torch.int32)
        added = ones.new_zeros(*buckets.shape[:3], scheme.buckets + 1).scatter_add_(-1, buckets, ones)
        other["counts"] = added[..., :-1] if counts is None else counts + added[..., :-1]
    else:
        new["codes"] = buckets.short()
    tokens_last = {"codes": -1, "places": -1}
    if before is not None:
        new = {name: torch.cat([before[name], part], tokens_last.get(name, 2)) for name, part in new.items()}
    return TensorState({**new, **other})


class NoKeys(nn.Module):
    """Stands where keys were projected: zeros of their size, which nothing reads. It has no weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_features = width

    def forward(self, hidden: Tensor) -> Tensor:
        """Return zeros ``[..., out_features]`` for ``[..., d]``."""
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], self.out_features)


def drop_key_projections(model: nn.Module, name: str) -> None:
    """Replace the projections of keys by ``NoKeys``, in place.

    Raises ``ValueError`` if an attention has no linear layer of this name.
    """
    for module in attentions(model):
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{type(module).__name__} has no linear layer {name[:40]!r} that projects keys")
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, NoKeys(layer.out_features).train(layer.training))

"""Attention to sorted blocks in the models of transformers: its settings, its networks and what a cache keeps.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optim.toolkit.attention import (
    Call,
    LearnedAttachment,
    LearnedConfig,
    TensorState,
    chosen,
    whole,
)

from ._sinkhorn_attention import (
    block_attention,
    in_row,
    shared_mean,
    sorted_blocks,
    sorted_with_padding,
    summaries,
)
from ._sinkhorn_kernel import blocks_by_kernel
from ._sinkhorn_sorting import HIDDEN, AttentionSorter, LinearSorter, Sorter, of_past, sinkhorn

LONGEST_BLOCK = 65536


@dataclass(frozen=True)
class Sorting:
    """The settings of attention to sorted blocks, as they stand in ``config.json``.

    Attributes:
        block: tokens of a block.
        blocks: that a linear sort network can tell apart; 0 for the other one.
        sorter: ``linear`` or ``attention``.
        summary: of blocks: ``sum`` or ``mean``.
        prefix: what a block of a causal model asks by: its ``first`` token, or all tokens up to that (``cumulative``).
        positive: how scores are made positive: ``exp``, or ``relu``.
        temperature: by which scores are divided.
        iterations: of the normalization of rows and columns.
        noise: factor of the Gumbel noise in training.
        cut: sorted blocks that all queries see in the place of their own; 0: the own block and the one sorted there.
        seed: of the noise and of the networks.
        key_heads, head_width: of the model.
    """

    block: int
    blocks: int
    sorter: str
    summary: str
    prefix: str
    positive: str
    temperature: float
    iterations: int
    noise: float
    cut: int
    seed: int
    key_heads: int
    head_width: int

    @classmethod
    def of(cls, settings: Any) -> Sorting:
        """Return the settings. Raises ``ValueError`` for others."""
        if not isinstance(settings, Mapping):
            raise ValueError("attention to sorted blocks needs config.attention_pattern")
        sorter = chosen(settings, "sorter", ("linear", "attention"))
        made = cls(
            block=whole(settings, "block", low=1, high=LONGEST_BLOCK),
            blocks=whole(settings, "blocks", low=int(sorter == "linear"), high=65536),
            sorter=sorter,
            summary=chosen(settings, "summary", ("sum", "mean")),
            prefix=chosen(settings, "prefix", ("first", "cumulative")),
            positive=chosen(settings, "positive", ("exp", "relu")),
            temperature=_positive_number(settings, "temperature", 1e-3, 1e3),
            iterations=whole(settings, "iterations", low=1, high=1000),
            noise=_positive_number(settings, "noise", 0.0, 1e3),
            cut=whole(settings, "cut", high=65536),
            seed=whole(settings, "seed"),
            key_heads=whole(settings, "key_heads", low=1, high=4096),
            head_width=whole(settings, "head_width", low=1, high=65536),
        )
        unknown = sorted(str(name)[:40] for name in settings if name not in {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"attention to sorted blocks has settings that it does not know: {unknown[:4]}")
        return made


def _positive_number(settings: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"attention to sorted blocks has {name}={str(value)[:40]!r}, not a number from {low:g} to {high:g}"
        )
    return float(value)


class SortedPart(nn.Module):
    """What is added to an attention: the network that sorts its blocks."""

    def __init__(self, sorting: Sorting, layer: int) -> None:
        super().__init__()
        self.sorting = sorting
        heads, width, seed = sorting.key_heads, sorting.head_width, sorting.seed * 4096 + layer
        network: nn.Module = AttentionSorter(heads, width)
        if sorting.sorter == "linear":
            network = LinearSorter(heads, width, sorting.blocks, seed)
        self.sorter = Sorter(network, sorting.positive, sorting.temperature, sorting.iterations, sorting.noise, seed)

    def attention(self, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output ``[R, H, P, D]`` and the state, as ``LearnedAttachment.compute_call`` does."""
        sorting, key = self.sorting, call.key
        if (key.shape[1], key.shape[3]) != (sorting.key_heads, sorting.head_width):
            raise ValueError(
                f"attention to sorted blocks is for {sorting.key_heads} key heads of width {sorting.head_width}, and "
                f"got {key.shape[1]} of {key.shape[3]}"
            )
        query = call.query.to(call.value.dtype)  # which differ under autocast
        key = key.to(call.value.dtype)
        if not call.causal:
            return self._whole_rows(call, query, key, call.value), None
        if sorting.cut:
            raise ValueError("a cut shows all tokens the same blocks, later ones too, and this attention is causal")
        if call.state is not None and query.shape[2] == 1 and call.lengths is None:
            return self._one_token(call, query, key, call.value, call.state)
        return self._causal_rows(call, query, key, call.value)

    def _whole_rows(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output of rows that are read at once, ``[R, H, P, D]``."""
        sorting, length = self.sorting, query.shape[2]
        size = min(sorting.block, length)
        keys, values = in_row(key, size), in_row(value, size)
        count, valid = keys.shape[2], None
        if call.valid is not None or length % size:
            known = call.valid
            if known is None:
                known = torch.ones(len(query), length, dtype=torch.bool, device=query.device)
            valid = functional.pad(known, (0, -length % size)).unflatten(1, (count, size))
        own = None if valid is None else valid[:, None, None, :, None]
        if count == 1:
            out = block_attention(in_row(query, size), (keys, values), None, own, None, call.scale, call.dropout)
            return out.flatten(2, 3)
        asked = summaries(in_row(shared_mean(query, key.shape[1]), size), sorting.summary, valid)
        held = summaries(keys, sorting.summary, valid)
        scores = self.sorter.scores(asked, held, held)
        weights = sinkhorn(scores, sorting.iterations, None if valid is None else valid.any(2)[:, None])
        if sorting.cut:
            weights = weights[:, :, : sorting.cut]
        queries, share = in_row(query, size), None
        if valid is None and not call.dropout and not sorting.cut:
            made_whole = blocks_by_kernel(queries, (keys, values), weights, False, call.scale)
            if made_whole is not None:
                return made_whole.flatten(2, 3)
        if valid is None:
            brought = sorted_blocks(weights, keys), sorted_blocks(weights, values)
        else:
            *made, share = sorted_with_padding(weights, (keys, values), valid)
            brought = made[0], made[1]
        if sorting.cut:
            every = tuple(part.flatten(2, 3)[:, :, None] for part in brought)
            bias = None if share is None else share.flatten(2)[:, :, None, None, None]
            out = block_attention(query[:, :, None], every, None, None, bias, call.scale, call.dropout)  # type: ignore[arg-type]
            return out.flatten(2, 3)
        bias = None if share is None else share[:, :, None, :, None]
        seen = None if own is None else functional.pad(own, (0, size), value=True)
        joined = block_attention(queries, (keys, values), brought, seen, bias, call.scale, call.dropout)
        return joined.flatten(2, 3)[:, :, :length]

    def _prefixes(self, call: Call, query: Tensor, key: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what blocks ask by, of queries and of keys ``[R, G, N, D]``, and the sum of all queries ``[R, G, D]``.

        ``query`` ``[R, H, T, D]``, ``key`` ``[R, G, T, D]``: of rows from their first token, with zeros for queries of
        the state.
        """
        first = self.sorting.prefix == "first"
        if first:
            query, key = query[:, :, ::size], key[:, :, ::size]
        query = shared_mean(query, key.shape[1])
        wide = [part if part.dtype == torch.float64 else part.float() for part in (query, key)]
        if first:
            return wide[0], wide[1], None
        total = [part.cumsum(2) for part in wide]
        if call.state is not None:
            total[0] = total[0] + call.state["sum"][:, :, None]
        found = [part[:, :, ::size] for part in total]
        if self.sorting.summary == "mean":
            counts = torch.arange(found[0].shape[2], device=query.device) * size + 1
            found = [part / counts[:, None] for part in found]
        return found[0], found[1], total[0][:, :, -1]

    def _causal_rows(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, TensorState | None]:
        """Return the output of new tokens of rows, each of which may come after a state, and the state after them."""
        groups, length, state = key.shape[1], query.shape[2], call.state
        counts = call.lengths if call.lengths is not None else torch.full((len(query),), length, device=query.device)
        place = None
        if state is not None and call.earlier is not None:
            counts = call.earlier + counts
            total, old = int(counts.max()), state["key"].shape[2]
            place = call.earlier[:, None] + torch.arange(length, device=query.device)
            if call.valid is not None:
                place = place.masked_fill(~call.valid, total)  # a place that is dropped
            query, key, value = (
                _tokens_at(before, new, place, max(total, old))[:, :, :total]
                for before, new in ((None, query), (state["key"], key), (state["value"], value))
            )
        size = min(self.sorting.block, key.shape[2])
        keys, values, queries = in_row(key, size), in_row(value, size), in_row(query, size)
        blocks = keys.shape[2]
        asked, own, total_sum = self._prefixes(call, query, key, size)
        if state is not None and call.earlier is not None:
            begun = torch.where(call.earlier % self.sorting.block > 0, call.earlier // self.sorting.block, -1)
            here = torch.arange(blocks, device=query.device) == begun[:, None]
            asked = torch.where(here[:, None, :, None], state["asked"][:, :, None].to(asked), asked)
        weights = made = None
        if blocks > 1:
            held = summaries(keys, self.sorting.summary, None)
            weights = of_past(self.sorter.scores(asked, own, held))
        if not call.dropout:
            made = blocks_by_kernel(queries, (keys, values), weights, True, call.scale)
        if made is None:
            inner = torch.arange(size, device=query.device)
            seen, brought = inner[:, None] >= inner, None
            if weights is not None:
                brought = sorted_blocks(weights, keys), sorted_blocks(weights, values)
                later = (torch.arange(blocks, device=query.device) > 0)[:, None, None].expand(-1, size, size)
                seen = torch.cat([seen.expand(blocks, -1, -1), later], -1)
            made = block_attention(queries, (keys, values), brought, seen, None, call.scale, call.dropout)
        out = made.flatten(2, 3)
        if place is None:
            out = out[:, :, :length]
        else:
            index = place.clamp_max(out.shape[2] - 1)[:, None, :, None]
            out = out.gather(2, index.expand(-1, out.shape[1], -1, out.shape[3]))
        if not call.keeps:
            return out, None
        now = (counts // self.sorting.block).clamp_max(blocks - 1)[:, None, None, None]
        kept = TensorState(key=key, value=value, asked=_block_at(asked, now[..., 0]))
        if total_sum is not None:
            # Queries behind the last token of a row are zeros, or padding, which must not count.
            kept["sum"] = self._sum_until(call, shared_mean(query, groups), counts)
        for name, part in (("brought_key", keys), ("brought_value", values)):
            if weights is None:
                kept[name] = part[:, :, 0, :0]
            else:
                row = weights.gather(2, now.expand(-1, groups, 1, blocks))
                kept[name] = sorted_blocks(row, part)[:, :, 0]
        return out, kept

    def _sum_until(self, call: Call, query: Tensor, counts: Tensor) -> Tensor:
        """Return the sum of the queries ``[R, G, T, D]`` of each row up to its last token, ``[R, G, D]``."""
        wide = query if query.dtype == torch.float64 else query.float()
        inside = torch.arange(query.shape[2], device=query.device) < counts[:, None]
        total = (wide * inside[:, None, :, None]).sum(2)
        return total if call.state is None else total + call.state["sum"]

    def _one_token(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, state: TensorState
    ) -> tuple[Tensor, TensorState | None]:
        """Return the output of one more token of each row, and the state after it.

        Blocks are sorted when a row begins a block, and kept until it ends.
        """
        size, groups, device = self.sorting.block, key.shape[1], query.device
        earlier: Tensor = call.earlier  # type: ignore[assignment]
        room = int(earlier.max()) + 1
        keys, values = (
            _tokens_at(before[:, :, :room], new, earlier[:, None], room)
            for before, new in ((state["key"], key), (state["value"], value))
        )
        kept = TensorState(state, key=keys, value=values)
        mean = shared_mean(query, groups)[:, :, 0]
        mean = mean if mean.dtype == torch.float64 else mean.float()
        if "sum" in state:
            kept["sum"] = state["sum"] + mean
        block, offset = earlier // size, earlier % size
        inner = torch.arange(min(size, room), device=device)
        seen = (inner <= offset[:, None])[:, None, None, None, None]
        at = (block[:, None] * size + inner).clamp_max(room - 1)[:, None, :, None].expand(-1, groups, -1, keys.shape[3])
        own = keys.gather(2, at)[:, :, None], values.gather(2, at)[:, :, None]
        brought = None
        if room > size:
            begins = offset == 0
            if bool(begins.any()):
                new = self._sorted_for(call, mean, keys, values, earlier, kept)
                chosen_rows = begins[:, None, None, None]
                for name, part in zip(("brought_key", "brought_value"), new, strict=True):
                    before = state[name] if state[name].shape[2] else torch.zeros_like(part)
                    kept[name] = torch.where(chosen_rows, part, before)
            brought = kept["brought_key"][:, :, None], kept["brought_value"][:, :, None]
            later = (block > 0)[:, None, None, None, None, None].expand(-1, -1, -1, -1, -1, size)
            seen = torch.cat([seen, later], -1)
        out = block_attention(query[:, :, None], own, brought, seen, None, call.scale, 0.0)[:, :, 0]
        return out, kept if call.keeps else None

    def _sorted_for(
        self, call: Call, mean: Tensor, keys: Tensor, values: Tensor, earlier: Tensor, kept: TensorState
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[R, G, L, D]`` that are sorted to the block whose first token comes now."""
        size, sorting = self.sorting.block, self.sorting
        asked, own = mean, _block_at(keys, earlier[:, None, None])
        own = own if own.dtype == torch.float64 else own.float()
        if sorting.prefix == "cumulative":
            inside = torch.arange(keys.shape[2], device=keys.device) <= earlier[:, None]
            asked, own = kept["sum"], (keys.to(mean) * inside[:, None, :, None]).sum(2)
            if sorting.summary == "mean":
                asked, own = asked / (earlier + 1)[:, None, None], own / (earlier + 1)[:, None, None]
        kept["asked"] = torch.where((earlier % size == 0)[:, None, None], asked.to(kept["asked"]), kept["asked"])
        blocks = in_row(keys, size), in_row(values, size)
        held = summaries(blocks[0], sorting.summary, None)
        scores = self.sorter.scores(asked[:, :, None], own[:, :, None], held)
        before = (torch.arange(held.shape[2], device=keys.device) < (earlier // size)[:, None])[:, None, None]
        weights = scores.masked_fill(~before, HIDDEN).softmax(-1).masked_fill(~before, 0)
        return sorted_blocks(weights, blocks[0])[:, :, 0], sorted_blocks(weights, blocks[1])[:, :, 0]


def _tokens_at(before: Tensor | None, new: Tensor, place: Tensor, total: int) -> Tensor:
    """Return ``[R, G, total, D]`` of the tokens ``before`` ``[R, G, S, D]``, and the ``new`` ones at their places.

    ``place``: int64 ``[R, P]``; places from ``total`` on are dropped.
    """
    made = new.new_zeros(*new.shape[:2], total + 1, new.shape[3])
    if before is not None:
        made = torch.cat([before, made[:, :, before.shape[2] :]], 2)
    index = place.clamp_max(total)[:, None, :, None].expand_as(new)
    return made.scatter(2, index, new)[:, :, :total]


def _block_at(part: Tensor, index: Tensor) -> Tensor:
    """Return ``[R, G, D]`` of ``[R, G, N, D]`` at int64 ``[R, 1, 1]``."""
    return part.gather(2, index[..., None].expand(-1, part.shape[1], 1, part.shape[3]))[:, :, 0]


class SortedAttachment(LearnedAttachment):
    """The attention function of attention to sorted blocks."""

    title = "attention to sorted blocks"

    def read(self, settings: Mapping[str, Any]) -> Sorting:
        return Sorting.of(settings)

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module | None:
        return SortedPart(self.read(settings), layer)

    def compute_call(self, part: nn.Module | None, call: Call) -> tuple[Tensor, TensorState | None]:
        return part.attention(call)  # type: ignore[union-attr, operator]


SORTED = SortedAttachment("hf_optim_sinkhorn")


class SortedConfig(LearnedConfig):
    """Base of the configuration classes."""

    attachment = SORTED

"""Key/value heads: the rows of the projections that compute the queries, keys and values of each head of an attention.

They are found on a trace, in separate and in fused projections, in any order of rows. The rows of a head are those that
its columns of the output projection depend on (``prunable_groups``). Of these,

- the values are what the output projection reads, up to sums over tokens (``layer_pairs``);
- the keys are the others that reach the output of *another* token, through its attention scores;
- the queries are the rest: a query has an effect on the output of its own token only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_lists import block_of, blocks
from .graph import Trace
from .layer_pairs import LinearPair, find_linear_pairs
from .prunable_groups import HEADS, PrunableGroups, groups_of, upstream
from .reexecution import NotReexecutable, Reexecution, memoize, ops_signature, random_tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one projection that belong to the heads of one kind.

    Attributes:
        layer: name of the linear layer.
        index: int64 ``[key/value heads, rows of each]``, ascending in each head.
    """

    layer: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class KeyValueHeads:
    """The key/value heads of one attention. Its length is their number.

    Attributes:
        block: name of the block that contains the attention.
        module: name of the module that computes it: the one that runs the projections' products.
        consumer: name of the output projection.
        queries: the rows of queries; a key/value head has those of all its query heads.
        keys, values: the rows of keys and values. A fused projection is the layer of several of the three.
        query_heads: number of query heads of each key/value head.
        width: channels of a head's value.
        crosses: True if keys and values are computed from another sequence than queries (cross-attention).
    """

    block: str
    module: str
    consumer: str
    queries: Rows
    keys: Rows
    values: Rows
    query_heads: int
    width: int
    crosses: bool

    def __len__(self) -> int:
        return len(self.values.index)


def find_key_value_heads(trace: Trace) -> list[KeyValueHeads]:
    """Return the key/value heads of every attention in the blocks of a model, in execution order.

    An attention is left out if its heads cannot be told: a norm over the channels of all heads, a projection of keys
    through a latent vector, tied weights.
    """
    found = blocks(trace)
    result = []
    for pair in find_linear_pairs(trace):
        block = block_of(found, pair.producer)
        if block is None or not block.holds(pair.consumer):
            continue
        heads = [_heads_of(trace, pair, groups) for groups in groups_of(trace, pair, block.name)]
        result += [one for one in heads if one is not None]
    return result


def _heads_of(trace: Trace, pair: LinearPair, groups: PrunableGroups) -> KeyValueHeads | None:
    """Return the heads of one attention; None for a feed-forward layer, or if one of the three kinds has no rows."""
    if groups.kind != HEADS:
        return None
    linear = {op.linear for op in trace.ops if op.linear is not None}
    rows = {
        name.removesuffix(".weight"): entries
        for name, (_, entries) in groups.entries.items()
        if name.removesuffix(".weight") in linear and name != f"{pair.consumer}.weight"
    }
    target = trace.calls_of(pair.consumer)[0].reads[0]
    try:
        crossing = _rows_that_cross(trace, target)
    except NotReexecutable:
        return None
    kinds: dict[str, list[Rows]] = {"queries": [], "keys": [], "values": []}
    for layer, entries in rows.items():
        values = (
            torch.isin(entries, pair.rows) if layer == pair.producer else torch.zeros_like(entries, dtype=torch.bool)
        )
        keys = torch.isin(entries, crossing.get(layer, entries.new_zeros(0))) & ~values
        for kind, chosen in (("queries", ~(values | keys)), ("keys", keys), ("values", values)):
            counts = chosen.sum(1)
            if int(counts[0]) and bool((counts == counts[0]).all()):
                kinds[kind].append(Rows(layer, torch.stack([r[c] for r, c in zip(entries, chosen, strict=True)])))
    if any(len(parts) != 1 for parts in kinds.values()):
        return None
    queries, keys_, values_ = (parts[0] for parts in kinds.values())
    read = [trace.calls_of(part.layer)[0].reads for part in (queries, keys_)]
    return KeyValueHeads(
        block=groups.block,
        module=_attention_module(trace, target),
        consumer=pair.consumer,
        queries=queries,
        keys=keys_,
        values=values_,
        query_heads=groups.query_heads,
        width=groups.width,
        crosses=read[0] != read[1],
    )


def _attention_module(trace: Trace, target: int) -> str:
    """Return the module that runs the last operation before the output projection that is a product."""
    ops, _ = upstream(trace, target)
    products = [op for op in ops if getattr(op.function, "_opname", "") in ("bmm", "mm", "matmul", "baddbmm")]
    return products[-1].module if products else ops[-1].module


def _rows_that_cross(trace: Trace, target: int) -> dict[str, Tensor]:
    """Return, for each linear layer before ``target``, the rows whose earlier tokens reach the last one of it.

    ``target`` is the input ``[B, T, C]`` of an output projection. Rows are int64, ascending.
    """
    ops, sources = upstream(trace, target)
    producers = {value: op for op in trace.ops for value in op.produces}
    linear = {v: producers[v].linear for v in sources if v in producers and producers[v].linear is not None}

    def compute() -> list[Tensor]:
        inputs = {v: random_tensor(trace.shapes[v], seed=41 + n).mul_(0.2) for n, v in enumerate(sources)}
        with torch.enable_grad():
            for value in linear:
                inputs[value].requires_grad_(True)
            output = Reexecution(trace, ops, seed=42, guess_integers=True).run(inputs)[target]
            last = output.shape[-2] - 1
            along = random_tensor(output.shape, seed=43)[..., last, :]
            wanted = [inputs[value] for value in linear]
            found = torch.autograd.grad((output[..., last, :] * along).sum(), wanted, allow_unused=True)
        rows = []
        for value, gradient in zip(linear, found, strict=True):
            touched = torch.zeros(trace.shapes[value]) if gradient is None else gradient
            others = [token for token in range(touched.shape[-2]) if token != last]
            rows.append((touched[..., others, :] != 0).flatten(0, -2).any(0).nonzero().flatten())
        return rows

    key = ("crossing", ops_signature(trace, ops, (target, *sources)), tuple(linear))
    found = memoize(trace, key, compute)
    crossing: dict[str, Tensor] = {}
    for name, rows in zip(linear.values(), found, strict=True):
        assert name is not None
        crossing[name] = torch.cat([crossing.get(name, rows[:0]), rows]).unique()
    return crossing
